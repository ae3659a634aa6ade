"""Builds the parts of a training job from its config."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError, counted
from mindvlm.core.runtime import BuildContext
from mindvlm.core.weight_formats import parse_weights
from mindvlm.models import loading
from mindvlm.models.base import Family
from mindvlm.models.own_training import Evaluator, PassInputs, TrainingData
from mindvlm.models.registry import get_family, separate_parts
from mindvlm.models.run_config import read_config
from mindvlm.nn.lora import adapted_linears
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.training.config import TrainConfig
from mindvlm.training.data import AnnotatedData
from mindvlm.training.datasets.loader import Share
from mindvlm.training.evaluate import DatasetsEvaluator, RenderedTextEvaluator
from mindvlm.training.initial_weights import fill_weights, identify_weights
from mindvlm.training.job_file import lay_over
from mindvlm.training.lora import add_lora
from mindvlm.training.metrics_log import MetricsLog
from mindvlm.training.rendered_batches import RenderedTextData
from mindvlm.training.run_tensors import DTYPE_NAMES, ParameterSource, full_shape
from mindvlm.training.trainable import (
    check_optimizer_patterns,
    choose_trainable,
    require_something_trains,
    trainable_table,
)
from mindvlm.weights.lora.saving import AdapterFiles
from mindvlm.weights.recognise import native_model
from mindvlm.weights.rules.findings import ConversionError

logger = logging.getLogger(__name__)


def read_model(config: TrainConfig) -> Any:
    """Reads the config of the model to train and applies the changes of the job.

    Raises:
        UserError: the config cannot be read, has another family than the job or one that cannot train, or a change is
            invalid, or it rounds the weights.
    """
    changes = dict(config.model_changes)
    parts = {key: changes.pop(key) for key in separate_parts() if key in changes}
    for key, part in parts.items():
        if not isinstance(part, str):
            raise UserError(f"model_changes.{key} is {part!r}; expected the folder of a {key.rpartition('_')[2]}")
    model = read_config(config.model_config, parts)
    if config.family not in (None, model.family):
        raise UserError(
            f"family is {config.family!r} but {config.model_config} is of the family {model.family!r}; "
            f"set family: {model.family}"
        )
    family = get_family(model.family)
    if (output := family.output) != "text" and family.training is None:
        raise UserError(f"model_config {config.model_config}: generates {output}; only models that answer can train")
    if family.training and config.lora:
        raise UserError(f"lora: no file format holds adapters of the family {family.name!r}; remove the section")
    if changes:
        path = Path(config.model_config)
        data = lay_over(asdict(model), changes)
        model = family.parse_config(data, path / "config.json" if path.is_dir() else path)
    if set(parse_weights(model.weights).values()) - {"auto", "float32"}:
        raise UserError(
            f"model_config {config.model_config}: weights is {model.weights!r}, but a training job holds all weights "
            "in dtype; set model_changes: {weights: auto}"
        )
    return model


def open_data(config: TrainConfig, model_config: Any, family: Family, mesh: Mesh) -> TrainingData:
    """Opens the batches of this process. Raises UserError if the data cannot be used."""
    share = Share(shard=mesh.dp_rank, num_shards=mesh.dp, num_passes=config.num_passes)
    if config.rendered_text and not family.renders_text:
        raise UserError(f"rendered_text has no form for the family {family.name!r}; give the section 'data'")
    if config.rendered_text:
        make = (family.processor, model_config.processor)
        return RenderedTextData(config.rendered_text, *make, seed=config.seed, share=share)
    if family.training:
        return family.training.open_data(config.data, model_config, seed=config.seed, share=share)
    if config.data.max_length > model_config.model.max_length:
        raise UserError(
            f"data.max_length is {config.data.max_length} but the model's max_length is "
            f"{model_config.model.max_length}; lower the first or raise the second"
        )
    name = "skipped.jsonl" if mesh.dp == 1 else f"skipped-{mesh.dp_rank}.jsonl"
    return AnnotatedData(
        config.data,
        family.processor,
        model_config.processor,
        seed=config.seed,
        share=share,
        # the ranks of one replica see the same samples; only one writes the skip list
        skip_list=Path(config.output_dir) / name if mesh.tp_rank == 0 else None,
    )


def build_model(
    config: TrainConfig, model_config: Any, family: Family, mesh: Mesh, context: BuildContext, *, is_new: bool
) -> tuple[nn.Cell, ParallelModel]:
    """Builds the model in training mode, divides it, selects what trains, and fills the weights of a new run.

    A resumed run reads all weights from its checkpoint; with adapters it reads only these and fills the base again.

    Raises:
        UserError: weights or sizes cannot be used, or a pattern matches nothing.
    """
    model, divided = loading.build_model(family, model_config.model, context, mesh=mesh)
    require_loadable(model, family, config.model_config)
    made: set[str] = set()
    if is_new or config.lora:
        made = fill_weights(
            model,
            config.init,
            seed=config.seed,
            fit=family.fit(model_config),
            rules=family.initial_rules,
            specs=divided.specs,
            part_files=family.part_files,
        )
        warn_of_random_constants(model, made)
    choose_trained(model, config)
    if config.lora:
        require_base_in_files(model, made)
        add_lora(model, config.lora, seed=config.seed, divided=divided, mesh=mesh)
    require_something_trains(model)
    check_optimizer_patterns(model, config.optimizer)
    model.stop_at_frozen_parts()
    for line in trainable_table(model, divided.specs):
        logger.info(line)
    model.set_train()
    return model, divided


def trained_cell(
    config: TrainConfig, model_config: Any, family: Family, model: nn.Cell, context: BuildContext
) -> nn.Cell:
    """Returns the Cell to train, in training mode: the model, or what its family makes of it.

    Raises:
        UserError: the family cannot train the model with these sections, or with `recompute`.
    """
    if family.training is None or family.training.make_trained is None:
        return model
    sections = {"data": config.data, **config.own_sections}
    cell = family.training.make_trained(model, model_config, sections, context)
    if cell is not model and config.recompute:
        raise UserError(f"recompute is true, but a {type(cell).__name__} cannot recompute its blocks; set it to false")
    return cell


def warn_of_random_constants(model: nn.Cell, made: set[str]) -> None:
    """Logs a warning if parameters that never train have random values; see `build_model`."""
    constant = {id(parameter) for parameter in model.constant_parameters}
    lost = [name for name, parameter in model.parameters_and_names() if id(parameter) in constant and name in made]
    if lost:
        logger.warning(
            f"{counted(len(lost), 'tensor')} such as {lost[0]} have random values and never train; add the weights of "
            "that part to init.weights"
        )


def choose_trained(model: nn.Cell, config: TrainConfig) -> None:
    """Selects the trained parameters of a job before adapters are added; see `choose_trainable`."""
    patterns = {"lora.modules_to_save": config.lora.modules_to_save if config.lora else [], "train": config.train}
    choose_trainable(model, freeze=config.freeze, train=patterns, freezes_all=config.lora is not None)


def require_loadable(model: nn.Cell, family: Family, origin: str) -> None:
    """Raises UserError if a checkpoint of the model could not be loaded, because no layout has all its tensors."""
    source = ParameterSource(dict(model.parameters_and_names()))
    try:
        family.native_view(source, target_infos=source.infos)
    except UserError as error:
        reason = f"{error.rows[0].status} {error.rows[0].label}" if isinstance(error, ConversionError) else str(error)
        raise UserError(
            f"{origin}: checkpoints of this model could not be loaded, because no {family.name} model has this form "
            f"({reason}); correct model.language_model, such as tie_word_embeddings"
        ) from None


def require_base_in_files(model: nn.Cell, made: set[str]) -> None:
    """Raises UserError if the base of an adapter has weights that no file contains.

    Args:
        made: names of parameters whose values are in no checkpoint.
    """
    # the adapter saves whole modules
    saved = {parameter.name.rpartition(".")[0] for parameter in model.trainable_params()}
    frozen = (name for name, parameter in model.parameters_and_names() if not parameter.requires_grad)
    lost = [name for name in frozen if name in made and name.rpartition(".")[0] not in saved]
    if lost:
        raise UserError(
            f"lora: init.weights do not have {lost[0]} in the model's form, and the adapter would not save it"
            f"{f' ({len(lost)} such tensors)' if len(lost) > 1 else ''}; add it to lora.modules_to_save"
        )


def frozen_identity(config: TrainConfig, model_config: Any, family: Family) -> dict[str, str]:
    """Returns the identity of the weights that no checkpoint of the run has; resuming checks it.

    These are the base weights of adapters, and weights that the family adds to the model.

    Raises:
        UserError: they cannot be used, or are those of this run.
    """
    identity = {"base weights": identify_weights(config.init.weights)} if config.lora else {}
    if family.training and family.training.frozen_weights:
        sections = {"data": config.data, **config.own_sections}
        for what, path in family.training.frozen_weights(model_config, sections).items():
            if Path(path).resolve().is_relative_to(Path(config.output_dir).resolve()):
                raise UserError(
                    f"{what} {path}: lies in output_dir {config.output_dir}, to which this job writes; choose another "
                    "output_dir, or other weights"
                )
            try:
                identity[what] = identify_weights([path])
            except UserError as error:
                raise UserError(f"{what}: {error}") from None
    return identity


def adapter_files(model: nn.Cell, config: TrainConfig, family: Family, divided: ParallelModel) -> AdapterFiles | None:
    """Returns the writer of the run's adapter, if any. Raises UserError if PEFT's layout cannot represent it."""
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
    return AdapterFiles(native_model(infos, family.models), infos, adapted, whole, **options)


def open_evaluator(
    config: TrainConfig, model_config: Any, family: Family, data: TrainingData, model: nn.Cell
) -> Evaluator | None:
    """Returns the evaluator of held-out samples; None without any. Raises UserError if they cannot be used."""
    graph_mode = config.mode == "graph"
    if config.rendered_text:
        return RenderedTextEvaluator(data, model, graph_mode=graph_mode)
    if config.evaluation is None:
        return None
    if family.training:
        sections = (config.evaluation, config.data)
        return family.training.open_evaluator(*sections, model_config, model, graph_mode=graph_mode)
    return DatasetsEvaluator(
        config.evaluation,
        config.data,
        family.processor,
        model_config.processor,
        model,
        max_length=model_config.model.max_length,
        graph_mode=graph_mode,
    )


def open_metrics(config: TrainConfig, mesh: Mesh, *, step: int) -> MetricsLog | None:
    """Opens the metrics log in the first process; returns None in the others."""
    if not mesh.is_first:
        return None
    return MetricsLog(Path(config.output_dir), step=step, tensorboard=config.tensorboard)


def save_batch(folder: Path, step: int, passes: list[PassInputs], mesh: Mesh) -> Path:
    """Saves the inputs of a step for inspection: arrays by name and pass, and the origin of each row."""
    rank = f"-rank-{mesh.rank}" if mesh.dp * mesh.tp > 1 else ""
    path = folder / f"nan-step-{step}{rank}.npz"
    arrays: dict[str, np.ndarray] = {}
    for number, one in enumerate(passes):
        arrays |= {f"{number}.{name}": array for name, array in one.arrays.items()}
        arrays[f"{number}.origins"] = np.array(json.dumps(one.origins, ensure_ascii=False))
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free disk space and start again") from None
    return path
