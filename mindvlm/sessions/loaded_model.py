"""What the sessions of all families share: the model, its processor and engine, and generation options."""

import dataclasses
import logging
import warnings
from collections.abc import Callable

from mindvlm.core.config import GenerationConfig, Scope, build_config, nearest
from mindvlm.core.errors import UserError
from mindvlm.core.progress import progress_to
from mindvlm.generation.engine import Engine
from mindvlm.models.registry import get_family
from mindvlm.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

# A larger batch uses this many slots; a free slot takes the next request.
MAX_SLOTS = 16


class LoadedModel:
    """A loaded model with its processor. Base of the sessions.

    Methods accept the options of `GenerationConfig` as keyword arguments, which override the YAML.

    Attributes:
        other_arguments: names of arguments that most methods accept beside the options, for messages.
        load_seconds: time taken by loading.
        engine: generates ids for requests.
        mesh: the processes that share the weights; all of them must make the same calls.
    """

    other_arguments: tuple[str, ...] = ()

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

    @property
    def scope(self) -> Scope:
        """What the model is for: that of its YAML, else that of its family."""
        return self.config.scope or get_family(self.config.family).scope

    def log_compilation(self, stage: str) -> None:
        with progress_to(self.progress):
            logger.info(f"compiling the {stage} graph (once per shape)")

    def generation_config(self, overrides: dict) -> GenerationConfig:
        """Returns the generation section of the YAML with some keys replaced."""
        return build_config(GenerationConfig, {**dataclasses.asdict(self.config.generation), **overrides}, "generation")

    def resize(self, num_requests: int) -> None:
        """Gives the engine a slot for each request, but at least one and at most `MAX_SLOTS`."""
        self.engine.resize(max(1, min(num_requests, MAX_SLOTS)))

    def options(self, generation: dict) -> GenerationConfig:
        """Returns `generation_config` of keyword arguments and warns of options without effect."""
        known = [field.name for field in dataclasses.fields(GenerationConfig)]
        if unknown := next((key for key in generation if key not in known), None):
            hint = nearest(unknown, [*self.other_arguments, *known], "arguments")
            raise UserError(f"unknown argument '{unknown}'; {hint}")
        options = self.generation_config(generation)
        without_effect = [key for key in ("temperature", "top_k", "top_p") if key in generation]
        if without_effect and not options.do_sample:
            warnings.warn(f"{', '.join(without_effect)} without effect: do_sample is false", stacklevel=3)
        return options

    def seed(self, options: GenerationConfig, offset: int = 0) -> int:
        """Returns the seed of request number `offset`."""
        return (self.config.seed if options.seed is None else options.seed) + offset


def as_list(images) -> list:
    """Returns None, one picture or several pictures as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
