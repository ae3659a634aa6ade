"""The Python API: `load` gives a `VisionLanguageModel` that chats, generates, encodes images and scores tokens."""

import contextlib
import dataclasses
import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig, build_config, is_mindocr_config, read_yaml
from mindvlm.core.errors import UserError
from mindvlm.families import get_family
from mindvlm.generation.answer import Answer, AnswerStream
from mindvlm.generation.answers import Answers
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.generation.stopping import RowStop
from mindvlm.models.tinyllava.folder import folder_config, sizes_remedy
from mindvlm.processing.chat_processor import ChatPrompt
from mindvlm.processing.images.image_span import ImageRows, joined_rows
from mindvlm.processing.text.stream_decoder import StreamDecoder
from mindvlm.weights.cache import kept_weights
from mindvlm.weights.fill import fill_parameters, parameter_shapes
from mindvlm.weights.rules.findings import ConversionError

MAX_CACHED_IMAGES = 16
History = Sequence[tuple[str, str]]


def load(
    config_path: str | Path | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    cache: bool = True,
    **overrides,
) -> "VisionLanguageModel":
    """Builds the model that a YAML or a checkpoint folder describes and loads its weights.

    Args:
        config_path: a YAML of ours or MindOCR's vary_toy.yaml; or a Hugging Face folder of a TinyLLaVA with its
            config.json, or that file; None for the shipped Vary-nano.
        progress: called with one line before each slow step (converting, loading, compiling); None keeps silent.
        cache: keep weights that have foreign names, under native ones, in the folder of `weights_cache.cache_folder`,
            and read them from there the next time.
        overrides: top-level keys of the YAML, for example device="cpu", checkpoint="model.safetensors",
            adapter="folder" of a PEFT adapter, which is merged into the weights, or (TinyLLaVA) vision_tower="folder"
            of a tower's repository, whose weights are taken in the place of the checkpoint's tower.

    Raises:
        UserError: the config, the tokenizer file, the checkpoint or the adapter cannot be used; the message says how to
            mend it.
    """
    start = time.perf_counter()
    config_path = config_path or shipped_config_path()
    config = read_config(config_path, overrides)
    if not config.checkpoint:
        raise UserError(f"config {config_path} names no checkpoint; set checkpoint to a file of converted weights")
    family = get_family(config.family)
    processor = family.processor(config.processor)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(config.checkpoint))
        try:
            model = family.model(config.model, runtime.start(config))
        except MemoryError:
            sizes = f"{config_path}: a model of the sizes that it describes does not fit into memory"
            raise UserError(f"{sizes}; correct them, or take a machine with more memory") from None
        expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(model).items()}
        parts = {key: stack.enter_context(open_checkpoint(path)) for key, path in separate_parts(config).items()}
        try:
            weights = family.native_view(checkpoint, target_infos=expected, **parts)
        except ConversionError as error:
            if Path(config.checkpoint).is_dir():
                remedy = sizes_remedy(Path(config.checkpoint), overrides.get("vision_tower"), error.findings)
            else:
                remedy = f"correct the sizes in {config_path}, or take the weights that belong to it"
            raise UserError(f"{error}; {remedy}") from None
        if cache and weights.recipe:
            files = (file for source in (checkpoint, *parts.values()) for file in (source.path, *source.files))
            weights = stack.enter_context(kept_weights(weights, files, say=progress))
        if progress:
            sources = (str(weights.path), *separate_parts(config).values(), config.adapter)
            progress(f"loading {' with '.join(filter(None, sources))}")
        if config.adapter:
            weights = stack.enter_context(family.adapted_view(weights, config.adapter))
        fill_parameters(model, lambda name: weights.read(name).to_float32())
    loaded = VisionLanguageModel(model, processor, config, progress=progress)
    loaded.load_seconds = time.perf_counter() - start
    return loaded


def separate_parts(config) -> dict[str, str]:
    """Files or folders of parts whose weights are not taken from `config.checkpoint`, by their names in
    `Family.native_view`."""
    tower = getattr(config, "vision_tower", None)
    return {"tower": tower} if tower else {}


