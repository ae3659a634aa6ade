"""Chat with a loaded model: single questions, batches, conversations."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig, build_config
from mindvlm.core.errors import UserError
from mindvlm.core.progress import progress_to
from mindvlm.generation.answer import Answer, AnswerStream, AnswerText, Turns
from mindvlm.generation.engine import Engine
from mindvlm.generation.images import ImageEncoder, ImageFeatures, concatenated
from mindvlm.generation.request import Request, Slot
from mindvlm.parallel.mesh import Mesh
from mindvlm.processing.chat_processor import ChatPrompt, History
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A larger batch uses this many slots; a free slot takes the next query.
MAX_SLOTS = 16


class LoadedModel:
    """A loaded model with its processor. Base of the sessions.

    Methods accept the options of `GenerationConfig` as keyword arguments, which override the YAML.

    Attributes:
        load_seconds: time taken by loading.
        engine: generates ids for requests.
        mesh: the processes that share the weights; all of them must make the same calls.
    """

    def __init__(
        self,
        model,
        processor,
        config,
        *,
        placeholder_id: int,
        progress: Callable[[str], None] | None = None,
        mesh: Mesh | None = None,
        cache_graphs: bool = False,
    ):
        self.model = model
        self.progress = progress
        self.processor = processor
        self.config = config
        self.mesh = mesh or Mesh()
        self.load_seconds = 0.0
        self.engine = Engine(
            model,
            placeholder_id=placeholder_id,
            max_length=config.model.max_length,
            graph_mode=config.mode == "graph",
            on_compile=self.log_compilation,
            cache_graphs=cache_graphs,
        )

    def log_compilation(self, stage: str) -> None:
        with progress_to(self.progress):
            logger.info(f"compiling the {stage} graph (once per shape)")

    def generation_config(self, overrides: dict) -> GenerationConfig:
        """Returns the generation section of the YAML with some keys replaced."""
        return build_config(GenerationConfig, {**dataclasses.asdict(self.config.generation), **overrides}, "generation")

    def options(self, generation: dict) -> GenerationConfig:
        """Returns `generation_config` and warns of options without effect."""
        options = self.generation_config(generation)
        without_effect = [key for key in ("temperature", "top_k", "top_p") if key in generation]
        if without_effect and not options.do_sample:
            warnings.warn(f"{', '.join(without_effect)} without effect: do_sample is false", stacklevel=3)
        return options

    def seed(self, options: GenerationConfig, offset: int = 0) -> int:
        """Returns the seed of the request with a number."""
        return (self.config.seed if options.seed is None else options.seed) + offset


class VisionLanguageModel(LoadedModel):
    """A model that answers with text, as returned by `mindvlm.load`.

    Attributes:
        encoder: encodes pictures and caches recent ones.
    """

    def __init__(self, model, processor, config, **options):
        placeholder_id = processor.tokenizer.special_id(processor.image_span.placeholder)
        super().__init__(model, processor, config, placeholder_id=placeholder_id, **options)
        self.encoder = ImageEncoder(self.engine)

    def chat(
        self, query: str, images=None, history: History | None = None, *, stream: bool = False, **generation
    ) -> Answer | AnswerStream:
        """Answers one turn of a conversation.

        Args:
            query: the question. `<image>` marks the place of a picture; without markers, pictures come first.
            images: a picture or a list of pictures (path, bytes, PIL image or array): all pictures of the conversation,
                in order.
            history: earlier turns as (query, reply), such as the `history` of the previous answer.
            stream: returns an iterator over pieces of text instead of the whole answer.

        Raises:
            UserError: a picture cannot be read, the numbers of pictures and markers differ, the prompt exceeds the
                context, or the model's logits contain NaN or infinity.
        """
        options, pictures = self.options(generation), self.pictures(images)
        self.engine.runner.reset_clock()
        ids, features = self.prepared(self.prompter(query, len(pictures), history), pictures)
        earlier = list(history or ())
        asked = self.processor.mark_images(query, len(pictures) - sum(turn.count("<image>") for turn, _ in earlier))
        self.engine.resize(1)
        result = self.start(ids, features, options, earlier=earlier, asked=asked)
        return result if stream else result.answer

    def generate(
        self, queries: str | Sequence[str], images=None, *, stream: bool = False, **generation
    ) -> Answer | AnswerStream | list[Answer]:
        """Answers one query, or a batch of independent queries.

        The answers of a batch equal those to single queries. With `do_sample`, every query draws its own random
        numbers: query n uses the seed plus n, so it equals the single query with that seed.

        Args:
            queries: one query, or a list of queries.
            images: as in `chat` for one query; for a list, one entry per query: a picture, a list of pictures or None.
            stream: as in `chat`, for one query only.

        Raises:
            UserError: as in `chat`, or the lists differ in length.
        """
        if isinstance(queries, str):
            return self.chat(queries, images, stream=stream, **generation)
        if stream:
            raise UserError("stream=True supports one query only; call generate for each query, or without stream")
        if not isinstance(images, list | tuple | None):
            raise UserError("images must be a list with one entry per query for a list of queries")
        images = [None] * len(queries) if images is None else images
        if not queries or len(images) != len(queries):
            raise UserError(f"{len(images)} image entries for {len(queries)} queries; give one entry per query")
        options, pictures = self.options(generation), [self.pictures(entry) for entry in images]
        self.engine.runner.reset_clock()
        asked = [self.processor.mark_images(query, len(row)) for query, row in zip(queries, pictures, strict=True)]
        prepared = [
            self.prepared(self.prompter(query, len(row)), row) for query, row in zip(queries, pictures, strict=True)
        ]
        texts = [self.new_text(options) for _ in queries]
        requests = [
            self.request(*inputs, options, text, seed_offset=number)
            for number, (inputs, text) in enumerate(zip(prepared, texts, strict=True))
        ]
        self.engine.resize(min(len(queries), MAX_SLOTS))
        slots = self.engine.complete(requests)
        for number, slot in enumerate(slots, 1):
            if slot.error:
                raise UserError(f"query {number} of {len(slots)}: {slot.error}")
        return [
            AnswerStream(self.engine, slot, text, earlier=[], asked=turn).close()
            for slot, text, turn in zip(slots, texts, asked, strict=True)
        ]

    def generate_each(
        self, queries: Iterable[tuple[str, object]], num_queries: int, **generation
    ) -> Iterator[tuple[int, Answer | UserError]]:
        """Answers many independent queries and yields each answer as soon as it ends, with the number of its query.

        The next query takes a slot as soon as it is free, and its pictures are read then. Answers equal those of
        `generate`.

        Args:
            queries: pairs of a query and its pictures, as in `chat`.
            num_queries: their number, which limits the slots.

        Yields:
            the number of a query and its answer, or the error that prevents it, such as a broken picture.
        """
        options = self.options(generation)
        self.engine.runner.reset_clock()
        self.engine.resize(max(1, min(num_queries, MAX_SLOTS)))
        waiting, running = enumerate(queries), {}
        try:
            while True:
                while None in self.engine.slots and (item := next(waiting, None)):
                    number, (query, images) = item
                    text = self.new_text(options)
                    try:
                        pictures = self.pictures(images)
                        asked = self.processor.mark_images(query, len(pictures))
                        inputs = self.prepared(self.prompter(query, len(pictures)), pictures)
                        slot = self.engine.add(self.request(*inputs, options, text, seed_offset=number))
                    except UserError as error:
                        yield number, error
                        continue
                    running[number] = AnswerStream(self.engine, slot, text, earlier=[], asked=asked)
                if not running:
                    return
                if not self.engine.step():
                    raise UserError("the answers were interrupted by another request to the model; read them first")
                for number in [number for number, stream in running.items() if stream.slot.stop_reason]:
                    stream = running.pop(number)
                    self.engine.release(stream.slot)
                    yield number, stream.slot.error or stream.close()
        finally:
            for stream in running.values():
                self.engine.release(stream.slot)

    def logits(self, query: str, images=None, history: History | None = None) -> np.ndarray:
        """Returns the logits (L, V) float32 at every position of the prompt of `chat`.

        Arguments and errors are those of `chat`.
        """
        pictures = self.pictures(images)
        ids, features = self.prepared(self.prompter(query, len(pictures), history), pictures)
        logits = self.engine.logits(np.array([ids], np.int32), features.rows)
        return logits[0].asnumpy().astype(np.float32)

    def encode_images(self, images) -> Tensor | None:
        """Returns the image features (N, T, hidden) of N pictures; None without pictures.

        A tiled picture has one entry for each of its views.
        """
        return concatenated(self.encoder.encode_views(picture) for picture in self.pictures(images))

    def pictures(self, images) -> list[Picture]:
        """Reads images; a `Picture` is returned unchanged. Raises UserError if an image cannot be read."""
        return [image if isinstance(image, Picture) else self.processor.picture(image) for image in as_list(images)]

    def prompter(
        self, query: str, num_images: int, history: History | None = None
    ) -> Callable[[Sequence[int]], ChatPrompt]:
        """Returns a function from the number of placeholders of each picture to the prompt."""
        return lambda counts: self.processor.prompt(query, num_images=num_images, history=history, image_lengths=counts)

    def prepared(
        self,
        prompter: Callable[[Sequence[int]], ChatPrompt],
        pictures: Sequence[Picture],
        *,
        prefix: Sequence[int] = (),
    ) -> tuple[list[int], ImageFeatures]:
        """Returns the ids of a prefix and prompt, and the features of the pictures.

        The number of feature rows may be known only after encoding, which may depend on the question.

        Raises:
            UserError: the prompt is invalid or exceeds the context.
        """
        counts = [len(picture.layout) for picture in pictures]
        ids = [*prefix, *prompter(counts).input_ids]
        self.engine.check_length(len(ids))
        text = [token for token in ids if token != self.engine.placeholder_id]
        features = self.encoder.encode(pictures, text)
        if features.counts != counts:
            ids = [*prefix, *prompter(features.counts).input_ids]
        return ids, features

    def new_text(self, options: GenerationConfig) -> AnswerText:
        """Returns the empty text of a new answer, with the stop rules of the template and the options."""
        stop_strings = (*self.processor.stop_strings, *options.stop_strings)
        return AnswerText(
            self.processor.stop_ids,
            stop_strings,
            self.processor.tokenizer.text_decoder(),
            max_repeated_tokens=options.max_repeated_tokens,
        )

    def request(
        self,
        ids: list[int],
        features: ImageFeatures,
        options: GenerationConfig,
        text: AnswerText,
        *,
        seed_offset: int = 0,
    ) -> Request:
        """A request whose answer goes to `text`."""
        seed = self.seed(options, seed_offset)
        return Request(ids=ids, features=features.rows, options=options, stop=text.reason_after, seed=seed)

    def start(
        self,
        ids: list[int],
        features: ImageFeatures,
        options: GenerationConfig,
        *,
        earlier: Turns,
        asked: str,
        slot: Slot | None = None,
        on_close: Callable[[Answer], None] | None = None,
    ) -> AnswerStream:
        """Starts an answer; arguments as in `AnswerStream` and `Engine.add`."""
        text = self.new_text(options)
        slot = self.engine.add(self.request(ids, features, options, text), slot=slot)
        return AnswerStream(self.engine, slot, text, earlier=earlier, asked=asked, on_close=on_close)


class Conversation:
    """A conversation with a model that prefills only new tokens.

    The keys and values of earlier turns stay in the engine's cache. The whole conversation is prefilled again if
    another request used the model in between, if the longer prompt has another dynamic NTK factor, or if the feature
    rows of its pictures depend on the text.
    """

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and pictures."""
        self.turns: Turns = []
        self.pictures: list[Picture] = []
        self.features = ImageFeatures()
        self.ids: list[int] = []
        self.slot: Slot | None = None
        self.answer_is_closed = False
        self.open_answer: AnswerStream | None = None

    def ask(self, query: str, images=None, *, stream: bool = False, **generation) -> Answer | AnswerStream:
        """Asks the next question; `images` are the new pictures.

        Other arguments and errors are those of `VisionLanguageModel.chat`. An error leaves the conversation unchanged.
        An earlier answer that was not read to its end is kept as far as it was generated.
        """
        if self.open_answer:
            self.open_answer.close()
        model, engine = self.model, self.model.engine
        options, pictures = model.options(generation), model.pictures(images)
        engine.runner.reset_clock()
        asked = model.processor.mark_images(query, len(pictures))
        seen = [*self.pictures, *pictures]
        chosen_anew = bool(seen) and model.model.rows_depend_on_text
        kept = ImageFeatures() if chosen_anew else self.features
        slot = None if self.slot is None or self.slot.is_released or chosen_anew else self.slot
        if slot:
            follow_up = partial(self.follow_up, query, len(pictures))
            ids, new_features = model.prepared(follow_up, pictures, prefix=self.ids)
        if not slot or engine.alpha_for(len(ids)) != slot.alpha:
            whole = partial(self.whole, query, kept.counts)
            ids, new_features = model.prepared(whole, seen if chosen_anew else pictures)
            engine.resize(1)
            slot = None
        earlier, features = (self.features, self.pictures), kept.followed_by(new_features)

        def take_over(answer: Answer) -> None:
            if self.open_answer is not result:
                return
            if result.slot.error:
                (self.features, self.pictures), self.open_answer = earlier, None
                engine.release(result.slot)
            else:
                self.take_over(ids, answer)

        result = model.start(ids, features, options, earlier=self.turns, asked=asked, slot=slot, on_close=take_over)
        self.features, self.pictures, self.slot, self.open_answer = features, seen, result.slot, result
        return result if stream else result.answer

    def follow_up(self, query: str, num_images: int, counts: Sequence[int]) -> ChatPrompt:
        """Returns the prompt after the earlier turns; `counts` are the placeholders of the new pictures."""
        return self.model.processor.follow_up(
            query, num_images=num_images, answer_is_closed=self.answer_is_closed, image_lengths=counts
        )

    def whole(self, query: str, earlier_counts: Sequence[int], counts: Sequence[int]) -> ChatPrompt:
        """Returns the prompt of the whole conversation.

        Args:
            query: the question.
            earlier_counts: placeholders of the first pictures.
            counts: placeholders of the other ones.
        """
        counts = [*earlier_counts, *counts]
        return self.model.processor.prompt(query, num_images=len(counts), history=self.turns, image_lengths=counts)

    def take_over(self, prompt: list[int], answer: Answer) -> None:
        """Adds a complete or interrupted answer to the conversation."""
        self.open_answer = None
        self.turns = answer.history
        processor = self.model.processor
        closing_mark = processor.tokenizer.special_ids.get(processor.template.answer_separator)
        ids, rest = answer.ids, []
        self.answer_is_closed = answer.stop_reason == "stop_token" and ids[-1] == closing_mark
        if answer.stop_reason == "stop_token" and not self.answer_is_closed:
            ids = ids[:-1]
        if answer.stop_reason == "stop_string":
            ids, rest = ids_of_text(answer.generated, ids, processor.tokenizer)
        # a generated placeholder has no picture and cannot be prefilled
        while ids and ids[-1] == self.model.engine.placeholder_id:
            ids = ids[:-1]
        self.ids = prompt + ids + rest


def ids_of_text(text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the longest prefix of the generated ids that `text` begins with, and the ids of the remaining text."""
    encoded = text.encode()
    for count in range(len(ids), 0, -1):
        head = tokenizer.decode_bytes(ids[:count], skip_special=True)
        rest = encoded[len(head) :].decode(errors="ignore")
        if encoded == head + rest.encode():
            return ids[:count], tokenizer.encode(rest)
    return [], tokenizer.encode(text)


def as_list(images) -> list:
    """Returns None, one picture or several pictures as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
