"""Pictures from a model that continues sequences of codes of pictures: no text, no tokenizer.

P codes of a picture, V codes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from mindvlm.core.config import LENGTH_KEYS, GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation.request import Request
from mindvlm.processing.images.loading import ImageSource
from mindvlm.sessions.loaded_model import LoadedModel, as_list

MAX_CACHED_PICTURES = 64
NO_PLACEHOLDER = -1
NOT_FINITE = "check that the weights are complete and those of this model"


class PictureGraph(nn.Cell):
    """Codes (1, P) int32 -> the pixels of a picture."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, codes):
        return self.model.decode_images(codes)


class PictureSequenceModel(LoadedModel):
    """A model that continues sequences of pictures, as returned by `mindvlm.load`.

    The model Cell has `encode_images` (pixels to codes, -1 where they are undefined) and `decode_images` (codes to
    pixels), and its config `num_picture_codes`.
    """

    def __init__(self, model, processor, config, **options):
        super().__init__(model, processor, config, placeholder_id=NO_PLACEHOLDER, **options)
        self.num_codes = config.model.num_picture_codes
        self.picture_graph = PictureGraph(model)
        self.cache: OrderedDict[str, np.ndarray] = OrderedDict()

    def complete(
        self,
        queries: ImageSource | Sequence[ImageSource],
        pairs: Sequence[tuple[ImageSource, ImageSource]],
        **generation,
    ) -> list[Image.Image]:
        """Applies the task that pairs of pictures show to other pictures.

        All queries are answered together, in slots; each result equals that of the single query. With `do_sample`,
        query n uses the seed plus n.

        Args:
            queries: a picture or a list of pictures.
            pairs: examples, each a picture and its label.

        Returns:
            One picture for each query.

        Raises:
            UserError: a picture cannot be read, an example is no pair, the pictures exceed the context, or the model
                computes NaN or infinity.
        """
        wrong = next((pair for pair in pairs if len(as_list(pair)) != 2), None)
        if wrong is not None:
            raise UserError(f"an example of {len(as_list(wrong))} pictures; expected pairs of a picture and its label")
        examples = [picture for pair in pairs for picture in pair]
        shown = self.encode(examples).reshape(-1).tolist()
        prompts = [[*shown, *codes.tolist()] for codes in self.encode(as_list(queries))]
        return self.decode(self.continue_codes(prompts, self.num_codes, **generation))

    def continue_pictures(
        self, pictures: Sequence[ImageSource], num_pictures: int = 1, **generation
    ) -> list[Image.Image]:
        """Returns the pictures that follow a sequence, such as the frames of a video.

        If the context cannot hold all of them, the oldest ones are forgotten, and each new picture then needs a prompt
        of its own. With `do_sample`, prompt n uses the seed plus n.

        Raises:
            UserError: `num_pictures` is below 1, or as in `complete`.
        """
        if num_pictures < 1:
            raise UserError(f"num_pictures is {num_pictures}; expected at least 1")
        capacity, codes = self.engine.max_length // self.num_codes, list(self.encode(as_list(pictures)))
        first, seed = len(codes), self.seed(self.generation_config(generation))
        while len(codes) < first + num_pictures:
            window = codes[-(capacity - 1) :] if capacity > 1 else []
            count = min(first + num_pictures - len(codes), capacity - len(window))
            prompt = [code for one in window for code in one.tolist()]
            (new,) = self.continue_codes([prompt], count * self.num_codes, **{**generation, "seed": seed})
            seed += 1
            codes += list(np.array(new, np.int32).reshape(count, -1))
        return self.decode(codes[first:])

    def continue_codes(self, prompts: Sequence[Sequence[int]], num_codes: int, **generation) -> list[list[int]]:
        """Returns the next codes of each sequence.

        Args:
            prompts: codes, at least one each.
            num_codes: number of codes to generate.

        Raises:
            UserError: a code is out of range, a sequence is empty or exceeds the context, or as in `complete`.
        """
        options = self.picture_options(generation, num_codes)
        for prompt in prompts:
            self.check_codes(prompt)
            if not len(prompt) or len(prompt) + num_codes > self.engine.max_length:
                pictures = self.engine.max_length // self.num_codes
                raise UserError(
                    f"the prompt has {len(prompt)} codes and {num_codes} are to be generated, but the context holds "
                    f"{self.engine.max_length}; give 1 to {pictures - 1} pictures in all (a pair has two), or raise "
                    "model.max_length"
                )
        self.engine.runner.reset_clock()
        self.resize(len(prompts))
        requests = [
            Request(ids=list(map(int, prompt)), options=options, seed=self.seed(options, number))
            for number, prompt in enumerate(prompts)
        ]
        slots = self.engine.complete(requests)
        for number, slot in enumerate(slots, 1):
            if slot.error:
                raise UserError(f"sequence {number} of {len(slots)}: {slot.error}")
        return [slot.new_ids for slot in slots]

    def encode(self, pictures: Sequence[ImageSource]) -> np.ndarray:
        """Returns the codes (N, P) int32 of pictures. Raises UserError if one cannot be read or encoded."""
        found = []
        for picture in pictures:
            pixels = self.processor.pixels(picture)
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            if digest not in self.cache:
                codes = self.engine.runner.run("vision", self.engine.vision, Tensor(pixels[None]))
                codes = codes.asnumpy()[0]
                if codes.min() < 0:
                    raise UserError(f"the encoder computes NaN or infinity for a picture; {NOT_FINITE}")
                self.cache[digest] = codes
                if len(self.cache) > MAX_CACHED_PICTURES:
                    self.cache.popitem(last=False)
            self.cache.move_to_end(digest)
            found.append(self.cache[digest])
        return np.array(found, np.int32).reshape(len(found), self.num_codes)

    def decode(self, codes: Sequence[Sequence[int]]) -> list[Image.Image]:
        """Returns the picture of each row of P codes.

        Raises:
            UserError: a row has another length, a code is out of range, or the decoder computes NaN or infinity.
        """
        pictures = []
        for row in codes:
            if np.ndim(row) != 1 or len(row) != self.num_codes:
                raise UserError(f"codes of a picture of shape {np.shape(row)}; expected ({self.num_codes},)")
            self.check_codes(row)
            codes_of_one = Tensor(np.array([row], np.int32))
            pixels = self.engine.runner.run("vision", self.picture_graph, codes_of_one).asnumpy()[0]
            if not np.isfinite(pixels).all():
                raise UserError(f"the decoder computes NaN or infinity for a picture; {NOT_FINITE}")
            pictures.append(self.processor.picture(pixels))
        return pictures

    def check_codes(self, codes: Sequence[int]) -> None:
        """Raises UserError if a code is no whole number or out of range."""
        vocab_size = self.engine.config.vocab_size
        for code in codes:
            if not isinstance(code, int | np.integer):
                raise UserError(f"code {code!r} is of type {type(code).__name__}; expected a whole number")
            if not 0 <= code < vocab_size:
                raise UserError(f"code {code} is out of range; expected 0 to {vocab_size - 1}")

    def picture_options(self, generation: dict, num_codes: int) -> GenerationConfig:
        """Returns the generation options. Raises UserError for one that would change the number of codes."""
        wrong = next((key for key in LENGTH_KEYS if key in generation), None)
        if wrong:
            raise UserError(f"{wrong} has no effect: a picture has {self.num_codes} codes; leave it out")
        return self.options({**generation, "max_new_tokens": num_codes})
