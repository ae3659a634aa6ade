"""Tensor names of TinyLLaVA with each of its decoders, Phi-2 (3.1B), StableLM-2 (2.0B) and TinyLlama (1.5B, and 1.4B in
the `llava` layout), in all published layouts.

The tables also match a single part: a language model as Microsoft, Stability AI and TinyLlama publish it, a tower, or a
connector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.hf.names import decoder_parts, renames, tower_parts, unchanged
from mindvlm.models.hf.tower_folder import BESIDE, with_tower_config
from mindvlm.models.tinyllava import released
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import MAX_MLP_LAYERS, TinyLlavaModelConfig, model_shapes
from mindvlm.weights.config_json import Config, ConfigTable, named_types, read_config
from mindvlm.weights.recognise import ConvertibleModel
from mindvlm.weights.rules.operations import Rename, Rule
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

Infos = dict[str, TensorInfo]

FAMILY = "tinyllava"
FACTORY, LLAVA = "TinyLLaVA Factory", "transformers llava"
ROW_TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight", "language_model.lm_head.bias")
"""Tensors with one row per token. Published files have more rows than the tokenizer has tokens."""

_LAYERS = "vision_tower.encoder.layers."
_SIGLIP_ONLY = "vision_tower.embeddings.patch_embedding.bias"
_DELETED = "SigLIP's last layer; TinyLLaVABench deletes it"
_FACTORY_TYPES = ("TinyLlavaForConditionalGeneration", "tinyllava")
_RESAMPLER = (
    "queries",
    *(f"resampler_blocks.{{}}.{norm}.{end}" for norm in ("norm_image", "norm_hidden") for end in ("weight", "bias")),
    *(f"resampler_blocks.{{}}.to_{name}.weight" for name in ("q", "k", "v", "out")),
    *(f"resampler_blocks.{{}}.feed_forward.{name}" for name in ("0.weight", "0.bias", "1.weight", "3.weight")),
    "post_norm.weight",
    "post_norm.bias",
    "final_proj.weight",
)


def connector_parts(
    prefix: str, layers: Mapping[str, str] | None = None, *, newline: str | None = None
) -> tuple[Part, ...]:
    """Returns the rules of all connector types. Each type is a part, and so is each Linear of an MLP.

    Args:
        prefix: prefix of the names, without the dot.
        layers: name -> native number of the Linears, for a layout that only has an MLP with named Linears.
        newline: name of the learned row that ends lines of feature rows, if the layout has one.
    """

    def part(name: str, rules: tuple[Rule, ...]) -> Part:
        return Part(name, rules, "projectors", choice="connector")

    if layers:
        return tuple(
            part(f"connector layer {new}", rename_all(f"{prefix}.{old}", f"mm_projector.{new}"))
            for old, new in layers.items()
        )
    numbers = range(0, 2 * MAX_MLP_LAYERS, 2)
    return (
        *(part(f"connector layer {i}", rename_all(f"{prefix}.{i}", f"mm_projector.{i}")) for i in numbers),
        part("linear connector", rename_all(prefix, "mm_projector")),
        part("resampler", renames(f"{prefix}.", "mm_projector.", unchanged(_RESAMPLER))),
        *((part("image newline", (Rename(newline, "image_newline"),)),) if newline else ()),
    )


def deleted_layer(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns the layer of the published SigLIP that a model with these native tensors lacks.

    The result maps the prefix of the layer's native names to the reason for its removal. It is empty if the tower is
    not SigLIP.
    """
    if _SIGLIP_ONLY not in infos:
        return {}
    numbers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in infos if name.startswith(_LAYERS)]
    return {f"{_LAYERS}{max(numbers, default=-1) + 1}.": _DELETED}


def config_naming(config: Config) -> str | None:
    """Returns the naming of the checkpoint beside a config.json, or None for TinyLLaVABench's."""
    if not isinstance(config.get("text_config"), Mapping):
        return None
    return LLAVA if config.get("model_type") == "llava" else FACTORY


