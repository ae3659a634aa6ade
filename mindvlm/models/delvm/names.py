"""Tensor names of DeLVM: the Hugging Face form, the training form and the VQGAN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.checkpoint_config import (
    MODEL_TYPES,
    VIT_TYPES,
    VQGAN_CLASS,
    from_published,
    is_vit,
    read_published,
    vqgan_keys,
    whole_config,
)
from mindvlm.models.delvm.forms import hf_form, training_form
from mindvlm.models.delvm.model_config import DelvmModelConfig, model_shapes
from mindvlm.models.hf.names import renames, unchanged, with_parameters
from mindvlm.weights.buffers import COMPUTED
from mindvlm.weights.config_json import ConfigTable
from mindvlm.weights.recognise import ConvertibleModel, Form
from mindvlm.weights.rules.operations import Drop, Rename, Rule, Split
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

Infos = dict[str, TensorInfo]

FAMILY = "delvm"
NATIVE = "language_model."
VQGAN_PART = "vqgan"
NATIVE_TABLE = f"{NATIVE}embed_tokens.weight"
NATIVE_PROJECTION = f"{NATIVE}embed_tokens.projection.weight"
_INPUT = "input embedding"
_HF_ATTENTION = unchanged(f"self_attn.{name}_proj" for name in "qkvo")
_HF_NORMS = unchanged(("input_layernorm", "post_attention_layernorm"))
_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_HF_GATED = unchanged(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
_GATED = {
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.up_proj.weight",
    "mlp.w3.weight": "mlp.down_proj.weight",
}
_PLAIN = unchanged(("mlp.fc1.weight", "mlp.fc2.weight"))
_PLAIN_BIASES = unchanged(("mlp.fc1.bias", "mlp.fc2.bias"))
_OPEN = tuple(f"encoder.{name}.*" for name in ("down", "mid")) + tuple(f"decoder.{name}.*" for name in ("up", "mid"))
_CLOSED = (
    *(f"{half}coder.{name}" for half in ("en", "de") for name in ("conv_in", "norm_out", "conv_out")),
    *("quant_conv", "post_quant_conv"),
)


@dataclass(frozen=True)
class Kind:
    """A kind of decoder, with its model's name on the command line."""

    name: str
    vit: bool


KINDS = (Kind("delvm", vit=False), Kind("delvm_vit", vit=True))


def vqgan_part(prefix: str) -> Part:
    """Returns the rules of the VQGAN, whose levels and blocks follow from its config."""
    rules = [Rename(f"{prefix}{name}", f"vqgan.{name}") for name in (*_OPEN, "quantize.embedding.weight")]
    return Part("VQGAN", (*rules, *renames(prefix, "vqgan.", with_parameters(unchanged(_CLOSED)))), VQGAN_PART)


def decoder_parts(kind: Kind, layer: str, layers: list[Rule], ends: dict[str, str], mlp: dict[str, str]) -> list[Part]:
    """Returns the rules of the decoder without its input embedding.

    Args:
        kind: the decoder.
        layer: prefix of a layer.
        layers: rules of the attention and of dropped tensors.
        ends: names of the norms of a layer, and of the last norm and the head under "norm" and "head".
        mlp: names inside the MLP.
    """
    target = f"{NATIVE}layers.{{}}."
    norms = {f"{layer}{ends['norm1']}": f"{target}input_layernorm", ends["norm"]: f"{NATIVE}norm"}
    norms[f"{layer}{ends['norm2']}"] = f"{target}post_attention_layernorm"
    rules = [*layers, *renames(layer, target, _PLAIN if kind.vit else mlp)]
    rules += [Rename(f"{source}.weight", f"{name}.weight") for source, name in norms.items()]
    rules.append(Rename(ends["head"], f"{NATIVE}lm_head.weight"))
    optional = {"norm biases": tuple(Rename(f"{source}.bias", f"{name}.bias") for source, name in norms.items())}
    if kind.vit:
        optional["MLP biases"] = tuple(renames(layer, target, _PLAIN_BIASES))
    whole = Part("language model", tuple(rules), "language_model")
    return [whole, *(Part(name, rows, "language_model", choice=whole.name) for name, rows in optional.items())]


def input_part(source: str, target: str) -> Part:
    name = "token embeddings" if target == NATIVE_TABLE else "embedding projection"
    return Part(name, (Rename(source, target),), "language_model", choice=_INPUT)


def hf_table(kind: Kind) -> RuleTable:
    layer = "model.layers.{}."
    attention: list[Rule] = [*renames(layer, f"{NATIVE}layers.{{}}.", with_parameters(_HF_ATTENTION))]
    attention.append(Drop(f"{layer}self_attn.rotary_emb.inv_freq", COMPUTED))
    ends = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    ends |= {"norm": "model.norm", "head": "lm_head.weight"}
    parts = decoder_parts(kind, layer, attention, ends, _HF_GATED)
    embedding = input_part("model.embed_tokens.weight", NATIVE_TABLE)
    return RuleTable("Hugging Face", FAMILY, (embedding, *parts), kind.name)


