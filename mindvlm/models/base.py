"""The interface of a model family. Each `models/<family>/family.py` defines one `Family`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mindspore import nn

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.config import Scope
from mindvlm.core.runtime import BuildContext
from mindvlm.models.own_training import OwnTraining
from mindvlm.nn.memory import VisionMemory
from mindvlm.nn.resize_tables import keep_shape
from mindvlm.parallel.plan import Rule
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.code_processor import CodeProcessor
from mindvlm.weights.config_json import Config
from mindvlm.weights.recognise import ConvertibleModel, native_view
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.trained_parts import PartFiles

Infos = Mapping[str, TensorInfo]
FitTensor = Callable[..., np.ndarray]
"""(name, array, shapes, *, seed, description) -> the array adapted to the model's shape."""


@dataclass(frozen=True)
class InitialRule:
    """The initial values of parameters that no checkpoint contains.

    Attributes:
        pattern: regular expression searched in parameter names; the first matching rule applies.
        kind: "constant": all values are `scale`. Otherwise they are normal, and their standard deviation is `scale`
            ("absolute"), or `scale` over the root of the inputs of an output ("fan_in"), of a row's width ("width"), or
            of 2 (l + 1) in layer l, the first number in the name ("depth").
        scale: see `kind`.
        compute: returns the values for a shape, in place of `kind` and `scale`. No checkpoint has to contain them.
    """

    pattern: str
    kind: Literal["constant", "absolute", "fan_in", "width", "depth"] = "constant"
    scale: float = 0.0
    compute: Callable[[tuple[int, ...]], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. A part that is `None` is not supported.

    The run config is a subclass of `RunConfig` with `family`, `model` and `processor`.

    Attributes:
        name: the value of the YAML key `family`.
        parse_config: returns the run config of a YAML; called with (mapping, path of the file).
        build: builds the model Cell; called with (config.model, context).
        processor: converts pictures and text to model inputs; called with (config.processor).
        output: what the model generates: text, with a `ChatProcessor`, or codes of pictures, with a `CodeProcessor`.
        scope: what its models are for, unless their YAML says otherwise.
        models: the checkpoints that can be loaded and converted.
        vision_memory: estimates the memory that the towers need for one picture; called with (config.model,
            item_size, has_kernels).
        most_views: returns the number of views of the largest picture, for each kind of view; called with
            (config.processor). If None, a picture has one view.
        tensor_parallel: rules for the Cells that tensor parallelism divides; a rule may match nothing.
        make_fit: returns a function that adapts a pretrained tensor to the model's shape; called with the run config.
            If None, all tensors must have the shape of the model.
        initial_rules: initial values of weights; they take precedence over the general rules.
        renders_text: whether the family can train on text rendered on the fly. Its processor must have two stop ids,
            the end token and the padding token.
        owns_yaml: returns whether a YAML without the key `family` belongs to this family.
        read_folder: returns the run config of a published checkpoint folder; called with (folder, overrides).
        reads: returns whether a config.json belongs to this family; called with its contents when several families list
            its model type. A family without it reads the folders that no other family claims.
        sizes_remedy: returns a remedy for a folder whose tensors contradict its config.json; called with
            (run config, findings).
        view_with_parts: returns the native view of a checkpoint and of separate checkpoints of parts; called
            with (source, target_infos=..., **parts), where the parts are those of `separate_parts`.
        companions: returns name -> content of the files to write beside trained weights; called with the run config.
        part_files: the files of single parts that other programs read, written beside trained weights.
        training: how the family trains if its data are not annotated images; `None` trains on questions and answers.
    """

    name: str
    parse_config: Callable[[dict, Path], Any]
    build: Callable[[Any, BuildContext], nn.Cell]
    processor: Callable[[Any], ChatProcessor | CodeProcessor]
    models: Sequence[ConvertibleModel]
    output: Literal["text", "pictures"] = "text"
    scope: Scope = field(default_factory=Scope)
    vision_memory: Callable[[Any, int, bool], VisionMemory] | None = None
    most_views: Callable[[Any], tuple[int, ...]] | None = None
    tensor_parallel: tuple[Rule, ...] = ()
    make_fit: Callable[[Any], FitTensor] | None = None
    initial_rules: tuple[InitialRule, ...] = ()
    renders_text: bool = False
    owns_yaml: Callable[[dict], bool] | None = None
    read_folder: Callable[[Path, dict[str, Any]], Any] | None = None
    reads: Callable[[Config], bool] | None = None
    sizes_remedy: Callable[[Any, Collection[Finding]], str] | None = None
    view_with_parts: Callable[..., TensorSource] | None = None
    companions: Callable[[Any], dict[str, bytes]] | None = None
    part_files: PartFiles | None = None
    training: OwnTraining | None = None

    @property
    def separate_parts(self) -> tuple[str, ...]:
        """The keys of the run config that name checkpoints with parts of the model."""
        return tuple(dict.fromkeys(key for model in self.models for key in model.separate_parts))

    def fit(self, config: Any) -> FitTensor:
        """Returns the function that adapts a pretrained tensor to the model of a run config."""
        return self.make_fit(config) if self.make_fit else keep_shape

    def native_view(
        self, source: TensorSource, *, target_infos: Infos | None = None, **parts: TensorSource
    ) -> TensorSource:
        """Returns the tensors of a checkpoint under native names.

        Args:
            source: the checkpoint.
            target_infos: the tensors of the model; see `mindvlm.weights.recognise.native_view`.
            parts: separate checkpoints that replace parts of `source`, by the keys of `separate_parts`.

        Raises:
            ConversionError: the tensors do not match the model.
            UserError: the checkpoint belongs to another model.
        """
        if self.view_with_parts:
            return self.view_with_parts(source, target_infos=target_infos, **parts)
        return native_view(source, self.models, target_infos=target_infos)
