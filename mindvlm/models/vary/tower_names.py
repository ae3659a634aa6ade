"""Names of what the models of the Vary family have in common: CLIP tower, vision vocabulary and projectors.

The same weights come inside a model, or alone in the file of their first publisher (OpenAI's CLIP as Hugging Face
keeps it, Meta's `sam_vit_b`); every table here leads to the names used in this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindvlm.weights.config_json import IMAGE_SIZE, LAYER_NUMBERS, NUM_LAYERS, RATIO, SIZE
from mindvlm.weights.rules.operations import Drop, Rename, Rule
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

FAMILY = "vary"
COMPUTED = "a buffer that the model computes"
_CLIP_TEXT = "CLIP's text half and its projections; the model takes the vision tower only"
_OTHER_MODEL = "of the model that only its vision vocabulary is taken from"
_SAM_PROMPTS = "SAM's prompt encoder and mask decoder; the vision vocabulary starts from its image encoder only"

CLIP_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
)
CLIP_NORMS = ("pre_layrnorm", "encoder.layers.{}.layer_norm1", "encoder.layers.{}.layer_norm2", "post_layernorm")
CLIP_LINEARS = tuple(
    f"encoder.layers.{{}}.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
)
SAM_NORMS = ("blocks.{}.norm1", "blocks.{}.norm2")
_SAM_LAYERS = (
    "patch_embed.proj",
    "blocks.{}.attn.qkv",
    "blocks.{}.attn.proj",
    "blocks.{}.mlp.lin1",
    "blocks.{}.mlp.lin2",
    "neck.1",
    "neck.3",
)
_SAM_TENSORS = ("pos_embed", "blocks.{}.attn.rel_pos_h", "blocks.{}.attn.rel_pos_w", "neck.0.weight", "neck.2.weight")
_CONVOLUTIONS = ("net_2.weight", "net_3.weight")

CLIP_FIELDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "patch_size", "num_channels"), SIZE),
    "num_hidden_layers": NUM_LAYERS,
    "image_size": IMAGE_SIZE,
}
VOCABULARY_FIELDS = {
    **dict.fromkeys(("embed_dim", "num_heads", "window_size", "patch_size", "out_chans"), SIZE),
    **dict.fromkeys(("net_2_channels", "net_3_channels"), SIZE),
    "depth": NUM_LAYERS,
    "global_attn_indexes": LAYER_NUMBERS,
    "image_size": IMAGE_SIZE,
    "mlp_ratio": RATIO,
}

EXAMPLE_VOCABULARY = {
    "embed_dim": 228,
    "depth": 2,
    "num_heads": 12,
    "global_attn_indexes": [1],
    "window_size": 13,
    "image_size": [391, 493],
    "patch_size": 17,
    "out_chans": 241,
    "net_2_channels": 251,
    "net_3_channels": 257,
}
"""Sizes of a vision vocabulary whose numbers all differ, to tell its axes apart."""


def renames(source: str, target: str, names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Return a `Rename` for each row, both sides under their prefix."""
    return tuple(Rename(source + left, target + right) for left, right in names.items())


def unchanged(names: Iterable[str]) -> dict[str, str]:
    """Write each name as a row that keeps it."""
    return {name: name for name in names}


def with_parameters(names: Mapping[str, str]) -> dict[str, str]:
    """Write each row as its weight and bias."""
    return {f"{left}.{ending}": f"{right}.{ending}" for left, right in names.items() for ending in ("weight", "bias")}


def clip_part(rules: tuple[Rule, ...]) -> Part:
    """The CLIP tower with the given rules."""
    return Part("CLIP tower", rules, "vision_tower")


def clip_rules(prefix: str) -> tuple[Rule, ...]:
    """Rules of a CLIP tower whose Hugging Face names (`vision_model.*`) stand behind `prefix`."""
    names = {**unchanged(CLIP_EMBEDDINGS), **with_parameters(unchanged((*CLIP_NORMS, *CLIP_LINEARS)))}
    return (
        *renames(f"{prefix}vision_model.", "vision_tower.", names),
        Drop(f"{prefix}vision_model.embeddings.position_ids", COMPUTED),
    )


def vocabulary_parts(
    prefix: str, norms: Mapping[str, str] | None = None, extra: tuple[Rule, ...] = ()
) -> tuple[Part, Part]:
    """The vision vocabulary whose SAM names stand behind `prefix`, and the two convolutions Vary puts behind it.

    The convolutions are a part of their own because the published SAM, from which a vocabulary may start, has none.

    Args:
        prefix: what the names begin with.
        norms: rows for the norms of the blocks, where they are not named as in SAM.
        extra: further rules of the vocabulary.
    """
    names = {
        **unchanged(_SAM_TENSORS),
        **with_parameters(unchanged(_SAM_LAYERS)),
        **(norms or with_parameters(unchanged(SAM_NORMS))),
    }
    convolutions = renames(prefix, "vision_vocabulary.", unchanged(_CONVOLUTIONS))
    return (
        Part("vision vocabulary", (*renames(prefix, "vision_vocabulary.", names), *extra), "vision_vocabulary"),
        Part("vocabulary convolutions", convolutions, "vision_vocabulary"),
    )


def projectors_part(prefix: str, names: Iterable[str]) -> Part:
    """The projectors of the given names behind `prefix`."""
    return Part("projectors", tuple(rule for name in names for rule in rename_all(prefix + name, name)), "projectors")


def clip_tables(model: str) -> tuple[RuleTable, ...]:
    """Tables of a model for a CLIP as published, vision tower or whole, and for one saved under `vision_tower.`."""
    text = tuple(
        Drop(name, _CLIP_TEXT)
        for name in ("text_model.*", "text_projection.weight", "visual_projection.weight", "logit_scale")
    )
    return (
        RuleTable("CLIP", FAMILY, (clip_part((*clip_rules(""), *text)),), model),
        RuleTable("CLIP under vision_tower", FAMILY, (clip_part(clip_rules("vision_tower.")),), model),
    )


def sam_table(model: str) -> RuleTable:
    """Table of a model for a SAM as published; Vary's two convolutions are not in it."""
    extra = tuple(Drop(name, _SAM_PROMPTS) for name in ("prompt_encoder.*", "mask_decoder.*"))
    return RuleTable("SAM", FAMILY, vocabulary_parts("image_encoder.", extra=extra), model)


def handover_table(name: str, model: str, prefix: str, others: Iterable[str]) -> RuleTable:
    """Table of `model` that takes the vision vocabulary behind `prefix` out of another, whose `others` are dropped."""
    extra = tuple(Drop(other, _OTHER_MODEL) for other in others)
    return RuleTable(name, FAMILY, vocabulary_parts(prefix, extra=extra), model, hands_over=True)