def tables_of(dialect: str, name: str) -> tuple[RuleTable, ...]:
    """Returns the namings of a TinyLLaVA with this decoder: native, TinyLLaVABench's, then the others."""

    def table(title: str, *parts: Part) -> RuleTable:
        return RuleTable(title, FAMILY, parts, name)

    decoder = decoder_parts(dialect)
    inner = decoder_parts(dialect, "language_model.model.", "language_model.lm_head.", keeps_head_bias=True)
    # title -> decoder, prefix of the tower, connector
    layouts = {
        "Hugging Face": (
            decoder,
            "model.vision_tower.vision_tower.",
            connector_parts("model.mm_projector", newline="model.image_newline"),
        ),
        FACTORY: (
            inner,
            "vision_tower._vision_tower.",
            connector_parts("connector._connector", newline="image_newline"),
        ),
    }
    if dialect == "llama":
        mlp = {"linear_1": "0", "linear_2": "2"}
        text = decoder_parts(dialect, "model.language_model.")
        layouts[LLAVA] = (
            decoder_parts(dialect, "language_model.model.", "language_model.lm_head."),
            "vision_tower.",
            connector_parts("multi_modal_projector", mlp),
        )
        # what a model holds in memory since transformers 4.52: raw state dicts and adapters have these names
        layouts[f"{LLAVA} in memory"] = (
            text,
            "model.vision_tower.",
            connector_parts("model.multi_modal_projector", mlp),
        )
    # the sub-folders of a training's output; `open_checkpoint` puts their names before those of the tensors
    layouts[f"{FACTORY} in sub-folders"] = (inner, "vision_tower.", connector_parts("connector._connector"))
    # transformers 5 omits `vision_model.` in a tower's names
    tables = [
        table(before + title, *decoder, *tower_parts(tower, model=model), *connector)
        for before, model in (("", "vision_model."), ("transformers 5, ", ""))
        for title, (decoder, tower, connector) in layouts.items()
    ]
    return (
        next(table for table in tables if table.name == FACTORY).identity("native"),
        *tables,
        table("tower repository", *tower_parts("", drops_text=True)),
        table("transformers 5 tower", *tower_parts("", model="")),
        table("connector of TinyLLaVA Factory", *connector_parts("_connector")),
    )


@dataclass(frozen=True)
class TinyLlava:
    """A TinyLLaVA with one of the decoders. Attributes and methods match those of `ConvertibleModel`."""

    name: str
    dialect: str
    model_types: tuple[str, ...]
    released_config: Callable[[], dict[str, Any]]
    published: tuple[str, ...]

    @cached_property
    def tables(self) -> tuple[RuleTable, ...]:
        return tables_of(self.dialect, self.name)

    def infos_of_config(self, folder: Path) -> Infos | None:
        """Returns the native tensors of the config.json in `folder`.

        Returns None if the file is missing, describes another model, or if no file has the sizes of the tower.

        Raises:
            UserError: config.json names this model but has a wrong key or value.
        """
        config = read_config(folder)
        if config is None or not set(named_types(config)) & set(self.model_types):
            return None
        path = folder / "config.json"
        try:
            whole = with_tower_config(config, folder)
            if whole.get("vision_config") is None and whole.get("mm_vision_tower"):
                return None
            return infos_of(from_hf_config(whole, dialect=self.dialect, path=str(path), only_sizes=True))
        except UserError as error:
            raise ConfigTable(config, str(path)).other_model(self.name, error) from None

    def released_infos(self) -> Infos:
        """Returns the native tensors of the published model."""
        return infos_of(from_hf_config(self.released_config()))

    def example_infos(self) -> Infos:
        """Returns the tensors of all towers and connectors with distinct sizes; see `require_consistent_sizes`."""
        sizes = {
            "hidden_size": 240,
            "vocab_size": 997,
            "intermediate_size": 307,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_hidden_layers": 1,
            "use_qkv_bias": True,
            "mm_patch_merge_type": "spatial_unpad",
            "resampler_hidden_size": 252,
            "num_queries": 251,
            "num_resampler_layers": 1,
        }
        tower = {"hidden_size": 211, "intermediate_size": 223, "num_attention_heads": 1}
        tower |= {"patch_size": 5, "image_size": [35, 55]}
        found: Infos = {}
        for kind, num_layers in (("siglip", 2), ("clip", 1)):
            described = {"vision_config": {**tower, "model_type": kind, "num_hidden_layers": num_layers}}
            for connector in ("linear", "resampler", "mlp8x_gelu"):
                config = from_hf_config({**sizes, **described, "mm_projector_type": connector}, dialect=self.dialect)
                config.language_model.head_bias = self.dialect == "phi"
                found |= infos_of(config)
        return found


def infos_of(config: TinyLlavaModelConfig) -> Infos:
    """Returns the native tensors of a config."""
    return {name: TensorInfo(name, "float32", shape) for name, shape in model_shapes(config).items()}


PHI = TinyLlava(
    "tinyllava_phi",
    "phi",
    ("TinyLlavaPhiForCausalLM", "tiny_llava_phi", "PhiForCausalLM", "phi", *_FACTORY_TYPES),
    released.phi_config,
    ("bczhou/TinyLLaVA-3.1B",),
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
    released.stablelm_config,
    ("bczhou/TinyLLaVA-2.0B",),
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
    released.llama_config,
    ("bczhou/TinyLLaVA-1.5B", "bczhou/tiny-llava-v1-hf"),
)
KINDS = (PHI, STABLELM, LLAMA)

MODELS = tuple(
    ConvertibleModel(
        name=kind.name,
        family=FAMILY,
        tables=kind.tables,
        hf=kind.tables[1],
        hf_tables=kind.tables[1:],
        model_types=kind.model_types,
        target_infos=kind.infos_of_config,
        released_infos=kind.released_infos,
        released_config=kind.released_config,
        example_infos=kind.example_infos,
        published=kind.published,
        whole_config=with_tower_config,
        row_tables=ROW_TABLES,
        left_out=deleted_layer,
        config_naming=config_naming,
        separate_parts={"vision_tower": "a tower's weights in place of the checkpoint's"},
        companions=(BESIDE,),
    )
    for kind in KINDS
)
