"""Names of TinyLLaVA's parts: the three decoders, both towers and the connectors, behind whatever prefix a file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvlm.models.vary.tower_names import CLIP_LINEARS, COMPUTED, renames, unchanged, with_parameters
from mindvlm.weights.rules.operations import Drop, Rename, Rule
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

FAMILY = "tinyllava"
FACTORY, LLAVA = "TinyLLaVA Factory", "transformers llava"
DIALECTS = ("phi", "stablelm", "llama")
MAX_MLP_LAYERS = 8
_POOLING = "SigLIP's pooling head; the feature is taken before it"
_TEXT = "the text half of the published CLIP or SigLIP; the model takes the vision tower only"
_NO_BIAS = "the bias of the published Phi-2's head, which TinyLLaVA has not"

_GATED = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkv")
_TOWER_NORMS = ("encoder.layers.{}.layer_norm1", "encoder.layers.{}.layer_norm2", "post_layernorm")
_RESAMPLER = (
    "queries",
    *(f"resampler_blocks.{{}}.{norm}.{end}" for norm in ("norm_image", "norm_hidden") for end in ("weight", "bias")),
    *(f"resampler_blocks.{{}}.to_{name}.weight" for name in ("q", "k", "v", "out")),
    *(f"resampler_blocks.{{}}.feed_forward.{name}" for name in ("0.weight", "0.bias", "1.weight", "3.weight")),
    "post_norm.weight",
    "post_norm.bias",
    "final_proj.weight",
)


def _layer_names(dialect: str) -> dict[str, str]:
    """Names inside a layer, theirs -> native."""
    if dialect == "phi":
        linears = {**unchanged((*_ATTENTION, "mlp.fc1", "mlp.fc2")), "self_attn.dense": "self_attn.o_proj"}
        return with_parameters({"input_layernorm": "input_layernorm", **linears})
    norms = ("input_layernorm", "post_attention_layernorm")
    plain = ("self_attn.o_proj.weight", *_GATED)
    if dialect == "stablelm":
        # biases of the attention are a part of their own, which not every model has
        weights = unchanged((*(f"{name}.weight" for name in _ATTENTION), *plain))
        return {**with_parameters(unchanged(norms)), **weights}
    return unchanged((*(f"{name}.weight" for name in (*norms, *_ATTENTION)), *plain))


def decoder_parts(dialect: str, prefix: str = "", *, keeps_head_bias: bool = False) -> tuple[Part, ...]:
    """A decoder whose transformers names stand behind `prefix`.

    Args:
        keeps_head_bias: Phi's head has its bias, as TinyLLaVA Factory keeps it; otherwise it is dropped.
    """
    native = "language_model."
    rules: list[Rule] = [
        Rename(f"{prefix}model.embed_tokens.weight", f"{native}embed_tokens.weight"),
        *renames(f"{prefix}model.layers.{{}}.", f"{native}layers.{{}}.", _layer_names(dialect)),
        Rename(f"{prefix}lm_head.weight", f"{native}lm_head.weight"),
        Drop(f"{prefix}model.layers.{{}}.self_attn.rotary_emb.inv_freq", COMPUTED),
        Drop(f"{prefix}model.rotary_emb.inv_freq", COMPUTED),
    ]
    norm = f"{prefix}model.{'final_layernorm' if dialect == 'phi' else 'norm'}"
    rules += rename_all(norm, f"{native}norm", ("weight",) if dialect == "llama" else ("weight", "bias"))
    if dialect == "phi" and not keeps_head_bias:
        rules.append(Drop(f"{prefix}lm_head.bias", _NO_BIAS))
    parts = [Part("language model", tuple(rules), "language_model")]
    if dialect == "stablelm":
        biases = unchanged(f"{name}.bias" for name in _ATTENTION)
        biases = tuple(renames(f"{prefix}model.layers.{{}}.", f"{native}layers.{{}}.", biases))
        parts.append(Part("attention biases", biases, "language_model", choice="language model"))
    if dialect == "phi" and keeps_head_bias:
        bias = Rename(f"{prefix}lm_head.bias", f"{native}lm_head.bias")
        parts.append(Part("head bias", (bias,), "language_model", choice="language model"))
    return tuple(parts)


def tower_parts(prefix: str, *, model: str = "vision_model.", drops_text: bool = False) -> tuple[Part, ...]:
    """CLIP or SigLIP whose Hugging Face names (`vision_model.*`) stand behind `prefix`.

    What the two have in common is one part, what each has besides is another.

    Args:
        model: how all of these names begin; transformers 5 leaves it out where the tower is no part of a whole CLIP.
        drops_text: the file may be a whole CLIP or SigLIP, whose text half is left out.
    """
    model, native = prefix + model, "vision_tower."
    both = {
        **unchanged(("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")),
        **with_parameters(unchanged((*_TOWER_NORMS, *CLIP_LINEARS))),
    }
    drops = [Drop(f"{model}embeddings.position_ids", COMPUTED), Drop(f"{model}head.*", _POOLING)]
    if drops_text:
        names = ("text_model.*", "text_projection.weight", "visual_projection.weight", "logit_scale", "logit_bias")
        drops += [Drop(prefix + name, _TEXT) for name in names]
    clip = {"embeddings.class_embedding": "embeddings.class_embedding", **with_parameters(unchanged(("pre_layrnorm",)))}
    siglip = unchanged(("embeddings.patch_embedding.bias",))
    key, choice = "vision_tower", "vision tower"
    return (
        Part("vision tower", (*renames(model, native, both), *drops), key),
        Part("class token", renames(model, native, clip), key, choice=choice),
        Part("patch bias", renames(model, native, siglip), key, choice=choice),
    )


def connector_parts(
    prefix: str, layers: Mapping[str, str] | None = None, *, newline: str | None = None
) -> tuple[Part, ...]:
    """The connector, of any kind, whose names stand behind `prefix`; each kind is a part, and each Linear of an MLP.

    Args:
        prefix: without the dot.
        layers: the Linears of an MLP, theirs -> native number, where they have other names and there is no other kind.
        newline: name of the learned row that ends lines of feature rows, where there may be one.
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


