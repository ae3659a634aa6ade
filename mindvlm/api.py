"""Loading a model: `load` returns a `VisionLanguageModel`, or a `PictureSequenceModel` if it generates pictures."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mindspore as ms

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.core.progress import progress_to, silence_progress
from mindvlm.generation import graph_cache
from mindvlm.models.loading import build_model, check_complete, open_weights
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.native.library import open_library
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.mesh import init_replicas, init_tensor_parallel
from mindvlm.parallel.sharding import ShardedSource
from mindvlm.sessions.picture_sequence_model import PictureSequenceModel
from mindvlm.sessions.vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)

SESSIONS = {"text": VisionLanguageModel, "pictures": PictureSequenceModel}


def load(
    config_path: str | Path | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    cache: bool = True,
    replicas: bool = False,
    **overrides,
) -> VisionLanguageModel | PictureSequenceModel:
    """Builds the model of a YAML or a checkpoint folder and loads its weights.

    Args:
        config_path: a YAML of this project or MindOCR's vary_toy.yaml; a published Hugging Face folder, or its
            config.json; None for the included Vary-nano.
        progress: called with one line before each slow step (converting, loading, compiling). The lines are also
            logged to the logger `mindvlm`.
        cache: whether compiled graphs, and weights with foreign names under native names, are cached in
            `mindvlm.core.caches.cache_folder()`.
        replicas: whether processes that `msrun` has started hold whole models, for different questions, instead of
            sharing the weights of one; `tensor_parallel` of the YAML then says how many processes share a model.
        overrides: top-level keys of the YAML, for example device="cpu", checkpoint="model.safetensors",
            adapter="folder" of a PEFT adapter to merge, or vision_tower="folder" of a tower's repository
            whose weights replace those of the checkpoint. On a CPU, weights="float32" gives a model with gradients; the
            kernels for other weights have none.

    Several processes that `msrun` has started share the weights: each reads and holds its part. All that share a model
    must make the same calls; `mesh.is_first` of the result says which one writes.

    Raises:
        UserError: the config, tokenizer, checkpoint or adapter is invalid; the message says how to fix it.
    """
    start = time.perf_counter()
    config_path = config_path or shipped_config_path()
    config = read_config(config_path, overrides)
    family = get_family(config.family)
    check_complete(config, family, origin=config_path)
    processor = family.processor(config.processor)
    context = runtime.start(config)
    context = replace(context, linear=context.linear + native_rules(config.weights, ms.get_context("device_target")))
    mesh = (init_replicas if replicas else init_tensor_parallel)(config.tensor_parallel)
    if not mesh.is_first:
        silence_progress()
    cache_graphs = graph_cache.is_on() and cache
    try:
        model, divided = build_model(family, config.model, context, mesh=mesh)
    except MemoryError:
        raise UserError(
            f"{config_path}: a model of these sizes does not fit into memory; correct them, or use a machine with more"
        ) from None
    if context.linear and (library := open_library()):
        use_native_cells(model, library)
    host, specs = HostGather(mesh), divided.specs
    parts = parameter_shapes(model)
    shapes = {name: specs[name].full_shape(shape) if name in specs else shape for name, shape in parts.items()}
    progress = progress if mesh.is_first else None
    if not mesh.is_first:
        # the first rank converts foreign weights and caches them for all
        host.wait()
    with progress_to(progress), open_weights(config, family, shapes, origin=config_path, cache=cache) as weights:
        if mesh.is_first:
            host.wait()
        fill_parameters(model, ShardedSource(weights, specs))
    loaded = SESSIONS[family.output](model, processor, config, progress=progress, mesh=mesh, cache_graphs=cache_graphs)
    loaded.load_seconds = time.perf_counter() - start
    return loaded


def shipped_config_path() -> Path:
    """Returns the path of Vary-nano's YAML: in the package for a wheel, in the root folder for a clone."""
    package = Path(__file__).parent
    inside = package / "configs/vary/vary_nano.yaml"
    return inside if inside.exists() else package.parent / "configs/vary/vary_nano.yaml"