def training_table(kind: Kind, prefix: str) -> RuleTable:
    layer, target = f"{prefix}blocks.{{}}.", f"{NATIVE}layers.{{}}.self_attn."
    attention: list[Rule] = [
        Split(f"{layer}mixer.Wqkv.{end}", tuple(f"{target}{name}_proj.{end}" for name in "qkv"))
        for end in ("weight", "bias")
    ]
    attention += rename_all(f"{layer}mixer.out_proj", f"{target}o_proj")
    attention.append(Drop(f"{layer}mixer.rotary_emb.inv_freq", COMPUTED))
    ends = {"norm1": "norm1", "norm2": "norm2", "norm": f"{prefix}norm", "head": f"{prefix}head.weight"}
    parts = decoder_parts(kind, layer, attention, ends, _GATED)
    embedding = input_part(f"{prefix}embedding.embed_proj.weight", NATIVE_PROJECTION)
    vqgan = vqgan_part(f"{prefix}embedding.vq_model.")
    return RuleTable(
        "InternLM" if prefix else "InternLM without its wrapper", FAMILY, (vqgan, embedding, *parts), kind.name
    )


def native_table(hf: RuleTable) -> RuleTable:
    """Returns the table of native names: those of the Hugging Face form, the projection and the VQGAN."""
    projection = input_part(NATIVE_PROJECTION, NATIVE_PROJECTION)
    whole = RuleTable("", FAMILY, (vqgan_part(""), *hf.parts, projection), hf.model)
    return whole.identity("native")


MUSE = "openMUSE"


def infos_of(config: DelvmModelConfig) -> Infos:
    """Returns the native tensors of a config."""
    return {name: TensorInfo(name, "float32", shape) for name, shape in model_shapes(config).items()}


def implied_infos(infos: Mapping[str, TensorInfo], origin: str) -> Infos:
    """Returns the native tensors of the VQGAN in `infos`, from the sizes of some; none without one.

    Raises:
        UserError: the tensors do not show the sizes of a VQGAN.
    """
    prefix = f"{VQGAN_PART}."
    vqgan = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    return infos_of(from_published({**vqgan_keys(vqgan, origin), "_class_name": VQGAN_CLASS})) if vqgan else {}


def infos_of_folder(folder: Path, kind: Kind) -> Infos | None:
    """Returns the native tensors that the files of `folder` describe, or None if they describe another model.

    Raises:
        UserError: a file names this model but has a wrong key or value.
    """
    config = read_published(folder)
    is_decoder = config is not None and "_class_name" not in config
    if config is None or is_decoder and is_vit(config) != kind.vit:
        return None
    path = str(folder / "config.json")
    try:
        return infos_of(from_published(config, path=path, only_sizes=True))
    except UserError as error:
        raise ConfigTable(config, path).other_model(kind.name, error) from None


def released_config(kind: Kind) -> dict[str, Any]:
    """Returns the config of LLaMA-300m-hf with the VQGAN that it was trained with."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 8, "bias": True}
    sizes |= {"vocab_size": 8192, "max_position_embeddings": 2048, "architectures": [MODEL_TYPES[0]], "vq_config": {}}
    sizes["vq_config"] = {"channel_mult": [1, 2, 2, 4, 6], "attn_resolutions": [], "no_attn_mid_block": True}
    sizes["vq_config"] |= {"z_channels": 64, "num_embeddings": 8192, "quantized_embed_dim": 64}
    if kind.vit:
        return sizes | {"model_type": VIT_TYPES[0], "intermediate_size": 4096, "norm_eps": 1e-6}
    return sizes | {"model_type": MODEL_TYPES[1], "intermediate_size": 2816, "rms_norm_eps": 1e-6}


def example_infos(kind: Kind) -> Infos:
    """Returns the tensors of a model whose sizes all differ; see `require_consistent_sizes`."""
    vqgan = {"hidden_channels": 32, "channel_mult": [3, 5], "z_channels": 41, "attn_resolutions": []}
    vqgan |= {"num_embeddings": 997, "quantized_embed_dim": 37}
    sizes = {"hidden_size": 202, "intermediate_size": 307, "num_attention_heads": 1, "num_hidden_layers": 1}
    sizes |= {"vocab_size": 997, "mlp_bias": True, "vq_config": vqgan, "model_type": VIT_TYPES[0] if kind.vit else ""}
    table = from_published(sizes, only_sizes=True)
    table.input_embedding = "codebook"
    return {NATIVE_TABLE: TensorInfo(NATIVE_TABLE, "float32", (997, 202))} | infos_of(table)


def model_of(kind: Kind) -> ConvertibleModel:
    hf, training = hf_table(kind), training_table(kind, "model.")
    muse = RuleTable(MUSE, FAMILY, (vqgan_part(""),), kind.name)
    return ConvertibleModel(
        name=kind.name,
        family=FAMILY,
        tables=(native_table(hf), hf, training, training_table(kind, ""), muse),
        hf=hf,
        hf_tables=(hf, muse),
        model_types=VIT_TYPES if kind.vit else MODEL_TYPES,
        target_infos=lambda folder: infos_of_folder(folder, kind),
        released_infos=lambda: infos_of(from_published(released_config(kind))),
        released_config=lambda: released_config(kind),
        example_infos=lambda: example_infos(kind),
        whole_config=whole_config,
        other_config=read_published,
        implied_infos=implied_infos,
        forms={"hf": Form(hf_form), "internlm": Form(training_form, training)},
        separate_parts={VQGAN_PART: "the VQGAN's weights, in place of those in the checkpoint"},
    )


MODELS = tuple(map(model_of, KINDS))
