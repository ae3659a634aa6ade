"""Tensor names of SliME: the folder that the last stage leaves, and single towers."""

from __future__ import annotations

from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.hf.names import decoder_parts, renames, tower_parts, unchanged, with_parameters
from mindvlm.models.hf.tower_folder import BESIDE, with_tower_config
from mindvlm.models.slime import released
from mindvlm.models.slime.hf_config import MODEL_TYPES, from_hf_config, is_slime
from mindvlm.models.slime.model_config import SlimeModelConfig, model_shapes
from mindvlm.weights.buffers import COMPUTED
from mindvlm.weights.config_json import ConfigTable, named_types, read_config
from mindvlm.weights.recognise import ConvertibleModel
from mindvlm.weights.rules.operations import Drop, Rename, Rule, Split
from mindvlm.weights.rules.table import Part, RuleTable

Infos = dict[str, TensorInfo]

FAMILY = NAME = "slime"
PUBLISHED = tuple(f"yifanzhang114/SliME-{name}" for name in ("vicuna-7B", "vicuna-13B", "Llama3-8B", "llama3-70B"))
ROW_TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")
"""Tensors with one row per token."""


STATISTICS = ("mean", "std")
"""Buffers of the adapter, of a statistic of the gate that the original computes and does not use."""


def resampler_rules(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a resampler, whose file has the projections of query, key and value in one tensor."""
    packed = tuple(
        Split(f"{source}attn.in_proj_{end}", tuple(f"{target}attn.{name}_proj.{end}" for name in "qkv"))
        for end in ("weight", "bias")
    )
    names = with_parameters(unchanged(("attn.out_proj", "ln_q", "ln_kv", "ln_post")))
    return (Rename(f"{source}query", f"{target}query"), *packed, *renames(source, target, names))


def adapter_parts(prefix: str = "model.") -> tuple[Part, ...]:
    """Returns the rules of the global adapter and of the local compression.

    The fixed positions are parts of their own: a file of trained tensors lacks them.
    """
    adapter, sampler, key = f"{prefix}mm_projector.", f"{prefix}sampler.post_qformer.", "projectors"
    linears = renames(adapter, "mm_projector.", with_parameters(unchanged(("projection.0", "projection.2"))))
    gate = renames(adapter, "mm_projector.", unchanged(("w_gate", "w_noise")))
    statistics = (Drop(adapter + name, COMPUTED) for name in STATISTICS)
    experts = resampler_rules(f"{adapter}attn.", "mm_projector.attn.")
    return (
        Part("global adapter", (*linears, *experts, *gate, *statistics), key),
        Part("global positions", (Rename(f"{adapter}attn.pos_embed", "mm_projector.attn.pos_embed"),), key),
        Part("local compression", resampler_rules(sampler, "sampler."), key),
        Part("local positions", (Rename(f"{sampler}pos_embed", "sampler.pos_embed"),), key),
    )


HF = RuleTable(
    "Hugging Face",
    FAMILY,
    (*decoder_parts("llama"), *tower_parts("model.vision_tower.vision_tower."), *adapter_parts()),
    NAME,
)
TOWER = RuleTable("tower repository", FAMILY, tower_parts("", drops_text=True), NAME)
NEW_TOWER = RuleTable("transformers 5 tower", FAMILY, tower_parts("", model=""), NAME)


def infos_of(config: SlimeModelConfig) -> Infos:
    """Returns the native tensors of a config."""
    return {name: TensorInfo(name, "float32", shape) for name, shape in model_shapes(config).items()}


def infos_of_folder(folder: Path) -> Infos | None:
    """Returns the native tensors of the config.json in `folder`.

    Returns None if the file is missing or describes another model.

    Raises:
        UserError: config.json names this model but has a wrong key or value.
    """
    config = read_config(folder)
    if config is None or not set(named_types(config)) & set(MODEL_TYPES) or not is_slime(config):
        return None
    path = str(folder / "config.json")
    try:
        whole = with_tower_config(config, folder)
        return infos_of(from_hf_config(whole, path=path, only_sizes=True))
    except UserError as error:
        raise ConfigTable(config, path).other_model(NAME, error) from None


def example_infos() -> Infos:
    """Returns the tensors of a model whose sizes all differ; see `require_consistent_sizes`."""
    sizes = {"hidden_size": 240, "vocab_size": 997, "intermediate_size": 307, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 3, "num_hidden_layers": 1, "mm_resampler_dim": 36}
    tower = {"model_type": "clip", "hidden_size": 256, "intermediate_size": 223, "num_attention_heads": 1}
    tower |= {"num_hidden_layers": 1, "patch_size": 5, "image_size": 35}
    return infos_of(from_hf_config(sizes, vision_config=tower, only_sizes=True))


MODELS = (
    ConvertibleModel(
        name=NAME,
        family=FAMILY,
        tables=(HF.identity("native"), HF, TOWER, NEW_TOWER),
        hf=HF,
        hf_tables=(HF, TOWER),
        model_types=MODEL_TYPES,
        target_infos=infos_of_folder,
        released_infos=lambda: infos_of(from_hf_config(released.vicuna_7b_config())),
        released_config=released.vicuna_7b_config,
        example_infos=example_infos,
        published=PUBLISHED,
        whole_config=with_tower_config,
        row_tables=ROW_TABLES,
        separate_parts={"vision_tower": "a tower's weights in place of the checkpoint's"},
        companions=(BESIDE,),
    ),
)
