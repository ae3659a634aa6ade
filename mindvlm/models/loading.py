"""Builds the model of a run config and opens its weights under their native names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspore import nn

from mindvlm.checkpoint import Checkpoint, TensorInfo, TensorSource, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.base import Family
from mindvlm.models.registry import require_downloaded
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.native_products import check_stored_blocks
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel, apply_tensor_parallel
from mindvlm.weights.cache import kept_weights
from mindvlm.weights.foreign import require_unquantized
from mindvlm.weights.lora.adapter import chosen_adapter
from mindvlm.weights.lora.merging import adapted_view, held_adapters
from mindvlm.weights.rules.findings import ConversionError

logger = logging.getLogger(__name__)


def build_model(
    family: Family, config: Any, context: BuildContext = EAGER_FLOAT32, *, mesh: Mesh | None = None
) -> tuple[nn.Cell, ParallelModel]:
    """Builds a model and applies the weight products of the context.

    Args:
        family: the family of the model.
        config: the `model` section of the run config.
        context: dtype, attention and products.
        mesh: the process mesh that divides the model; if None, the model is not divided.

    Returns:
        The model with unfilled weights, and its tensor-parallel division.

    Raises:
        UserError: the family does not support tensor parallelism, or a size is not divisible by the number of ranks.
    """
    model, divided = family.build(config, context), ParallelModel()
    if mesh:
        if mesh.tp > 1 and not family.tensor_parallel:
            raise UserError(
                f"a model of the family {family.name!r} cannot be divided over {mesh.tp} processes; use 1 (parallel.tp "
                "of a training job, tensor_parallel of a model)"
            )
        divided = apply_tensor_parallel(model, family.tensor_parallel, mesh)
        model.from_first_rank = HostGather(mesh).first
    choose_products(model, context.linear)
    return model, divided


@contextlib.contextmanager
def open_weights(
    config: Any,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    origin: str | Path,
    cache: bool = True,
) -> Iterator[TensorSource]:
    """Opens the checkpoint, the separate tower and the adapter of a run config as one source of native tensors.

    Args:
        config: the run config; `checkpoint` must be set.
        family: the family of the model.
        shapes: name -> shape of every parameter of the model.
        origin: name of the config in messages.
        cache: whether to keep converted weights for the next start; see `kept_weights`.

    Raises:
        UserError: the checkpoint, the tower or the adapter cannot be used; while reading, also NaN or infinity.
    """
    expected = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_config_checkpoint(config.checkpoint, require_finite=True, mapped=True))
        part_paths = separate_parts(config, family)
        parts = {
            key: stack.enter_context(open_checkpoint(path, require_finite=True, mapped=True))
            for key, path in part_paths.items()
        }
        try:
            weights = family.native_view(checkpoint, target_infos=expected, **parts)
        except ConversionError as error:
            if error.remedy:
                raise
            if Path(config.checkpoint).is_dir() and family.sizes_remedy:
                remedy = family.sizes_remedy(config, error.findings)
            else:
                remedy = f"correct the sizes in {origin}, or use the weights that match it"
            raise UserError(f"{error}; {remedy}") from None
        if cache and weights.recipe:
            files = (file for source in (checkpoint, *parts.values()) for file in (source.path, *source.files))
            weights = stack.enter_context(kept_weights(weights, files))
        adapter = chosen_adapter((checkpoint, *parts.values()), config.adapter)
        check_stored_blocks(config.weights, weights.infos.values(), checkpoint.path)
        logger.info(f"loading {' with '.join(map(str, filter(None, (weights.path, *part_paths.values(), adapter))))}")
        if adapter:
            require_unquantized(weights.infos, str(checkpoint.path), merges=adapter)
            held = held_adapters(checkpoint.metadata)
            weights = stack.enter_context(adapted_view(weights, adapter, family.models, held))
        yield weights


def check_complete(config: Any, family: Family, *, origin: str | Path) -> None:
    """Raises UserError if a run config lacks a checkpoint or a language model, or weights that it names do not exist.

    Args:
        origin: name of the config in messages.
    """
    if not config.checkpoint:
        raise UserError(f"config {origin} names no checkpoint; set checkpoint to a file of converted weights")
    if config.model.language_model is None:
        raise UserError(f"config {origin} describes no language_model, without which nothing is generated; add it")
    require_checkpoint(config.checkpoint)
    separate_parts(config, family)


def open_config_checkpoint(path: str, **options: bool) -> Checkpoint:
    """Opens the checkpoint of a run config; see `open_checkpoint`. Raises UserError if it cannot be read."""
    require_checkpoint(path)
    return open_checkpoint(path, **options)


def require_checkpoint(path: str) -> None:
    """Raises UserError if there is no checkpoint; the message says how to make it."""
    require_downloaded(Path(path))
    if not Path(path).exists():
        raise UserError(
            f"checkpoint {path}: no such file or folder; set the key checkpoint to the weights, or make this file of a "
            f"published folder: mindvlm-convert --torch_ckpt_path FOLDER --mindspore_ckpt_path {path}"
        )


def separate_parts(config: Any, family: Family) -> dict[str, str]:
    """Returns the paths of parts outside `config.checkpoint`, by their key. Raises UserError if one does not exist."""
    paths = {key: path for key in family.separate_parts if (path := getattr(config, key))}
    for key, path in paths.items():
        if not Path(path).exists():
            raise UserError(f"{key} {path}: no such file or folder; set {key} to the weights of that part")
    return paths
