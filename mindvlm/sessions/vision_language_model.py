"""Questions to a loaded model: single turns, batches, documents, logits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation.answer import Answer, AnswerStream, AnswerText, Turns
from mindvlm.generation.graphs import bucket_length, padded_ids
from mindvlm.generation.images import ImageEncoder, ImageFeatures
from mindvlm.generation.repetition import MAX_REPEATED_TOKENS_OF_PAGES
from mindvlm.generation.request import Request, Slot
from mindvlm.nn.rows import concatenated
from mindvlm.processing.chat_processor import ChatPrompt, History
from mindvlm.processing.images.documents import DEFAULT_DPI, DEFAULT_QUERY, as_ranges, open_document
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.images.sources import EncodedSource
from mindvlm.sessions.loaded_model import LoadedModel, as_list
from mindvlm.sessions.page_answer import PageAnswer, in_order


class VisionLanguageModel(LoadedModel):
    """A model that answers with text, as returned by `mindvlm.load`.

    Attributes:
        encoder: encodes pictures and caches recent ones.
    """

    other_arguments = ("images", "stream")

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
        asked = self.marked(query, len(pictures), earlier)
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
        self.resize(len(queries))
        slots = self.engine.complete(requests)
        for number, slot in enumerate(slots, 1):
            if slot.error:
                raise UserError(f"query {number} of {len(slots)}: {slot.error}")
        return [
            AnswerStream(self.engine, slot, text, earlier=[], asked=turn).close()
            for slot, text, turn in zip(slots, texts, asked, strict=True)
        ]

    def generate_each(
        self, queries: Iterable[tuple], num_queries: int, *, seed_step: int = 1, **generation
    ) -> Iterator[tuple[int, Answer | UserError]]:
        """Answers many independent queries and yields each answer as soon as it ends, with the number of its query.

        The next query takes a slot as soon as it is free, and its pictures are read then. Answers equal those of
        `generate`. Their `seconds` include work for other queries in the same time.

        Args:
            queries: pairs of a query and its pictures, or triples with the history, as in `chat`. The pictures may be a
                function that returns them.
            num_queries: their number, or a smaller number of slots.
            seed_step: with `do_sample`, query n uses the seed plus n times this; 0 for the answers of `chat`.

        Yields:
            the number of a query and its answer, or the error that prevents it, such as a broken picture.
        """
        options = self.options(generation)
        self.engine.runner.reset_clock()
        self.resize(num_queries)
        waiting, running = enumerate(queries), {}
        try:
            while True:
                while None in self.engine.slots and (item := next(waiting, None)):
                    number, (query, images, *rest) = item
                    history = list(rest[0] or ()) if rest else []
                    text, before = self.new_text(options), dict(self.engine.runner.seconds)
                    try:
                        pictures = self.pictures(images() if callable(images) else images)
                        asked = self.marked(query, len(pictures), history)
                        inputs = self.prepared(self.prompter(query, len(pictures), history), pictures)
                        request = self.request(*inputs, options, text, seed_offset=number * seed_step)
                        slot = self.engine.add(request)
                    except UserError as error:
                        yield number, error
                        continue
                    running[number] = AnswerStream(self.engine, slot, text, earlier=history, asked=asked), before
                if not running:
                    return
                if not self.engine.step():
                    raise UserError("the answers were interrupted by another request to the model; read them first")
                for number in [number for number, (stream, _) in running.items() if stream.slot.stop_reason]:
                    stream, before = running.pop(number)
                    self.engine.release(stream.slot)
                    answer = stream.close()
                    answer.seconds = {stage: end - before[stage] for stage, end in answer.seconds.items()}
                    yield number, stream.slot.error or answer
        finally:
            for stream, _ in running.values():
                self.engine.release(stream.slot)

    def read_document(
        self,
        source: EncodedSource,
        pages: str | Iterable[int] | None = None,
        *,
        query: str = DEFAULT_QUERY,
        dpi: int = DEFAULT_DPI,
        num_slots: int = 1,
        **generation,
    ) -> Iterator[PageAnswer]:
        """Asks about each page of a PDF, a TIFF file or a picture, and yields the answers in the order of the pages.

        Pages are rendered one at a time. A page that cannot be read costs only its own answer.

        Args:
            source: a path, a `file://` or data URL, bytes, or a file open for reading bytes.
            pages: numbers from 1, as a list or a text such as "1-3,7", each read once; None for all.
            query: the question about each page.
            dpi: resolution of the pages of a PDF.
            num_slots: number of pages that are answered together; answers do not depend on it.

        Raises:
            UserError: the document cannot be opened, or `pages`, `dpi` or a generation option is invalid.
        """
        options, ranges = self.page_options(generation), as_ranges(pages)
        self.generation_config(options)
        document = open_document(source, dpi=dpi, max_pixels=self.processor.max_pixels)
        numbers = document.selected(ranges)
        asked = ((query, partial(document.page, number)) for number in numbers)
        return in_order(numbers, self.generate_each(asked, num_slots, seed_step=0, **options), document)

    def page_options(self, generation: dict) -> dict:
        """Returns options with the limit of repeated tokens for pages, unless they or the YAML choose another."""
        if self.config.generation.max_repeated_tokens != GenerationConfig.max_repeated_tokens:
            return generation
        return {"max_repeated_tokens": MAX_REPEATED_TOKENS_OF_PAGES, **generation}

    def logits(self, query: str, images=None, history: History | None = None) -> np.ndarray:
        """Returns the logits (L, V) float32 at every position of the prompt of `chat`.

        Arguments and errors are those of `chat`.
        """
        pictures = self.pictures(images)
        ids, features = self.prepared(self.prompter(query, len(pictures), history), pictures)
        logits = self.engine.logits(np.array([ids], np.int32), features.rows)
        return logits[0].asnumpy().astype(np.float32)

    def reply_probabilities(
        self, query: str, reply: str, images=None, history: History | None = None
    ) -> tuple[np.ndarray, bool]:
        """Returns the natural logarithms of the probabilities of a reply's tokens, and whether each has the largest.

        The tokens (T,) are those of training, without the closing mark; the logarithms are float64. Other arguments
        and errors are those of `chat`.
        """
        pictures = self.pictures(images)
        prompter = self.prompter(query, len(pictures), history, reply)
        ids, features = self.prepared(prompter, pictures)
        num_tokens = prompter(features.counts).num_reply_tokens
        # causal attention never sees the padding, with which lengths share a graph
        padded = min(bucket_length(len(ids)), self.engine.max_length)
        if self.engine.alpha_for(padded) != self.engine.alpha_for(len(ids)):
            padded = len(ids)
        rows = self.engine.logits(padded_ids(ids, padded), features.rows)[0]
        logits = rows[len(ids) - num_tokens - 1 : len(ids) - 1].asnumpy().astype(np.float64)
        targets = np.array(ids[len(ids) - num_tokens :], int)
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = shifted[np.arange(num_tokens), targets] - np.log(np.exp(shifted).sum(-1))
        return chosen, bool((logits.argmax(-1) == targets).all())

    def encode_images(self, images) -> Tensor | None:
        """Returns the image features (N, T, hidden) of N pictures; None without pictures.

        A tiled picture has one entry for each of its views.
        """
        return concatenated(self.encoder.encode_views(self.pictures(images)))

    def pictures(self, images) -> list[Picture]:
        """Reads images; a `Picture` is returned unchanged. Raises UserError if an image cannot be read."""
        return [image if isinstance(image, Picture) else self.processor.picture(image) for image in as_list(images)]

    def marked(self, query: str, num_images: int, history: History) -> str:
        """Returns the query with a marker for each picture that the history does not use."""
        return self.processor.mark_images(query, num_images - sum(turn.count("<image>") for turn, _ in history))

    def prompter(
        self, query: str, num_images: int, history: History | None = None, reply: str | None = None
    ) -> Callable[[Sequence[int]], ChatPrompt]:
        """Returns a function from the number of placeholders of each picture to the prompt."""
        return lambda counts: self.processor.prompt(
            query, num_images=num_images, history=history, image_lengths=counts, reply=reply
        )

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
