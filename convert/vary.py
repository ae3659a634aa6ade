"""Names of Vary: those of the Hugging Face files and those of MindOCR, as tables that lead to the names used here.

What is not a plain renaming:

- Hugging Face keeps q, k and v in one `attn.c_attn`, rows in the order q | k | v: split into three.
- The MLP computes c_proj(w1(x) * silu(w2(x))): w2 is `gate_proj`, w1 is `up_proj`. MindOCR calls the same three
  matrices w3 (gate), w1 (up) and w2 (down).
- MindOCR puts the CLIP final norm under `vision_model.` although it drops that prefix everywhere else.
- The buffers that some files carry (position ids, rotary frequencies, causal masks) are computed here: dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.convert.reference.vary_layout import parameter_shapes, vary_toy_config
from mindvlm.convert.rules import Drop, Part, Rename, Rule, RuleTable, Split, rename_all
from mindvlm.errors import UserError

_COMPUTED = "a buffer that the model computes"


def _renames(source: str, target: str, names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Return a `Rename` for each row, both sides under their prefix."""
    return tuple(Rename(source + left, target + right) for left, right in names.items())


def _with_norms(names: Mapping[str, str]) -> dict[str, str]:
    """Write each row as its gamma and beta (MindOCR), which are weight and bias here."""
    return {
        f"{left}.{old}": f"{right}.{new}"
        for left, right in names.items()
        for old, new in (("gamma", "weight"), ("beta", "bias"))
    }


def _with_parameters(names: Mapping[str, str]) -> dict[str, str]:
    """Write each row as its weight and bias."""
    return {f"{left}.{ending}": f"{right}.{ending}" for left, right in names.items() for ending in ("weight", "bias")}


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
    Drop("transformer.rotary_emb.inv_freq", _COMPUTED),
    Drop("transformer.h.{}.attn.rotary_emb.inv_freq", _COMPUTED),
    Drop("transformer.h.{}.attn.bias", _COMPUTED),
    Drop("transformer.h.{}.attn.masked_bias", _COMPUTED),
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

_CLIP_LINEARS = tuple(
    f"encoder.layers.{{}}.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
)
_CLIP_NORMS = ("pre_layrnorm", "encoder.layers.{}.layer_norm1", "encoder.layers.{}.layer_norm2", "post_layernorm")
_CLIP_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
)

_HF_CLIP: tuple[Rule, ...] = (
    *_renames(
        "transformer.vision_tower.vision_model.",
        "vision_tower.",
        {
            **{name: name for name in _CLIP_EMBEDDINGS},
            **_with_parameters({name: name for name in (*_CLIP_NORMS, *_CLIP_LINEARS)}),
        },
    ),
    Drop("transformer.vision_tower.vision_model.embeddings.position_ids", _COMPUTED),
)

_MINDOCR_CLIP: tuple[Rule, ...] = (
    *_renames(
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
            **_with_parameters(
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
    Drop("transformer.vision_tower.position_ids", _COMPUTED),
)

_SAM_NORMS = ("blocks.{}.norm1", "blocks.{}.norm2")
_SAM_OTHERS = {
    "pos_embed": "pos_embed",
    **_with_parameters(
        {
            name: name
            for name in (
                "patch_embed.proj",
                "blocks.{}.attn.qkv",
                "blocks.{}.attn.proj",
                "blocks.{}.mlp.lin1",
                "blocks.{}.mlp.lin2",
                "neck.1",
                "neck.3",
            )
        }
    ),
    **{
        name: name
        for name in (
            "blocks.{}.attn.rel_pos_h",
            "blocks.{}.attn.rel_pos_w",
            "neck.0.weight",
            "neck.2.weight",
            "net_2.weight",
            "net_3.weight",
        )
    },
}


def _vocabulary(norms: Mapping[str, str]) -> tuple[Rule, ...]:
    """The SAM names, which are the same everywhere but for the norms."""
    return _renames("transformer.vision_tower_high.", "vision_vocabulary.", {**_SAM_OTHERS, **norms})


_PROJECTORS: tuple[Rule, ...] = (
    *rename_all("transformer.mm_projector", "mm_projector"),
    *rename_all("transformer.mm_projector_vary", "mm_projector_vary"),
)

HF = RuleTable(
    "Hugging Face",
    "vary",
    (
        Part("language model", _HF_LANGUAGE),
        Part("CLIP tower", _HF_CLIP),
        Part("vision vocabulary", _vocabulary(_with_parameters({name: name for name in _SAM_NORMS}))),
        Part("projectors", _PROJECTORS),
    ),
)
MINDOCR = RuleTable(
    "MindOCR",
    "vary",
    (
        Part("language model", _MINDOCR_LANGUAGE),
        Part("CLIP tower", _MINDOCR_CLIP),
        Part("vision vocabulary", _vocabulary(_with_norms({name: name for name in _SAM_NORMS}))),
        Part("projectors", _PROJECTORS),
    ),
)
NATIVE = HF.identity("native")
TABLES = (NATIVE, HF, MINDOCR)


def detect(infos: Mapping[str, TensorInfo], *, origin: str = "the checkpoint") -> RuleTable:
    """Return the table whose names the tensors bear: native, Hugging Face or MindOCR.

    The table that knows most of the names wins; names that it does not know are reported by its plan.

    Raises:
        UserError: no table knows at least half of the names.
    """
    known = {table: sum(bool(table.claims(name)) for name in infos) for table in TABLES}
    best = max(TABLES, key=lambda table: known[table])
    if not known[best] or 2 * known[best] < len(infos):
        names = ", ".join(table.name for table in TABLES)
        raise UserError(
            f"{origin} is not a Vary checkpoint: {known[best]} of its {len(infos)} tensors bear names of Vary "
            f"({names}); the first is {next(iter(infos), None)}; give the weights of Vary-toy"
        )
    return best


def native_view(
    source: TensorSource, *, target_infos: Mapping[str, TensorInfo] | None = None, family: str = "vary"
) -> TensorSource:
    """Return the tensors of a Vary checkpoint under native names, whichever of the three namings it has.

    Nothing is copied: tensors are read from `source` when asked for. See `RuleTable.plan` for `target_infos`.

    Raises:
        ConversionError: the tensors do not make up the model.
        UserError: another family, or not a Vary checkpoint at all.
    """
    if family != "vary":
        raise UserError(f"unknown model family {family!r}; known: vary")
    table = detect(source.infos, origin=str(source.path))
    return table.plan(source.infos, target_infos, origin=str(source.path)).view(source)


def infos_of_config(folder: Path) -> dict[str, TensorInfo] | None:
    """Return the native tensors that the config.json in `folder` describes, or None if there is no such file.

    Raises:
        UserError: config.json is no Vary config.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        shapes = parameter_shapes(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no Vary config ({error!r}); move it away or give the folder of Vary-toy") from None
    return _native_infos(shapes, origin=str(path))


def released_infos() -> dict[str, TensorInfo]:
    """Return the native tensors of the released Vary-toy."""
    return _native_infos(parameter_shapes(vary_toy_config()), origin="Vary-toy")


def _native_infos(shapes: Mapping[str, tuple[int, ...]], *, origin: str) -> dict[str, TensorInfo]:
    infos = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
    return dict(HF.plan(infos, origin=origin).infos)
