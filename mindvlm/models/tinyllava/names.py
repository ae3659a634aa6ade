"""TinyLLaVA with each of its decoders: Phi-2 (3.1B), StableLM-2 (2.0B), TinyLlama (1.5B, 1.4B in the `llava` layout).

A language model alone, as Microsoft, Stability AI and TinyLlama publish it, is the first part of such a model; so is a
tower, or a connector, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.convert.reference import tinyllava_layout
from mindvlm.convert.reference.tinyllava_form import bench_form
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.part_names import tables_of
from mindvlm.models.tinyllava.tower_folder import with_tower_config
from mindvlm.models.vary.tower_names import CLIP_FIELDS
from mindvlm.weights.config_json import FLAG, IMAGE_SIZE, NUM_LAYERS, SIZE, Layout, named_types, read_config
from mindvlm.weights.rules.table import RuleTable

Infos = dict[str, TensorInfo]

_FACTORY_TYPES = ("TinyLlavaForConditionalGeneration", "tinyllava")
_SIZES = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
_FIELDS = {**dict.fromkeys(_SIZES, SIZE), "num_hidden_layers": NUM_LAYERS}
_OPTIONAL = {
    **dict.fromkeys(("resampler_hidden_size", "num_queries"), SIZE),
    "num_resampler_layers": NUM_LAYERS,
    "use_qkv_bias": FLAG,
}
_TOWER_FIELDS = {**CLIP_FIELDS, "image_size": IMAGE_SIZE}
ROW_TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight", "language_model.lm_head.bias")
"""Tensors with a row for each token; the published files hold more rows than the tokenizer has tokens."""


@dataclass(frozen=True)
class TinyLlava:
    """A TinyLLaVA with one of the decoders; the attributes and methods are those of a `ConvertibleModel`."""

    name: str
    dialect: str
    model_types: tuple[str, ...]
    released_config: Callable[[], dict[str, Any]]

    @cached_property
    def tables(self) -> tuple[RuleTable, ...]:
        return tables_of(self.dialect, self.name)

    def infos_of_config(self, folder: Path) -> Infos | None:
        """Return the native tensors that the config.json in `folder` describes, or None if there is none, if it is of
        another model, or if no file says what the tower's sizes are.

        Raises:
            UserError: config.json names this model and does not describe it.
        """
        config = read_config(folder)
        if config is None or not set(named_types(config)) & set(self.model_types):
            return None
        try:
            form = bench_form(with_tower_config(config, folder), self.dialect)
            if "vision_config" not in form and form.get("mm_vision_tower"):
                return None
            Layout(self.name, self.model_types, _FIELDS, _OPTIONAL, {"vision_config": _TOWER_FIELDS}).check(form)
            return self.infos_of(form)
        except (ValueError, AttributeError, TypeError) as error:
            path = folder / "config.json"
            raise UserError(
                f"{path}: is no {self.name} config ({error}); move it away or give the folder of {self.name}"
            ) from None

    def infos_of(self, form: Mapping[str, Any]) -> Infos:
        """Return the native tensors of a config in TinyLLaVABench's form."""
        shapes = tinyllava_layout.parameter_shapes(form, self.dialect)
        bias = shapes.pop("lm_head.bias", None)
        infos = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
        native = dict(self.tables[1].plan(infos).infos)
        if bias:
            name = "language_model.lm_head.bias"
            native[name] = TensorInfo(name, "float32", bias)
        return native

    def released_infos(self) -> Infos:
        """Return the native tensors of the published model."""
        return self.infos_of(self.released_config())

    def example_infos(self) -> Infos:
        """Return the native tensors of a model whose numbers all differ, with every tower and connector; see
        `require_consistent_sizes`."""
        sizes = {
            "hidden_size": 202,
            "vocab_size": 997,
            "intermediate_size": 307,
            "num_attention_heads": 101,
            "num_key_value_heads": 67,
            "num_hidden_layers": 1,
            "use_qkv_bias": True,
            "head_bias": self.dialect == "phi",
            "mm_patch_merge_type": "spatial_unpad",
            "resampler_hidden_size": 241,
            "num_queries": 251,
            "num_resampler_layers": 1,
        }
        tower = {"hidden_size": 211, "intermediate_size": 223, "patch_size": 5, "image_size": [35, 55]}
        found: Infos = {}
        for kind, num_layers in (("siglip", 2), ("clip", 1)):
            sizes["vision_config"] = {**tower, "model_type": kind, "num_hidden_layers": num_layers}
            for connector in ("linear", "resampler", "mlp8x_gelu"):
                found |= self.infos_of({**sizes, "mm_projector_type": connector})
        return found


PHI = TinyLlava(
    "tinyllava_phi",
    "phi",
    ("TinyLlavaPhiForCausalLM", "tiny_llava_phi", "PhiForCausalLM", "phi", *_FACTORY_TYPES),
    tinyllava_layout.phi_config,
)
STABLELM = TinyLlava(
    "tinyllava_stablelm",
    "stablelm",
    (
        "TinyLlavaStablelmForCausalLM",
        "tiny_llava_stablelm",
        "StableLmForCausalLM",
        "StableLMEpochForCausalLM",
        "stablelm",
        "stablelm_epoch",
        *_FACTORY_TYPES,
    ),
    tinyllava_layout.stablelm_config,
)
LLAMA = TinyLlava(
    "tinyllava_llama",
    "llama",
    (
        "TinyLlavaLlamaForCausalLM",
        "tiny_llava",
        "LlavaForConditionalGeneration",
        "llava",
        "LlamaForCausalLM",
        "llama",
        *_FACTORY_TYPES,
    ),
    tinyllava_layout.llama_config,
)
KINDS = (PHI, STABLELM, LLAMA)