def read_config(config_path: str | Path, overrides: dict | None = None):
    """The family's typed config of a YAML or of a checkpoint folder, with top-level keys replaced by `overrides`.

    `vision_tower` among them is where a folder's tower is, see `folder_config`.
    """
    path = Path(config_path)
    path = path.parent if path.name == "config.json" else path
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in (overrides or {}).items()}
    if path.is_dir():
        return folder_config(path, overrides, tower=overrides.pop("vision_tower", None))
    data = {**read_yaml(path), **overrides}
    family = data.get("family", "vary" if is_mindocr_config(data) else None)
    return get_family(family).parse_config(data, path)


def shipped_config_path() -> Path:
    """Vary-nano's YAML: inside the package in a wheel, at the top of a clone."""
    package = Path(__file__).parent
    inside = package / "configs/vary/vary_nano.yaml"
    return inside if inside.exists() else package.parent / "configs/vary/vary_nano.yaml"


class VisionLanguageModel:
    """A loaded model with its processor. `load` makes one.

    Generation options are those of `GenerationConfig`; a method's keyword arguments override the YAML's.

    Attributes:
        load_seconds: time that loading took.
        engine: the compiled graphs, for those who build on them.
    """

    def __init__(self, model, processor, config, *, progress: Callable[[str], None] | None = None):
        self.model = model
        self.processor = processor
        self.config = config
        self.load_seconds = 0.0
        special = processor.tokenizer.special_id
        self.engine = Engine(
            model,
            placeholder_id=special(processor.image_span.placeholder),
            max_length=config.model.max_length,
            graph_mode=config.mode == "graph",
            on_compile=progress and (lambda stage: progress(f"compiling the {stage} graph (once per shape)")),
        )
        self.generator = Generator(self.engine)
        self.image_features: OrderedDict[str, Tensor] = OrderedDict()

    def chat(
        self, query: str, images=None, history: History | None = None, *, stream: bool = False, **generation
    ) -> Answer | AnswerStream:
        """One turn of a conversation.

        Args:
            query: the question; `<image>` in it marks the place of a picture, without a mark pictures come first.
            images: a picture or a list of them (path, bytes, PIL image, array): all of the conversation, in order.
            history: earlier turns as (query, reply), as the `history` of an earlier answer gives them.
            stream: an iterator of pieces of text instead of the whole.

        Raises:
            UserError: a picture cannot be used, pictures and marks differ in number, or the context is too short.
        """
        images = as_list(images)
        pictures = self.image_rows(images)
        prompt = self.prompt(query, pictures, history)
        num_earlier = sum(earlier.count("<image>") for earlier, _ in history or ())
        asked = self.processor.mark_images(query, len(images) - num_earlier)
        self.generation_config(generation)
        self.engine.check_length(len(prompt.input_ids))
        self.engine.reset_clock()
        features = self.encode_images(images)
        self.engine.reset(1)
        logits = self.engine.append([prompt.input_ids], features, self.order(pictures))
        answers = self.start_answers([prompt.input_ids], logits, generation, turns=[[*(history or ()), (asked, "")]])
        result = AnswerStream(answers.pieces(0), lambda: answers.answer(0))
        return result if stream else result.answer

    def generate(
        self, queries: str | Sequence[str], images=None, *, stream: bool = False, **generation
    ) -> Answer | AnswerStream | list[Answer]:
        """Answers to one query, or to a batch of independent ones computed together.

        Args:
            queries: a text, or a list of texts.
            images: for one text as in `chat`; for a list, one entry per text (a picture, a list of them, or None).
            stream: an iterator of pieces; for one text only.

        Raises:
            UserError: as in `chat`; or lists of different lengths.
        """
        if isinstance(queries, str):
            return self.chat(queries, images, stream=stream, **generation)
        if stream:
            raise UserError("stream=True works for one query; call generate once for each, or without stream")
        if not isinstance(images, list | tuple | None):
            raise UserError("images must be a list with one entry for each query when several queries are given")
        images = [None] * len(queries) if images is None else images
        if not queries or len(images) != len(queries):
            raise UserError(f"{len(images)} image entries for {len(queries)} queries; give one entry for each query")
        rows = [as_list(entry) for entry in images]
        pictures = [self.image_rows(row) for row in rows]
        prompts = [self.prompt(*row).input_ids for row in zip(queries, pictures, strict=True)]
        self.generation_config(generation)
        self.engine.check_length(max(map(len, prompts)))
        self.engine.reset_clock()
        features = self.encode_images([image for row in rows for image in row])
        self.engine.reset(len(prompts))
        logits = self.engine.append(prompts, features, self.order([one for row in pictures for one in row]))
        turns = [[(self.processor.mark_images(query, len(row)), "")] for query, row in zip(queries, rows, strict=True)]
        answers = self.start_answers(prompts, logits, generation, turns=turns)
        for _ in answers.steps:
            pass
        return [answers.answer(row) for row in range(len(prompts))]

    def encode_images(self, images) -> Tensor | None:
        """Image features (N, T, hidden) of N pictures, None for none; a picture that is cut into tiles has one entry
        for each of its views. Those of the last few views are kept."""
        rows = []
        for view in (view for image in as_list(images) for view in self.processor.views(image)):
            pixels = list(vars(view).values())
            digest = hashlib.sha256(b"".join(array.tobytes() for array in pixels)).hexdigest()
            if digest not in self.image_features:
                self.image_features[digest] = self.engine.encode_images(*(array[None] for array in pixels))
                if len(self.image_features) > MAX_CACHED_IMAGES:
                    self.image_features.popitem(last=False)
            self.image_features.move_to_end(digest)
            rows.append(self.image_features[digest])
        if not rows:
            return None
        return rows[0] if len(rows) == 1 else ops.concat(tuple(rows), 0)

    def logits(self, query: str, images=None, history: History | None = None) -> np.ndarray:
        """Logits (L, V) float32 at every position of the prompt that `chat` would use; same arguments and errors."""
        images = as_list(images)
        pictures = self.image_rows(images)
        input_ids = np.array([self.prompt(query, pictures, history).input_ids], np.int32)
        logits = self.engine.logits(input_ids, self.encode_images(images), self.order(pictures))
        return logits[0].asnumpy().astype(np.float32)

    def image_rows(self, images) -> list[ImageRows]:
        """The feature rows that stand for each picture; see `encode_images` for the rows."""
        return [self.processor.image_rows(image) for image in as_list(images)]

    def prompt(self, query: str, pictures: Sequence[ImageRows], history: History | None = None) -> ChatPrompt:
        """The prompt of a conversation with these pictures; errors as of `ChatProcessor.prompt`."""
        lengths = [len(picture.rows) for picture in pictures]
        return self.processor.prompt(query, num_images=len(pictures), history=history, image_lengths=lengths)

    def order(self, pictures: Sequence[ImageRows]) -> np.ndarray:
        """The feature row for each placeholder of these pictures."""
        return joined_rows(pictures, self.processor.image_span.num_tokens)

    def generation_config(self, overrides: dict) -> GenerationConfig:
        """The YAML's generation section with some keys replaced."""
        return build_config(GenerationConfig, {**dataclasses.asdict(self.config.generation), **overrides}, "generation")

    def start_answers(
        self, prompts: list[list[int]], logits: Tensor, generation: dict, *, turns: list[list[tuple[str, str]]]
    ) -> Answers:
        """Begins generation behind prompts that are in the KV cache; see `Answers`."""
        config = self.generation_config(generation)
        without_effect = [key for key in ("temperature", "top_k", "top_p") if key in generation]
        if without_effect and not config.do_sample:
            warnings.warn(f"{', '.join(without_effect)} without effect: do_sample is false", stacklevel=2)
        stop_strings = (*self.processor.stop_strings, *config.stop_strings)
        stops = [
            RowStop(self.processor.stop_ids, stop_strings, StreamDecoder(self.processor.tokenizer)) for _ in prompts
        ]
        seed = self.config.seed if config.seed is None else config.seed
        steps = self.generator.stream(prompts, logits, config, stops=stops, seed=seed)
        return Answers(self.engine, prompts, stops, steps, turns)


def as_list(images) -> list:
    """None, one picture or several as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
