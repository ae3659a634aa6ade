"""Vary's "vision vocabulary": the SAM ViT-B image encoder and two strided convolutions (arXiv 2304.02643, 2312.06109).

N images, R and C rows and columns of patches, H heads, D head dimension, S window size. Parameter names are SAM's own.
"""

from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.models.common.activation import GELU
from mindvlm.models.common.linear import Linear
from mindvlm.models.common.norm import LayerNorm
from mindvlm.models.common.patches import PatchConv, grid_size

# Query rows are attended in slices of about this many scores per head, so that a global block never holds all of its
# 4096 x 4096 scores per head at once.
MAX_SCORES_PER_HEAD = 2**21


@dataclass(kw_only=True)
class VisionVocabularyConfig:
    """Sizes of the network. `image_size` in pixels, one number for a square or [height, width]."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    window_size: int = 14
    image_size: int | list[int] = 1024
    patch_size: int = 16
    mlp_ratio: float = 4
    out_chans: int = 256
    net_2_channels: int = 512
    net_3_channels: int = 1024


class LayerNorm2d(nn.Cell):
    """LayerNorm over the channels of (N, channels, R, C)."""

    def __init__(self, num_channels: int, *, eps: float, dtype):
        super().__init__()
        self.weight = Parameter(initializer("ones", (num_channels,), dtype), name="weight")
        self.bias = Parameter(initializer("zeros", (num_channels,), dtype), name="bias")
        self.layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x):
        h, _, _ = self.layer_norm(
            x.transpose((0, 2, 3, 1)).astype(ms.float32),
            self.weight.astype(ms.float32),
            self.bias.astype(ms.float32),
        )
        return h.transpose((0, 3, 1, 2)).astype(x.dtype)


class RelativePositionAttention(nn.Cell):
    """Attention over a grid with SAM's decomposed relative positions.

    score(q, k) = scale * q.k + q.Rh[row(q) - row(k)] + q.Rw[column(q) - column(k)]: the bias takes the unscaled query.
    x (N, R, C, width) -> the same shape.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], dtype):
        super().__init__()
        self.rows, self.columns = grid
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.width = width
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        self.proj = Linear(width, width, dtype=dtype)
        self.rel_pos_h = Parameter(initializer("zeros", (2 * self.rows - 1, self.head_dim), dtype), name="rel_pos_h")
        self.rel_pos_w = Parameter(initializer("zeros", (2 * self.columns - 1, self.head_dim), dtype), name="rel_pos_w")
        self.row_offsets = Tensor(table_offsets(self.rows), ms.int32)
        self.column_offsets = Tensor(table_offsets(self.columns), ms.int32)
        num_tokens = self.rows * self.columns
        self.slice_rows = max(1, min(self.rows, MAX_SCORES_PER_HEAD // (num_tokens * self.columns)))
        self.product = ops.BatchMatMul(transpose_b=True)
        self.weighted_values = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(self, x):
        num_images = x.shape[0]
        batch = num_images * self.num_heads
        tokens = self.rows * self.columns
        qkv = self.qkv(x).reshape((num_images, tokens, 3, self.num_heads, self.head_dim)).transpose((2, 0, 3, 1, 4))
        qkv = qkv.reshape((3, batch, tokens, self.head_dim))
        query, key, value = qkv[0], qkv[1], qkv[2]
        row_bias, column_bias = self.position_biases(query.reshape((batch, self.rows, self.columns, self.head_dim)))
        query = query * self.scale
        parts = ()
        for start in range(0, self.rows, self.slice_rows):
            stop = min(start + self.slice_rows, self.rows)
            scores = self.product(query[:, start * self.columns : stop * self.columns], key)
            scores = scores.reshape((batch, stop - start, self.columns, self.rows, self.columns))
            bias = ops.expand_dims(row_bias[:, start:stop], -1) + ops.expand_dims(column_bias[:, start:stop], -2)
            scores = (scores + bias).reshape((batch, (stop - start) * self.columns, tokens))
            weights = self.softmax(scores.astype(ms.float32)).astype(value.dtype)
            parts = parts + (self.weighted_values(weights, value),)
        out = parts[0] if len(parts) == 1 else ops.concat(parts, 1)
        out = out.reshape((num_images, self.num_heads, tokens, self.head_dim)).transpose((0, 2, 1, 3))
        return self.proj(out.reshape((num_images, self.rows, self.columns, self.width)))

    def position_biases(self, query):
        """query (B, R, C, D) -> q.Rh (B, R, C, R) and q.Rw (B, R, C, C)."""
        batch = query.shape[0]
        row_table = self.rel_pos_h[self.row_offsets]
        column_table = self.rel_pos_w[self.column_offsets]
        by_row = query.transpose((1, 0, 2, 3)).reshape((self.rows, batch * self.columns, self.head_dim))
        row_bias = self.product(by_row, row_table).reshape((self.rows, batch, self.columns, self.rows))
        by_column = query.transpose((2, 0, 1, 3)).reshape((self.columns, batch * self.rows, self.head_dim))
        column_bias = self.product(by_column, column_table).reshape((self.columns, batch, self.rows, self.columns))
        return row_bias.transpose((1, 0, 2, 3)), column_bias.transpose((1, 2, 0, 3))


def table_offsets(size: int) -> np.ndarray:
    """Row of a relative-position table for each pair (query, key): query - key + size - 1, (size, size) int32."""
    steps = np.arange(size, dtype=np.int32)
    return steps[:, None] - steps[None, :] + size - 1


class VocabularyMLP(nn.Cell):
    """lin2(gelu(lin1 x)) with the exact GELU."""

    def __init__(self, width: int, hidden: int, dtype):
        super().__init__()
        self.lin1 = Linear(width, hidden, dtype=dtype)
        self.lin2 = Linear(hidden, width, dtype=dtype)
        self.act = GELU()

    def construct(self, x):
        return self.lin2(self.act(self.lin1(x)))


class VocabularyBlock(nn.Cell):
    """Pre-norm block whose attention is global (`window_size` 0) or within windows. x (N, R, C, width)."""

    def __init__(self, config: VisionVocabularyConfig, grid: tuple[int, int], window_size: int, dtype):
        super().__init__()
        self.rows, self.columns = grid
        self.window_size = window_size
        width = config.embed_dim
        attended = (window_size, window_size) if window_size else grid
        self.norm1 = LayerNorm(width, eps=1e-6, dtype=dtype)
        self.attn = RelativePositionAttention(width, config.num_heads, attended, dtype)
        self.norm2 = LayerNorm(width, eps=1e-6, dtype=dtype)
        self.mlp = VocabularyMLP(width, int(width * config.mlp_ratio), dtype)
        if window_size:
            self.pad_rows = -self.rows % window_size
            self.pad_columns = -self.columns % window_size
            self.pad = ops.Pad(((0, 0), (0, self.pad_rows), (0, self.pad_columns), (0, 0)))

    def construct(self, x):
        h = self.norm1(x)
        if self.window_size:
            h = self.attend_in_windows(h)
        else:
            h = self.attn(h)
        x = x + h
        return x + self.mlp(self.norm2(x))

    def attend_in_windows(self, h):
        """The zero padding takes part in the attention unmasked, as in SAM, and is cut off afterwards."""
        num_images, _, _, width = h.shape
        size = self.window_size
        if self.pad_rows or self.pad_columns:
            h = self.pad(h)
        rows, columns = (self.rows + self.pad_rows) // size, (self.columns + self.pad_columns) // size
        h = h.reshape((num_images, rows, size, columns, size, width)).transpose((0, 1, 3, 2, 4, 5))
        h = self.attn(h.reshape((num_images * rows * columns, size, size, width)))
        h = h.reshape((num_images, rows, columns, size, size, width)).transpose((0, 1, 3, 2, 4, 5))
        h = h.reshape((num_images, rows * size, columns * size, width))
        return h[:, : self.rows, : self.columns]


class PatchEmbed(nn.Cell):
    """Holds the patch convolution under SAM's name `proj`."""

    def __init__(self, config: VisionVocabularyConfig, dtype):
        super().__init__()
        self.proj = PatchConv(3, config.embed_dim, config.patch_size, has_bias=True, dtype=dtype)

    def construct(self, pixels):
        return self.proj(pixels)


def conv3x3(in_channels: int, out_channels: int, stride: int, dtype) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, pad_mode="pad", padding=1, has_bias=False, dtype=dtype)


class VisionVocabulary(nn.Cell):
    """pixels (N, 3, height, width) -> tokens (N, R*C/16, net_3_channels), row-major."""

    def __init__(self, config: VisionVocabularyConfig, dtype=ms.float32):
        super().__init__()
        grid = grid_size(config.image_size, config.patch_size)
        self.out_width = config.net_3_channels
        self.patch_embed = PatchEmbed(config, dtype)
        self.pos_embed = Parameter(initializer("zeros", (1, *grid, config.embed_dim), dtype), name="pos_embed")
        windows = [0 if i in config.global_attn_indexes else config.window_size for i in range(config.depth)]
        self.blocks = nn.CellList([VocabularyBlock(config, grid, window, dtype) for window in windows])
        self.neck = nn.SequentialCell(
            nn.Conv2d(config.embed_dim, config.out_chans, 1, has_bias=False, dtype=dtype),
            LayerNorm2d(config.out_chans, eps=1e-6, dtype=dtype),
            conv3x3(config.out_chans, config.out_chans, 1, dtype),
            LayerNorm2d(config.out_chans, eps=1e-6, dtype=dtype),
        )
        self.net_2 = conv3x3(config.out_chans, config.net_2_channels, 2, dtype)
        self.net_3 = conv3x3(config.net_2_channels, config.net_3_channels, 2, dtype)

    def construct(self, pixels):
        return self.stages(pixels)[-1]

    def stages(self, pixels):
        """Every stage: patch embedding with positions and each block's output (N, R, C, width), then neck, net_2 and
        net_3 (N, channels, rows, columns), then the tokens."""
        x = self.patch_embed(pixels) + self.pos_embed
        states = (x,)
        for block in self.blocks:
            x = block(x)
            states = states + (x,)
        neck = self.neck(x.transpose((0, 3, 1, 2)))
        net_2 = self.net_2(neck)
        net_3 = self.net_3(net_2)
        tokens = net_3.reshape((net_3.shape[0], self.out_width, -1)).transpose((0, 2, 1))
        return states + (neck, net_2, net_3, tokens)
