"""The published names of a Mosaic, as a table that leads to the native ones."""

from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.models.hf.names import decoder_parts
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.shapes import decoder_shapes, linear_shapes
from mindvlm.weights.recognise import ConvertibleModel
from mindvlm.weights.rules.operations import Rename
from mindvlm.weights.rules.table import Part, RuleTable

FAMILY = "mosaic"
SIZES = dict(vocab_size=330, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
             intermediate_size=48, qkv_bias=False, use_dynamic_ntk=False, use_logn_attn=False)  # fmt: skip
DIFFERENT = SIZES | dict(vocab_size=997, hidden_size=202, num_hidden_layers=1, num_attention_heads=3, head_dim=67,
                         intermediate_size=307)  # fmt: skip

_COLOURS = tuple(Rename(f"pixels.to_rows.{end}", f"colours.{end}") for end in ("weight", "bias"))
HF = RuleTable("Hugging Face", FAMILY, (*decoder_parts("llama"), Part("colours", _COLOURS, "projectors")), FAMILY)


def infos_of(sizes: dict[str, Any]) -> dict[str, TensorInfo]:
    config = DecoderConfig(**sizes)
    shapes = decoder_shapes(config, "language_model.") | linear_shapes("colours", config.hidden_size, 3)
    return {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}


def infos_of_folder(folder: Path) -> None:
    """A Mosaic has no config.json."""


MODELS = (
    ConvertibleModel(
        name="mosaic",
        family=FAMILY,
        tables=(HF.identity("native"), HF),
        hf=HF,
        hf_tables=(HF,),
        model_types=("mosaic",),
        target_infos=infos_of_folder,
        released_infos=lambda: infos_of(SIZES),
        released_config=lambda: dict(SIZES),
        example_infos=lambda: infos_of(DIFFERENT),
    ),
)
