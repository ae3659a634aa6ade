"""Names of Vary-toy: those of the Hugging Face files and those of MindOCR, as tables that lead to the names used here.

What is not a plain renaming:

- Hugging Face keeps q, k and v in one `attn.c_attn`, rows in the order q | k | v: split into three.
- The MLP computes c_proj(w1(x) * silu(w2(x))): w2 is `gate_proj`, w1 is `up_proj`. MindOCR calls the same three
  matrices w3 (gate), w1 (up) and w2 (down).
- MindOCR puts the CLIP final norm under `vision_model.` although it drops that prefix everywhere else.
- The buffers that some files carry (position ids, rotary frequencies, causal masks) are computed here: dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.convert.reference.vary_layout import parameter_shapes, vary_toy_config
from mindvlm.models.vary.tower_names import (
    CLIP_FIELDS,
    COMPUTED,
    EXAMPLE_VOCABULARY,
    FAMILY,
    SAM_NORMS,
    VOCABULARY_FIELDS,
    clip_part,
    clip_rules,
    clip_tables,
    handover_table,
    projectors_part,
    renames,
    sam_table,
    unchanged,
    vocabulary_parts,
    with_parameters,
)
from mindvlm.weights.config_json import NUM_LAYERS, SIZE, Layout, infos_of_folder
from mindvlm.weights.rules.operations import Drop, Rename, Rule, Split
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

NAME = "vary_toy"
MODEL_TYPES = ("mmgpt", "MMGPTQwenForCausalLM")
_PROJECTORS = ("mm_projector", "mm_projector_vary")
_FIELDS = {
    **dict.fromkeys(("hidden_size", "vocab_size", "num_attention_heads", "kv_channels", "intermediate_size"), SIZE),
    "num_hidden_layers": NUM_LAYERS,
}
_TOWERS = {"vision_config": CLIP_FIELDS, "vision_high_config": VOCABULARY_FIELDS}


def _language(rules: tuple[Rule, ...]) -> Part:
    return Part("language model", rules, "language_model")


def _with_norms(names: Mapping[str, str]) -> dict[str, str]:
    """Write each row as its gamma and beta (MindOCR), which are weight and bias here."""
    return {
        f"{left}.{old}": f"{right}.{new}"
        for left, right in names.items()
        for old, new in (("gamma", "weight"), ("beta", "bias"))
    }


_HF_LANGUAGE: tuple[Rule, ...] = (
    Rename("transformer.wte.weight", "language_model.embed_tokens.weight"),
    Rename("transformer.h.{}.ln_1.weight", "language_model.layers.{}.input_layernorm.weight"),
    *(
        Split(
            f"transformer.h.{{}}.attn.c_attn.{ending}",
            tuple(f"language_model.layers.{{}}.self_attn.{part}_proj.{ending}" for part in "qkv"),
        )
        for ending in ("weight", "bias")
    ),
    Rename("transformer.h.{}.attn.c_proj.weight", "language_model.layers.{}.self_attn.o_proj.weight"),
    Rename("transformer.h.{}.ln_2.weight", "language_model.layers.{}.post_attention_layernorm.weight"),
    Rename("transformer.h.{}.mlp.w2.weight", "language_model.layers.{}.mlp.gate_proj.weight"),
    Rename("transformer.h.{}.mlp.w1.weight", "language_model.layers.{}.mlp.up_proj.weight"),
    Rename("transformer.h.{}.mlp.c_proj.weight", "language_model.layers.{}.mlp.down_proj.weight"),
    Rename("transformer.ln_f.weight", "language_model.norm.weight"),
    Rename("lm_head.weight", "language_model.lm_head.weight"),
    Drop("transformer.rotary_emb.inv_freq", COMPUTED),
    Drop("transformer.h.{}.attn.rotary_emb.inv_freq", COMPUTED),
    Drop("transformer.h.{}.attn.bias", COMPUTED),
    Drop("transformer.h.{}.attn.masked_bias", COMPUTED),
)

_MINDOCR_LANGUAGE: tuple[Rule, ...] = (
    Rename("transformer.wte.embedding_weight", "language_model.embed_tokens.weight"),
    Rename("transformer.layers.{}.attention_norm.weight", "language_model.layers.{}.input_layernorm.weight"),
    *(
        rule
        for part in "qkv"
        for rule in rename_all(
            f"transformer.layers.{{}}.attention.w{part}", f"language_model.layers.{{}}.self_attn.{part}_proj"
        )
    ),
    Rename("transformer.layers.{}.attention.wo.weight", "language_model.layers.{}.self_attn.o_proj.weight"),
    Rename("transformer.layers.{}.ffn_norm.weight", "language_model.layers.{}.post_attention_layernorm.weight"),
    Rename("transformer.layers.{}.feed_forward.w3.weight", "language_model.layers.{}.mlp.gate_proj.weight"),
    Rename("transformer.layers.{}.feed_forward.w1.weight", "language_model.layers.{}.mlp.up_proj.weight"),
    Rename("transformer.layers.{}.feed_forward.w2.weight", "language_model.layers.{}.mlp.down_proj.weight"),
    Rename("transformer.ln_f.weight", "language_model.norm.weight"),
    Rename("lm_head.weight", "language_model.lm_head.weight"),
)

_MINDOCR_CLIP: tuple[Rule, ...] = (
    *renames(
        "transformer.vision_tower.",
        "vision_tower.",
        {
            "class_embedding": "embeddings.class_embedding",
            "conv1.weight": "embeddings.patch_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            **_with_norms(
                {
                    "ln_pre": "pre_layrnorm",
                    "transformer.resblocks.{}.ln_1": "encoder.layers.{}.layer_norm1",
                    "transformer.resblocks.{}.ln_2": "encoder.layers.{}.layer_norm2",
                }
            ),
            **with_parameters(
                {
                    "transformer.resblocks.{}.attn.q_proj": "encoder.layers.{}.self_attn.q_proj",
                    "transformer.resblocks.{}.attn.k_proj": "encoder.layers.{}.self_attn.k_proj",
                    "transformer.resblocks.{}.attn.v_proj": "encoder.layers.{}.self_attn.v_proj",
                    "transformer.resblocks.{}.attn.out_proj": "encoder.layers.{}.self_attn.out_proj",
                    "transformer.resblocks.{}.mlp.c_fc": "encoder.layers.{}.mlp.fc1",
                    "transformer.resblocks.{}.mlp.c_proj": "encoder.layers.{}.mlp.fc2",
                    "vision_model.post_layernorm": "post_layernorm",
                }
            ),
        },
    ),
    Drop("transformer.vision_tower.position_ids", COMPUTED),
)

HF = RuleTable(
    "Hugging Face",
    FAMILY,
    (
        _language(_HF_LANGUAGE),
        clip_part(clip_rules("transformer.vision_tower.")),
        *vocabulary_parts("transformer.vision_tower_high."),
        projectors_part("transformer.", _PROJECTORS),
    ),
    NAME,
)
MINDOCR = RuleTable(
    "MindOCR",
    FAMILY,
    (
        _language(_MINDOCR_LANGUAGE),
        clip_part(_MINDOCR_CLIP),
        *vocabulary_parts("transformer.vision_tower_high.", _with_norms(unchanged(SAM_NORMS))),
        projectors_part("transformer.", _PROJECTORS),
    ),
    NAME,
)
PROJECTORS = RuleTable("projector file", FAMILY, (projectors_part("model.", _PROJECTORS),), NAME)
NATIVE = HF.identity("native")
HF_TABLES = (HF, *clip_tables(NAME), sam_table(NAME), PROJECTORS)
_OF_VARY_TINY = ("model.decoder.*", "model.mm_projector.*", "lm_head.weight")
TABLES = (
    NATIVE,
    HF,
    MINDOCR,
    *HF_TABLES[1:],
    *(
        handover_table(f"Vary-tiny with {tower}", NAME, f"model.{tower}.", _OF_VARY_TINY)
        for tower in ("vision_tower_2", "vision_tower")
    ),
)


def infos_of_config(folder: Path) -> dict[str, TensorInfo] | None:
    """Return the native tensors that the config.json in `folder` describes; see `infos_of_folder`."""
    layout = Layout("Vary-toy", MODEL_TYPES, _FIELDS, towers=_TOWERS)
    return infos_of_folder(folder, infos_of, layout)


def released_infos() -> dict[str, TensorInfo]:
    """Return the native tensors of the released Vary-toy."""
    return infos_of(vary_toy_config())


def example_infos() -> dict[str, TensorInfo]:
    """Return the native tensors of a Vary-toy whose numbers all differ; see `require_consistent_sizes`."""
    sizes = {
        "hidden_size": 202,
        "vocab_size": 997,
        "num_attention_heads": 3,
        "kv_channels": 67,
        "intermediate_size": 614,
        "num_hidden_layers": 1,
        "vision_config": {
            "hidden_size": 211,
            "intermediate_size": 223,
            "num_hidden_layers": 1,
            "patch_size": 5,
            "image_size": [35, 55],
        },
        "vision_high_config": EXAMPLE_VOCABULARY,
    }
    return infos_of(sizes)


def infos_of(config: Mapping[str, object]) -> dict[str, TensorInfo]:
    """Return the native tensors of a Vary-toy with this config."""
    shapes = parameter_shapes(config)
    return dict(HF.plan({name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}).infos)
