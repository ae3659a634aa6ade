"""The parts of a job from its config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindvlm.errors import UserError
from mindvlm.families import Family
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import (
    DECODER,
    VISION_TRANSFORMER,
    VISION_VOCABULARY,
    ParallelModel,
    apply_tensor_parallel,
)
from mindvlm.training.config import TrainConfig
from mindvlm.training.evaluate import DatasetsEvaluator, Evaluator, RenderedTextEvaluator
from mindvlm.training.initial_weights import fill_weights
from mindvlm.training.metrics_log import MetricsLog
from mindvlm.training.sources import DatasetsSource, PassInputs, RenderedTextSource, Share, Source

Say = Callable[[str], None]


def open_source(config: TrainConfig, model_config: Any, family: Family, mesh: Mesh, *, say: Say) -> Source:
    """Where the batches of this process come from. Raises UserError if the data cannot be used."""
    share = Share(shard=mesh.dp_rank, num_shards=mesh.dp, num_passes=config.num_passes)
    if config.rendered_text:
        return RenderedTextSource(config.rendered_text, model_config.processor, seed=config.seed, share=share)
    if config.data.max_length > model_config.model.max_length:
        raise UserError(
            f"data.max_length is {config.data.max_length} but the model's max_length is "
            f"{model_config.model.max_length}; lower the first or raise the second"
        )
    name = "skipped.jsonl" if mesh.dp == 1 else f"skipped-{mesh.dp_rank}.jsonl"
    return DatasetsSource(
        config.data,
        family.processor,
        model_config.processor,
        seed=config.seed,
        share=share,
        # the ranks of one replica see the same samples; one of them lists them
        skip_list=Path(config.output_dir) / name if mesh.tp_rank == 0 else None,
        say=say,
    )


def divide(model: nn.Cell, mesh: Mesh) -> ParallelModel:
    """Divides the model over the tensor-parallel ranks. Raises UserError if a size cannot be divided."""
    return apply_tensor_parallel(model, DECODER + VISION_TRANSFORMER + VISION_VOCABULARY, mesh)


def start_weights(model: nn.Cell, config: TrainConfig, family: Family, specs: dict, *, say: Say) -> None:
    """First weights of a new run; see `fill_weights`."""
    fill_weights(model, config.init, seed=config.seed, fit=family.fit_pretrained, specs=specs, say=say)


def open_evaluator(
    config: TrainConfig, model_config: Any, family: Family, source: Source, model: nn.Cell, *, say: Say
) -> Evaluator | None:
    """What reads the held-out samples; None if there are none. Raises UserError if they cannot be used."""
    graph_mode = config.mode == "graph"
    if config.rendered_text:
        return RenderedTextEvaluator(source, model, graph_mode=graph_mode)
    if config.evaluation is None:
        return None
    return DatasetsEvaluator(
        config.evaluation,
        config.data,
        family.processor,
        model_config.processor,
        model,
        max_length=model_config.model.max_length,
        graph_mode=graph_mode,
        say=say,
    )


def open_metrics(config: TrainConfig, mesh: Mesh, *, step: int) -> MetricsLog | None:
    """The log of the first process; None in the others."""
    if not mesh.is_first:
        return None
    return MetricsLog(Path(config.output_dir), step=step, tensorboard=config.tensorboard)


def save_batch(folder: Path, step: int, passes: list[PassInputs], mesh: Mesh) -> Path:
    """Keeps the inputs of a step for inspection: arrays by name and pass, and where each row comes from."""
    rank = f"-rank-{mesh.rank}" if mesh.dp * mesh.tp > 1 else ""
    path = folder / f"nan-step-{step}{rank}.npz"
    arrays: dict[str, np.ndarray] = {}
    for number, one in enumerate(passes):
        arrays |= {
            f"{number}.input_ids": one.input_ids,
            f"{number}.labels": one.labels,
            f"{number}.sources": one.sources,
            f"{number}.origins": np.array(json.dumps(one.origins, ensure_ascii=False)),
        }
        arrays |= {f"{number}.pixels.{branch}": array for branch, array in enumerate(one.pixels)}
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room and start again") from None
    return path
