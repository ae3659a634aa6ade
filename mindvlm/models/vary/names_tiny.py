"""Names of Vary-tiny: an OPT decoder, the vision vocabulary and one projector.

The authors' two repositories call the vision vocabulary `model.vision_tower_2.` (so do the published weights) and
`model.vision_tower.`. The output layer is the token embedding; files may hold it once more as `lm_head.weight`. OPT's
`final_layer_norm` of a layer stands before its MLP and is called `post_attention_layernorm` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.convert.reference.vary_tiny_layout import parameter_shapes, vary_tiny_config
from mindvlm.models.vary.tower_names import (
    EXAMPLE_VOCABULARY,
    FAMILY,
    VOCABULARY_FIELDS,
    handover_table,
    projectors_part,
    renames,
    sam_table,
    vocabulary_parts,
    with_parameters,
)
from mindvlm.weights.config_json import FLAG, NUM_LAYERS, SIZE, Layout, infos_of_folder
from mindvlm.weights.rules.operations import Rename, Tie
from mindvlm.weights.rules.table import Part, RuleTable

NAME = "vary_tiny"
MODEL_TYPES = ("vary", "varyOPTForCausalLM")
_PROJECTORS = ("mm_projector",)
_FIELDS = {
    **dict.fromkeys(("hidden_size", "vocab_size", "ffn_dim", "max_position_embeddings"), SIZE),
    "num_hidden_layers": NUM_LAYERS,
}
_OPTIONAL = {
    "word_embed_proj_dim": SIZE,
    **dict.fromkeys(
        ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"), FLAG
    ),
}


def _language(prefix: str) -> Part:
    """The OPT decoder whose names stand behind `prefix`."""
    names = {
        "layers.{}.self_attn_layer_norm": "layers.{}.input_layernorm",
        "layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
        "layers.{}.self_attn.out_proj": "layers.{}.self_attn.o_proj",
        "layers.{}.final_layer_norm": "layers.{}.post_attention_layernorm",
        "layers.{}.fc1": "layers.{}.mlp.fc1",
        "layers.{}.fc2": "layers.{}.mlp.fc2",
        "final_layer_norm": "norm",
    }
    rules = (
        Tie((f"{prefix}embed_tokens.weight", "lm_head.weight"), "language_model.embed_tokens.weight"),
        Rename(f"{prefix}embed_positions.weight", "language_model.embed_positions.weight"),
        *renames(prefix, "language_model.", with_parameters(names)),
    )
    return Part("language model", rules, "language_model")


def _hugging_face(name: str, tower: str) -> RuleTable:
    """The names of the authors' code with the given name of the vision vocabulary."""
    parts = (
        _language("model.decoder."),
        *vocabulary_parts(f"model.{tower}."),
        projectors_part("model.", _PROJECTORS),
    )
    return RuleTable(name, FAMILY, parts, NAME)


HF = _hugging_face("Hugging Face", "vision_tower_2")
HF_VISION_TOWER = _hugging_face("Hugging Face with vision_tower", "vision_tower")
OPT = RuleTable("OPT", FAMILY, (_language("decoder."),), NAME)
NATIVE = HF.identity("native")
HF_TABLES = (HF, HF_VISION_TOWER, OPT, sam_table(NAME))
_OF_VARY_TOY = (
    *(f"transformer.{name}.*" for name in ("wte", "h", "ln_f", "rotary_emb", "vision_tower")),
    "transformer.mm_projector.*",
    "transformer.mm_projector_vary.*",
    "lm_head.weight",
)
TABLES = (
    NATIVE,
    *HF_TABLES,
    handover_table("Vary-toy", NAME, "transformer.vision_tower_high.", _OF_VARY_TOY),
)


def infos_of_config(folder: Path) -> dict[str, TensorInfo] | None:
    """Return the native tensors that the config.json in `folder` describes; see `infos_of_folder`."""
    towers = {"vision_high_config": VOCABULARY_FIELDS}
    return infos_of_folder(folder, infos_of, Layout("Vary-tiny", MODEL_TYPES, _FIELDS, _OPTIONAL, towers))


def released_infos() -> dict[str, TensorInfo]:
    """Return the native tensors of the released Vary-tiny."""
    return infos_of(vary_tiny_config())


def example_infos() -> dict[str, TensorInfo]:
    """Return the native tensors of a Vary-tiny whose numbers all differ; see `require_consistent_sizes`."""
    sizes = {
        "hidden_size": 202,
        "vocab_size": 997,
        "ffn_dim": 307,
        "max_position_embeddings": 401,
        "num_hidden_layers": 1,
        "vision_high_config": EXAMPLE_VOCABULARY,
    }
    return infos_of(sizes)


def infos_of(config: Mapping[str, object]) -> dict[str, TensorInfo]:
    """Return the native tensors of a Vary-tiny with this config."""
    shapes = parameter_shapes(config)
    return dict(HF.plan({name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}).infos)
