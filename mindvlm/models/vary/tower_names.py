"""Tensor names of the parts that Vary-toy and Vary-tiny share: CLIP tower, vision vocabulary and projectors.

The weights are part of a model, or separate files of their first publisher (OpenAI's CLIP on Hugging Face, Meta's
`sam_vit_b`, and the same SAM as transformers has it, such as facebook/sam-vit-base).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mindvlm.models.hf.names import CLIP_NAMES, TOWER_NAMES, renames, unchanged, with_parameters
from mindvlm.weights.buffers import COMPUTED
from mindvlm.weights.rules.operations import Drop, Rule
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

FAMILY = "vary"
_CLIP_TEXT = "CLIP's text half and its projections; the model uses the vision tower only"
_OTHER_MODEL = "part of another model; only its vision vocabulary is used"
_SAM_PROMPTS = "SAM's prompt encoder and mask decoder; the vision vocabulary starts from its image encoder only"

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
_SAM_OF_TRANSFORMERS = {
    "pos_embed": "pos_embed",
    **{f"layers.{{}}.attn.rel_pos_{axis}": f"blocks.{{}}.attn.rel_pos_{axis}" for axis in "hw"},
    **with_parameters(
        {
            "patch_embed.projection": "patch_embed.proj",
            "layers.{}.layer_norm1": "blocks.{}.norm1",
            "layers.{}.layer_norm2": "blocks.{}.norm2",
            **{
                f"layers.{{}}.{name}": f"blocks.{{}}.{name}"
                for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
            },
            "neck.layer_norm1": "neck.1",
            "neck.layer_norm2": "neck.3",
        }
    ),
    "neck.conv1.weight": "neck.0.weight",
    "neck.conv2.weight": "neck.2.weight",
}
"""Names of transformers' SAM -> those of Meta's."""

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
"""The `vision_high_config` of a vision vocabulary with distinct sizes; see `require_consistent_sizes`."""


def clip_part(rules: tuple[Rule, ...]) -> Part:
    """Returns the part of a CLIP tower with these rules."""
    return Part("CLIP tower", rules, "vision_tower")


def clip_rules(prefix: str) -> tuple[Rule, ...]:
    """Returns the rules for the Hugging Face names (`vision_model.*`) of a CLIP tower with this prefix."""
    return (
        *renames(f"{prefix}vision_model.", "vision_tower.", {**CLIP_NAMES, **TOWER_NAMES}),
        Drop(f"{prefix}vision_model.embeddings.position_ids", COMPUTED),
    )


def vocabulary_parts(
    prefix: str, norms: Mapping[str, str] | None = None, extra: tuple[Rule, ...] = ()
) -> tuple[Part, Part]:
    """Returns the parts of the vision vocabulary with SAM's names, and of its two convolutions.

    The convolutions are a separate part because the published SAM has none.

    Args:
        prefix: prefix of the names, with the dot.
        norms: rows for the norms of the blocks, if they do not have SAM's names.
        extra: additional rules of the vocabulary.
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
    """Returns the part of the projectors with these names."""
    return Part("projectors", tuple(rule for name in names for rule in rename_all(prefix + name, name)), "projectors")


def clip_tables(model: str) -> tuple[RuleTable, ...]:
    """Returns the tables of a published CLIP, tower or whole, and of a tower saved under `vision_tower.`."""
    text = tuple(
        Drop(name, _CLIP_TEXT)
        for name in ("text_model.*", "text_projection.weight", "visual_projection.weight", "logit_scale")
    )
    return (
        RuleTable("CLIP", FAMILY, (clip_part((*clip_rules(""), *text)),), model),
        RuleTable("CLIP under vision_tower", FAMILY, (clip_part(clip_rules("vision_tower.")),), model),
    )


def sam_tables(model: str) -> tuple[RuleTable, ...]:
    """Returns the tables of a published SAM, Meta's and that of transformers, which lacks Vary's two convolutions."""
    others = ("prompt_encoder.*", "mask_decoder.*", "shared_image_embedding.positional_embedding")
    extra = tuple(Drop(name, _SAM_PROMPTS) for name in others)
    rules = (*renames("vision_encoder.", "vision_vocabulary.", _SAM_OF_TRANSFORMERS), *extra)
    part, convolutions = vocabulary_parts("image_encoder.", extra=extra)
    return (
        RuleTable("SAM", FAMILY, (part, convolutions), model),
        RuleTable("SAM of transformers", FAMILY, (replace(part, rules=rules), convolutions), model),
    )


def handover_table(name: str, model: str, prefix: str, others: Iterable[str]) -> RuleTable:
    """Returns a table that takes the vision vocabulary from another model and drops the tensors `others`."""
    extra = tuple(Drop(other, _OTHER_MODEL) for other in others)
    return RuleTable(name, FAMILY, vocabulary_parts(prefix, extra=extra), model, takes_only="vision_vocabulary")
