"""Tensor names of Vary-toy and Vary-tiny, as tables from the names of their checkpoints to native names.

Exceptions to plain renaming in Vary-toy (Hugging Face and MindOCR):

- Hugging Face stores q, k and v in one `attn.c_attn`, rows in the order q | k | v; it is split into three.
- The MLP computes c_proj(w1(x) * silu(w2(x))): w2 is `gate_proj`, w1 is `up_proj`. MindOCR calls the same three
  matrices w3 (gate), w1 (up) and w2 (down).
- MindOCR keeps the prefix `vision_model.` for the final norm of CLIP and drops it everywhere else.
- Buffers in some files (position ids, rotary frequencies, causal masks) are dropped because they are computed.

In Vary-tiny:

- The vision vocabulary is `model.vision_tower_2.` in one of the authors' repositories and in the published weights, and
  `model.vision_tower.` in the other.
- The head is the token embedding; files may also contain it as `lm_head.weight`.
- The `final_layer_norm` of an OPT layer precedes its MLP and is `post_attention_layernorm` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.models.hf.names import renames, unchanged, with_parameters
from mindvlm.models.vary.hf_config import (
    from_hf_config,
    infos_of,
    infos_of_folder,
    tiny_config,
    toy_config,
    vary_tiny_config,
    vary_toy_config,
)
from mindvlm.models.vary.tower_names import (
    EXAMPLE_VOCABULARY,
    FAMILY,
    SAM_NORMS,
    clip_part,
    clip_rules,
    clip_tables,
    handover_table,
    projectors_part,
    sam_tables,
    vocabulary_parts,
)
from mindvlm.weights.buffers import COMPUTED
from mindvlm.weights.recognise import ConvertibleModel
from mindvlm.weights.rules.operations import Drop, Rename, Rule, Split, Tie
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

TOY_NAME = "vary_toy"
TOY_TYPES = ("mmgpt", "MMGPTQwenForCausalLM")
_TOY_PROJECTORS = ("mm_projector", "mm_projector_vary")


def _language(rules: tuple[Rule, ...]) -> Part:
    return Part("language model", rules, "language_model")


def _with_norms(names: Mapping[str, str]) -> dict[str, str]:
    """Returns two rows for each row: gamma -> weight and beta -> bias (MindOCR)."""
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
        projectors_part("transformer.", _TOY_PROJECTORS),
    ),
    TOY_NAME,
)
MINDOCR = RuleTable(
    "MindOCR",
    FAMILY,
    (
        _language(_MINDOCR_LANGUAGE),
        clip_part(_MINDOCR_CLIP),
        *vocabulary_parts("transformer.vision_tower_high.", _with_norms(unchanged(SAM_NORMS))),
        projectors_part("transformer.", _TOY_PROJECTORS),
    ),
    TOY_NAME,
)
PROJECTORS = RuleTable("projector file", FAMILY, (projectors_part("model.", _TOY_PROJECTORS),), TOY_NAME)
HF_TABLES = (HF, *clip_tables(TOY_NAME), *sam_tables(TOY_NAME), PROJECTORS)
_OF_VARY_TINY = ("model.decoder.*", "model.mm_projector.*", "lm_head.weight")
TABLES = (
    HF.identity("native"),
    HF,
    MINDOCR,
    *HF_TABLES[1:],
    *(
        handover_table(f"Vary-tiny with {tower}", TOY_NAME, f"model.{tower}.", _OF_VARY_TINY)
        for tower in ("vision_tower_2", "vision_tower")
    ),
)


def toy_infos_of_config(folder: Path) -> dict[str, TensorInfo] | None:
    """Returns the native tensors of the config.json in `folder`; see `infos_of_folder`."""
    return infos_of_folder(folder, toy_config, model="Vary-toy", model_types=TOY_TYPES)


def toy_released_infos() -> dict[str, TensorInfo]:
    """Returns the native tensors of the released Vary-toy. Its files have 769 tensors, 2,237,365,504 values."""
    return infos_of(from_hf_config(vary_toy_config()))


def toy_example_infos() -> dict[str, TensorInfo]:
    """Returns the native tensors of a Vary-toy with distinct sizes; see `require_consistent_sizes`."""
    clip = {"hidden_size": 211, "intermediate_size": 223, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {
        "hidden_size": 202,
        "vocab_size": 997,
        "num_attention_heads": 3,
        "kv_channels": 68,
        "intermediate_size": 614,
        "num_hidden_layers": 1,
        # as many patches as vocabulary tokens
        "vision_config": {**clip, "patch_size": 5, "image_size": [30, 40]},
        "vision_high_config": EXAMPLE_VOCABULARY,
    }
    return infos_of(from_hf_config(sizes))


TOY = ConvertibleModel(
    name=TOY_NAME,
    family=FAMILY,
    tables=TABLES,
    hf=HF,
    hf_tables=HF_TABLES,
    model_types=TOY_TYPES,
    target_infos=toy_infos_of_config,
    released_infos=toy_released_infos,
    released_config=vary_toy_config,
    example_infos=toy_example_infos,
    published=("HaoranWei/Vary-toy",),
)

TINY_NAME = "vary_tiny"
TINY_TYPES = ("vary", "varyOPTForCausalLM")
_TINY_PROJECTORS = ("mm_projector",)


def _opt(prefix: str) -> Part:
    """Returns the rules of an OPT decoder with this prefix."""
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


def _tiny_table(name: str, tower: str) -> RuleTable:
    """Returns the naming of the authors' code, for one of the names of the vision vocabulary."""
    parts = (
        _opt("model.decoder."),
        *vocabulary_parts(f"model.{tower}."),
        projectors_part("model.", _TINY_PROJECTORS),
    )
    return RuleTable(name, FAMILY, parts, TINY_NAME)


