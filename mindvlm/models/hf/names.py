"""Tensor names of the parts that families share: transformers' decoders and vision towers, with any prefix."""

from collections.abc import Iterable, Mapping

from mindvlm.weights.buffers import COMPUTED
from mindvlm.weights.rules.operations import Drop, Rename, Rule, Tie
from mindvlm.weights.rules.table import Part, rename_all

_POOLING = "SigLIP's pooling head; the features are taken before it"
_TEXT_HALF = "the text half of the published CLIP or SigLIP; the model uses the vision tower only"
_NO_BIAS = "the head bias of the published Phi-2; the model has none"

_GATED = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkv")
_TOWER_LAYERS = tuple(
    f"encoder.layers.{{}}.{name}"
    for name in ("layer_norm1", "layer_norm2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
) + ("encoder.layers.{}.mlp.fc1", "encoder.layers.{}.mlp.fc2", "post_layernorm")


def renames(source: str, target: str, names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Returns a `Rename` for each row, with a prefix on each side."""
    return tuple(Rename(source + left, target + right) for left, right in names.items())


def unchanged(names: Iterable[str]) -> dict[str, str]:
    """Returns a row for each name that keeps it unchanged."""
    return {name: name for name in names}


def with_parameters(names: Mapping[str, str]) -> dict[str, str]:
    """Returns two rows for each row, its weight and its bias."""
    return {f"{left}.{ending}": f"{right}.{ending}" for left, right in names.items() for ending in ("weight", "bias")}


TOWER_NAMES = {
    **unchanged(("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")),
    **with_parameters(unchanged(_TOWER_LAYERS)),
}
"""Names that CLIP and SigLIP share, published -> native."""

CLIP_NAMES = {
    "embeddings.class_embedding": "embeddings.class_embedding",
    **with_parameters(unchanged(["pre_layrnorm"])),
}
"""Names that only CLIP has, published -> native."""

_SIGLIP_NAMES = unchanged(["embeddings.patch_embedding.bias"])


def _layer_names(dialect: str) -> dict[str, str]:
    """Returns the names inside a layer, published -> native."""
    if dialect == "phi":
        linears = {**unchanged((*_ATTENTION, "mlp.fc1", "mlp.fc2")), "self_attn.dense": "self_attn.o_proj"}
        return with_parameters({"input_layernorm": "input_layernorm", **linears})
    norms = ("input_layernorm", "post_attention_layernorm")
    plain = ("self_attn.o_proj.weight", *_GATED)
    if dialect == "qwen2":
        return {**with_parameters(unchanged(_ATTENTION)), **unchanged((*(f"{n}.weight" for n in norms), *plain))}
    if dialect == "stablelm":
        # attention biases are optional, so they form a separate part
        weights = unchanged((*(f"{name}.weight" for name in _ATTENTION), *plain))
        return {**with_parameters(unchanged(norms)), **weights}
    return unchanged((*(f"{name}.weight" for name in (*norms, *_ATTENTION)), *plain))


def decoder_parts(
    dialect: str,
    model: str = "model.",
    lm_head: str = "lm_head.",
    *,
    keeps_head_bias: bool = False,
    is_tied: bool = False,
) -> tuple[Part, ...]:
    """Returns the rules for the transformers names of a decoder.

    Args:
        dialect: a key of `mindvlm.models.hf.decoders.READERS`.
        model: prefix of the names without the head, with the dot.
        lm_head: prefix of the head, with the dot.
        keeps_head_bias: whether to keep the bias of Phi's head or to drop it.
        is_tied: whether the head shares the weight of the token embeddings.
    """
    native = "language_model."
    table, head = f"{model}embed_tokens.weight", f"{lm_head}weight"
    ends: tuple[Rule, ...] = (Rename(table, f"{native}embed_tokens.weight"), Rename(head, f"{native}lm_head.weight"))
    if is_tied:
        ends = (Tie((table, head), f"{native}embed_tokens.weight"),)
    rules: list[Rule] = [
        ends[0],
        *renames(f"{model}layers.{{}}.", f"{native}layers.{{}}.", _layer_names(dialect)),
        *ends[1:],
        Drop(f"{model}layers.{{}}.self_attn.rotary_emb.inv_freq", COMPUTED),
        Drop(f"{model}rotary_emb.inv_freq", COMPUTED),
    ]
    norm = f"{model}{'final_layernorm' if dialect == 'phi' else 'norm'}"
    has_norm_bias = dialect in ("phi", "stablelm")
    rules += rename_all(norm, f"{native}norm", ("weight", "bias") if has_norm_bias else ("weight",))
    if dialect == "phi" and not keeps_head_bias:
        rules.append(Drop(f"{lm_head}bias", _NO_BIAS))
    parts = [Part("language model", tuple(rules), "language_model")]
    if dialect == "stablelm":
        biases = unchanged(f"{name}.bias" for name in _ATTENTION)
        biases = tuple(renames(f"{model}layers.{{}}.", f"{native}layers.{{}}.", biases))
        parts.append(Part("attention biases", biases, "language_model", choice="language model"))
    if dialect == "phi" and keeps_head_bias:
        bias = Rename(f"{lm_head}bias", f"{native}lm_head.bias")
        parts.append(Part("head bias", (bias,), "language_model", choice="language model"))
    return tuple(parts)


def tower_parts(prefix: str, *, model: str = "vision_model.", drops_text: bool = False) -> tuple[Part, ...]:
    """Returns the rules for the Hugging Face names (`vision_model.*`) of a CLIP or SigLIP tower.

    The names that both share form one part; the names that only one has form another.

    Args:
        prefix: prefix of the names, with the dot.
        model: the second part of the prefix; transformers 5 omits it for a tower without the text half.
        drops_text: whether to drop the text half of a whole CLIP or SigLIP.
    """
    model, native = prefix + model, "vision_tower."
    drops = [Drop(f"{model}embeddings.position_ids", COMPUTED), Drop(f"{model}head.*", _POOLING)]
    if drops_text:
        names = ("text_model.*", "text_projection.weight", "visual_projection.weight", "logit_scale", "logit_bias")
        drops += [Drop(prefix + name, _TEXT_HALF) for name in names]
    key, choice = "vision_tower", "vision tower"
    return (
        Part("vision tower", (*renames(model, native, TOWER_NAMES), *drops), key),
        Part("class token", renames(model, native, CLIP_NAMES), key, choice=choice),
        Part("patch bias", renames(model, native, _SIGLIP_NAMES), key, choice=choice),
    )