def config_naming(config: Mapping[str, Any]) -> str | None:
    """Return the naming of the files beside a config.json of another layout than TinyLLaVABench's, None for that."""
    if not isinstance(config.get("text_config"), Mapping):
        return None
    return LLAVA if config.get("model_type") == "llava" else FACTORY


def tables_of(dialect: str, name: str) -> tuple[RuleTable, ...]:
    """The namings of a TinyLLaVA with that decoder: native first, then TinyLLaVABench's, then the others."""

    def table(title: str, *parts: Part) -> RuleTable:
        return RuleTable(title, FAMILY, parts, name)

    bench = table(
        "Hugging Face",
        *decoder_parts(dialect),
        *tower_parts("model.vision_tower.vision_tower."),
        *connector_parts("model.mm_projector", newline="model.image_newline"),
    )
    factory = table(
        FACTORY,
        *decoder_parts(dialect, "language_model.", keeps_head_bias=True),
        *tower_parts("vision_tower._vision_tower."),
        *connector_parts("connector._connector", newline="image_newline"),
    )
    tables = [factory.identity("native"), bench, factory]
    if dialect == "llama":
        linears = {"linear_1": "0", "linear_2": "2"}
        for title, model in ((LLAVA, "vision_model."), ("transformers 5 llava", "")):
            decoder = decoder_parts(dialect, "language_model.")
            connector = connector_parts("multi_modal_projector", linears)
            tables.append(table(title, *decoder, *tower_parts("vision_tower.", model=model), *connector))
    tables.append(table("tower repository", *tower_parts("", drops_text=True)))
    tables.append(table("transformers 5 tower", *tower_parts("", model="")))
    tables.append(table("connector beside an adapter", *connector_parts("base_model.model.model.mm_projector")))
    return tuple(tables)