TINY_HF = _tiny_table("Hugging Face", "vision_tower_2")
TINY_HF_VISION_TOWER = _tiny_table("Hugging Face with vision_tower", "vision_tower")
OPT = RuleTable("OPT", FAMILY, (_opt("decoder."),), TINY_NAME)
TINY_HF_TABLES = (TINY_HF, TINY_HF_VISION_TOWER, OPT, *sam_tables(TINY_NAME))
_OF_VARY_TOY = (
    *(f"transformer.{name}.*" for name in ("wte", "h", "ln_f", "rotary_emb", "vision_tower")),
    "transformer.mm_projector.*",
    "transformer.mm_projector_vary.*",
    "lm_head.weight",
)
TINY_TABLES = (
    TINY_HF.identity("native"),
    *TINY_HF_TABLES,
    handover_table("Vary-toy", TINY_NAME, "transformer.vision_tower_high.", _OF_VARY_TOY),
)


def tiny_infos_of_config(folder: Path) -> dict[str, TensorInfo] | None:
    """Returns the native tensors of the config.json in `folder`; see `infos_of_folder`."""
    return infos_of_folder(folder, tiny_config, model="Vary-tiny", model_types=TINY_TYPES)


def tiny_released_infos() -> dict[str, TensorInfo]:
    """Returns the native tensors of the released Vary-tiny."""
    return infos_of(from_hf_config(vary_tiny_config()))


def tiny_example_infos() -> dict[str, TensorInfo]:
    """Returns the native tensors of a Vary-tiny with distinct sizes; see `require_consistent_sizes`."""
    sizes = {
        "hidden_size": 202,
        "vocab_size": 997,
        "ffn_dim": 307,
        "max_position_embeddings": 401,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vision_high_config": EXAMPLE_VOCABULARY,
    }
    return infos_of(from_hf_config(sizes))


TINY = ConvertibleModel(
    name=TINY_NAME,
    family=FAMILY,
    tables=TINY_TABLES,
    hf=TINY_HF,
    hf_tables=TINY_HF_TABLES,
    model_types=TINY_TYPES,
    target_infos=tiny_infos_of_config,
    released_infos=tiny_released_infos,
    released_config=vary_tiny_config,
    example_infos=tiny_example_infos,
)
MODELS = (TOY, TINY)
