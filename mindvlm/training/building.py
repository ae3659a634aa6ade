"""The parts of a job from its config."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindvlm.api import read_config
from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.families import Family, get_family
from mindvlm.nn.lora import adapted_linears
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
from mindvlm.training.initial_weights import fill_weights, identify_weights
from mindvlm.training.job_file import lay_over
from mindvlm.training.lora import add_lora
from mindvlm.training.metrics_log import MetricsLog
from mindvlm.training.sources import DatasetsSource, PassInputs, RenderedTextSource, Share, Source
from mindvlm.training.state import DTYPE_NAMES, full_shape
from mindvlm.training.trainable import (
    check_optimizer_patterns,
    choose_trainable,
    require_something_trains,
    trainable_table,
)
from mindvlm.weights.lora.saving import AdapterFiles

Say = Callable[[str], None]


def read_model(config: TrainConfig) -> Any:
    """The config of the model to train, with the changes of the job.

    Raises:
        UserError: it cannot be read, is of another family than the job, or a change is impossible.
    """
    changes = dict(config.model_changes)
    tower = {"vision_tower": changes.pop("vision_tower")} if "vision_tower" in changes else {}
    if not all(isinstance(value, str) for value in tower.values()):
        raise UserError(f"model_changes.vision_tower is {tower['vision_tower']!r}; expected the folder of a tower")
    model = read_config(config.model_config, tower)
    if model.family != config.family:
        raise UserError(
            f"family is {config.family!r} but {config.model_config} is of the family {model.family!r}; "
            f"set family: {model.family}"
        )
    if not changes:
        return model
    path = Path(config.model_config)
    data = lay_over(asdict(model), changes)
    return get_family(config.family).parse_config(data, path / "config.json" if path.is_dir() else path)


def open_source(config: TrainConfig, model_config: Any, family: Family, mesh: Mesh, *, say: Say) -> Source:
    """Where the batches of this process come from. Raises UserError if the data cannot be used."""
    share = Share(shard=mesh.dp_rank, num_shards=mesh.dp, num_passes=config.num_passes)
    if config.rendered_text:
        make = (family.processor, model_config.processor)
        return RenderedTextSource(config.rendered_text, *make, seed=config.seed, share=share)
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


def build_model(
    config: TrainConfig, model_config: Any, family: Family, mesh: Mesh, dtype, *, is_new: bool, say: Say
) -> tuple[nn.Cell, ParallelModel]:
    """The model in training mode, divided, and with what trains chosen; the weights of a new run are filled.

    A run that goes on reads all weights from its checkpoint, one with adapters only these: its base is filled again.

    Raises:
        UserError: weights or sizes that cannot be used, or patterns that choose nothing.
    """
    model = family.model(model_config.model, dtype)
    divided = divide(model, mesh)
    made: set[str] = set()
    if is_new or config.lora:
        made = fill_weights(
            model, config.init, seed=config.seed, fit=family.make_fit(model_config), specs=divided.specs, say=say
        )
    patterns = {"lora.modules_to_save": config.lora.modules_to_save if config.lora else [], "train": config.train}
    choose_trainable(model, freeze=config.freeze, train=patterns, freezes_all=config.lora is not None)
    if config.lora:
        require_base_in_files(model, made)
        add_lora(model, config.lora, seed=config.seed, divided=divided, mesh=mesh)
    require_something_trains(model)
    check_optimizer_patterns(model, config.optimizer, say)
    model.stop_at_frozen_parts()
    for line in trainable_table(model, divided.specs):
        say(line)
    model.set_train()
    return model, divided


def require_base_in_files(model: nn.Cell, made: set[str]) -> None:
    """Raises UserError if an adapter would stand on weights that no file has.

    Args:
        made: names of parameters whose values are in no checkpoint.
    """
    lost = [name for name, parameter in model.parameters_and_names() if name in made and not parameter.requires_grad]
    if lost:
        raise UserError(
            f"lora: init.weights do not hold {lost[0]} as the model has it, and neither would the adapter"
            f"{f' ({len(lost)} such tensors)' if len(lost) > 1 else ''}; add it to lora.modules_to_save"
        )


def base_identity(config: TrainConfig) -> dict[str, str]:
    """What must be the same for a run with adapters to go on, as its checkpoints lack the base."""
    return {"base weights": identify_weights(config.init.weights)} if config.lora else {}


def adapter_files(model: nn.Cell, config: TrainConfig, divided: ParallelModel) -> AdapterFiles | None:
    """What writes the adapter of a run that trains one. Raises UserError if PEFT's layout cannot hold it."""
    if config.lora is None:
        return None
    adapted = list(adapted_linears(model))
    factors = {f"{name}.lora_{factor}" for name in adapted for factor in "AB"}
    base = {name: parameter for name, parameter in model.parameters_and_names() if name not in factors}
    infos = {
        name: TensorInfo(name, DTYPE_NAMES[parameter.dtype], full_shape(name, parameter, divided.specs))
        for name, parameter in base.items()
    }
    whole = [name for name, parameter in base.items() if parameter.requires_grad]
    lora = config.lora
    options = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
    return AdapterFiles(infos, adapted, whole, family=config.family, **options)


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
