"""What brings a tower's features to the width of the decoder.

N images, T tokens an image.
"""

import re
from dataclasses import dataclass

import mindspore as ms
from mindspore import nn

from mindvlm.core.errors import UserError
from mindvlm.nn.activation import activation
from mindvlm.nn.linear import Linear
from mindvlm.nn.resampler import Resampler

MAX_MLP_LAYERS = 8
# of the published code: 12 heads, but 8 where the width is 512
RESAMPLER_HEADS, RESAMPLER_512_HEADS = 12, 8


@dataclass(kw_only=True)
class ConnectorConfig:
    """The kind of connector, with the sizes of a resampler.

    Attributes:
        type: "linear"; "mlpNx_gelu": N Linears with exact GELUs between them; "resampler"; or "identity".
    """

    type: str = "mlp2x_gelu"
    resampler_hidden_size: int = 768
    num_queries: int = 128
    num_resampler_layers: int = 3

    def __post_init__(self):
        if self.type not in ("linear", "resampler", "identity") and not 1 <= self.num_linears <= MAX_MLP_LAYERS:
            raise UserError(
                f"connector type is {self.type!r}; expected linear, mlpNx_gelu with N from 1 to {MAX_MLP_LAYERS}, "
                "resampler or identity"
            )
        if self.type == "resampler":
            sizes = (self.resampler_hidden_size, self.num_queries, self.num_resampler_layers)
            if min(sizes) < 1 or self.resampler_hidden_size % self.num_heads:
                raise UserError(
                    f"connector: resampler_hidden_size is {sizes[0]}, num_queries {sizes[1]}, num_resampler_layers "
                    f"{sizes[2]}; expected a multiple of {self.num_heads} heads, and at least 1 each"
                )

    @property
    def num_linears(self) -> int:
        """N of mlpNx_gelu; 0 for other types."""
        found = re.fullmatch(r"mlp(\d{1,3})x_gelu", self.type)
        return int(found.group(1)) if found else 0

    @property
    def num_heads(self) -> int:
        return RESAMPLER_512_HEADS if self.resampler_hidden_size == 512 else RESAMPLER_HEADS

    def num_tokens(self, num_features: int) -> int:
        """Tokens that an image of so many features becomes."""
        return self.num_queries if self.type == "resampler" else num_features


def build_connector(config: ConnectorConfig, image_width: int, hidden_size: int, dtype=ms.float32) -> nn.Cell:
    """The connector of a config: features (N, T, image_width) -> (N, T or queries, hidden_size).

    Raises:
        UserError: "identity" between two widths.
    """
    if config.type == "linear":
        return Linear(image_width, hidden_size, dtype=dtype)
    if config.type == "resampler":
        return Resampler(
            image_width,
            width=config.resampler_hidden_size,
            out_width=hidden_size,
            num_queries=config.num_queries,
            num_layers=config.num_resampler_layers,
            num_heads=config.num_heads,
            dtype=dtype,
        )
    if config.type == "identity":
        if image_width != hidden_size:
            raise UserError(
                f"connector type is 'identity' but the tower's features have {image_width} channels and the decoder "
                f"{hidden_size}; take another type"
            )
        return nn.Identity()
    cells = [Linear(image_width, hidden_size, dtype=dtype)]
    for _ in range(config.num_linears - 1):
        cells += [activation("gelu"), Linear(hidden_size, hidden_size, dtype=dtype)]
    return nn.SequentialCell(cells)
