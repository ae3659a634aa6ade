"""Vary's vision vocabulary: the SAM ViT-B image encoder and two strided convolutions (arXiv 2304.02643, 2312.06109).

N images, R rows and C columns of patches, B attention batch, T tokens of one attention, H heads, D head dim. Parameter
names are SAM's.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.nn.attention_core import attention_core
from mindvlm.nn.config import grid_size
from mindvlm.nn.fused_attention import FusedAttention, can_fuse, pad_head_dim, padded_head_dim
from mindvlm.nn.layout import permute_rows, widen
from mindvlm.nn.linear import Linear, matrices
from mindvlm.nn.mlp import activation
from mindvlm.nn.norm import LayerNorm
from mindvlm.nn.patches import Conv1x1, Conv3x3, PatchConv, append_zero_row


class ChannelNorm(LayerNorm):
    """SAM's norm over channels, `LayerNorm2d`, for channels in the last axis."""

    is_exempt_from_decay = False


class RelativePositionAttention(nn.Cell):
    """Attention over a grid with SAM's decomposed relative positions.

    score(q, k) = scale * q.k + q.Rh[row(q) - row(k)] + q.Rw[column(q) - column(k)]: the bias uses the unscaled query.
    x (N, R, C, width) -> the same shape.

    Attributes:
        native: see `native_form`; None without.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], dtype):
        super().__init__()
        self.rows, self.columns = grid
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        self.proj = Linear(width, width, dtype=dtype)
        self.rel_pos_h = Parameter(initializer("zeros", (2 * self.rows - 1, self.head_dim), dtype), name="rel_pos_h")
        self.rel_pos_w = Parameter(initializer("zeros", (2 * self.columns - 1, self.head_dim), dtype), name="rel_pos_w")
        self.row_offsets = Tensor(table_offsets(self.rows).reshape(-1), ms.int32)
        self.column_offsets = Tensor(table_offsets(self.columns).reshape(-1), ms.int32)
        self.cell_one_hots = Tensor(cell_one_hots(grid), dtype)
        self.product = ops.BatchMatMul(transpose_b=True)
        self.core = attention_core()
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.grid_attention()

    def within_windows(self, x):
        """x (N, rows, columns, width) of any whole grid, divided into windows by the kernel -> the same shape."""
        return self.proj(self.native(self.qkv(x), self.qkv.bias, self.rel_pos_h, self.rel_pos_w))

    def construct(self, x):
        num_images = x.shape[0]
        batch = num_images * self.num_heads
        tokens = self.rows * self.columns
        qkv = self.qkv(x).reshape((num_images, tokens, 3, self.num_heads, self.head_dim))
        qkv = permute_rows(qkv, (2, 0, 3, 1)).reshape((3 * batch, tokens, self.head_dim))
        query, key, value = ops.split(qkv, batch)
        query, key = self.append_positions(query, key)
        out = self.attend(query, key, value)
        out = permute_rows(out.reshape((num_images, self.num_heads, tokens, self.head_dim)), (0, 2, 1))
        return self.proj(out.reshape((num_images, self.rows, self.columns, self.num_heads * self.head_dim)))

    def attend(self, query, key, value):
        """Attends with query, key (B, T, D + R + C) and value (B, T, D) -> (B, T, D)."""
        return self.core(query, key, value)

    def append_positions(self, query, key):
        """Extends query, key (B, T, D) to (B, T, D + R + C) each, so that their product is the biased score.

        The query is extended by q.Rh and q.Rw for each row and column of keys, the key by one-hots of its own row and
        column. The product then adds the bias without storing it for all pairs.
        """
        batch, tokens, _ = query.shape
        grid = query.reshape((batch, self.rows, self.columns, self.head_dim))
        row_table = ops.gather(self.rel_pos_h, self.row_offsets, 0).reshape((self.rows, self.rows, self.head_dim))
        by_row = permute_rows(grid, (1, 0, 2)).reshape((self.rows, batch * self.columns, self.head_dim))
        row_bias = self.product(by_row, row_table).reshape((self.rows, batch, self.columns, self.rows))
        column_table = ops.gather(self.rel_pos_w, self.column_offsets, 0)
        column_table = column_table.reshape((self.columns, self.columns, self.head_dim))
        by_column = permute_rows(grid, (2, 0, 1)).reshape((self.columns, batch * self.rows, self.head_dim))
        column_bias = self.product(by_column, column_table).reshape((self.columns, batch, self.rows, self.columns))
        query = ops.concat(
            (
                query * self.scale,
                permute_rows(row_bias, (1, 0, 2)).reshape((batch, tokens, self.rows)),
                permute_rows(column_bias, (1, 2, 0)).reshape((batch, tokens, self.columns)),
            ),
            -1,
        )
        one_hots = ops.broadcast_to(self.cell_one_hots, (batch, tokens, self.rows + self.columns))
        return query, ops.concat((key, one_hots), -1)


class FusedRelativePositionAttention(RelativePositionAttention):
    """The same attention with the NPU's fused operator, which needs values as wide as the extended keys."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], dtype):
        super().__init__(width, num_heads, grid, dtype)
        self.core = FusedAttention()

    def attend(self, query, key, value):
        batch, tokens, width = query.shape
        padded = padded_head_dim(width)
        shape = (batch // self.num_heads, self.num_heads, tokens, padded)
        query, key = pad_head_dim(query, padded).reshape(shape), pad_head_dim(key, padded).reshape(shape)
        out = self.core(query, key, pad_head_dim(value, padded).reshape(shape))
        return out[..., : self.head_dim].reshape((batch, tokens, self.head_dim))


def cell_one_hots(grid: tuple[int, int]) -> np.ndarray:
    """Returns one-hots of the row and the column of each grid cell, row-major: (1, R*C, R + C) float32."""
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([np.eye(rows)[row], np.eye(columns)[column]], axis=1)[None].astype(np.float32)


def table_offsets(size: int) -> np.ndarray:
    """Returns the relative position index of each (query, key): query - key + size - 1, (size, size) int32."""
    steps = np.arange(size, dtype=np.int32)
    return steps[:, None] - steps[None, :] + size - 1


class VocabularyMLP(nn.Cell):
    """lin2(gelu(lin1(x))) with the exact GELU."""

    def __init__(self, width: int, hidden: int, dtype):
        super().__init__()
        self.lin1 = Linear(width, hidden, dtype=dtype)
        self.lin2 = Linear(hidden, width, dtype=dtype)
        self.act = activation("gelu")
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.plain_mlp(self.lin1, self.act, self.lin2)

    def construct(self, x):
        if self.native:
            return self.native(x, *matrices((self.lin1, self.lin2)))
        return self.lin2(self.act(self.lin1(x)))


class VocabularyBlock(nn.Cell):
    """Pre-norm block with global attention (`window_size` 0) or attention within windows. x (N, R, C, width)."""

    def __init__(self, config: VisionVocabularyConfig, grid: tuple[int, int], window_size: int, context: BuildContext):
        super().__init__()
        dtype = context.dtype
        self.rows, self.columns = grid
        self.window_size = window_size
        width = config.embed_dim
        attended = (window_size, window_size) if window_size else grid
        self.norm1 = LayerNorm(width, eps=1e-6, dtype=dtype)
        fused_width = padded_head_dim(width // config.num_heads + sum(attended))
        attention = FusedRelativePositionAttention if can_fuse(context, fused_width) else RelativePositionAttention
        self.attn = attention(width, config.num_heads, attended, dtype)
        self.norm2 = LayerNorm(width, eps=1e-6, dtype=dtype)
        self.mlp = VocabularyMLP(width, int(width * config.mlp_ratio), dtype)
        if window_size:
            to_windows, from_windows = window_rows(grid, window_size)
            self.to_windows = Tensor(to_windows.reshape(-1), ms.int32)
            self.from_windows = Tensor(from_windows.reshape(-1), ms.int32)

    def construct(self, x):
        h = self.norm1(x)
        if self.attn.native:
            h = self.attn.within_windows(h)
        elif self.window_size:
            h = self.attend_in_windows(h)
        else:
            h = self.attn(h)
        x = x + h
        return x + self.mlp(self.norm2(x))

    def attend_in_windows(self, h):
        """Attends within windows. As in SAM, the zero padding is not masked; it is removed afterwards."""
        num_images, rows, columns, width = h.shape
        size = self.window_size
        h = append_zero_row(h.reshape((num_images, rows * columns, width)))
        h = ops.gather(h, self.to_windows, 1)
        h = self.attn(h.reshape((-1, size, size, width)))
        h = ops.gather(h.reshape((num_images, -1, width)), self.from_windows, 1)
        return h.reshape((num_images, rows, columns, width))


def window_rows(grid: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices that partition a grid into windows of size x size, and those that reverse it.

    Returns:
        The flat grid index of each window cell, window by window (rows * columns for padding at the bottom and right),
        and the flat window index of each grid cell.
    """
    rows, columns = grid
    padded = np.full((rows + -rows % size, columns + -columns % size), rows * columns)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(grid)
    windows = padded.reshape(padded.shape[0] // size, size, padded.shape[1] // size, size).transpose(0, 2, 1, 3)
    to_windows = windows.reshape(-1)
    from_windows = np.empty(rows * columns, np.int64)
    real = to_windows < rows * columns
    from_windows[to_windows[real]] = np.flatnonzero(real)
    return to_windows, from_windows


class PatchEmbed(nn.Cell):
    """The patch convolution, under SAM's name `proj`."""

    def __init__(self, config: VisionVocabularyConfig, dtype):
        super().__init__()
        self.proj = PatchConv(3, config.embed_dim, config.patch_size, has_bias=True, dtype=dtype)

    def construct(self, pixels):
        return self.proj(pixels)


class VisionVocabulary(nn.Cell):
    """pixels (N, 3, height, width) -> tokens (N, R*C/16, net_3_channels), row-major."""

    def __init__(self, config: VisionVocabularyConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        dtype = context.dtype
        grid = grid_size(config.image_size, config.patch_size)
        self.out_width = config.net_3_channels
        self.patch_embed = PatchEmbed(config, dtype)
        self.pos_embed = Parameter(initializer("zeros", (1, *grid, config.embed_dim), dtype), name="pos_embed")
        windows = [0 if i in config.global_attn_indexes else config.window_size for i in range(config.depth)]
        self.blocks = nn.CellList([VocabularyBlock(config, grid, window, context) for window in windows])
        neck = config.out_chans
        half = (-(-grid[0] // 2), -(-grid[1] // 2))
        self.neck = nn.SequentialCell(
            Conv1x1(config.embed_dim, neck, dtype=dtype),
            ChannelNorm(neck, eps=1e-6, dtype=dtype),
            Conv3x3(neck, neck, grid, dtype=dtype),
            ChannelNorm(neck, eps=1e-6, dtype=dtype),
        )
        self.net_2 = Conv3x3(neck, config.net_2_channels, grid, stride=2, dtype=dtype)
        self.net_3 = Conv3x3(config.net_2_channels, config.net_3_channels, half, stride=2, dtype=dtype)

    def construct(self, pixels):
        return self.stages(pixels)[-1]

    def stages(self, pixels):
        """Returns all stages, channels last: patch embedding with positions, the output of each block, neck, net_2 and
        net_3 (N, rows, columns, width), then the tokens."""
        x = self.embed(pixels)
        states = (x,)
        for block in self.blocks:
            x = block(x)
            states = states + (x,)
        return states + self.finish(x)

    def embed(self, pixels):
        """Returns the input of the first block, (N, R, C, width)."""
        patches = self.patch_embed(pixels)
        return patches + widen(self.pos_embed, patches)

    def parameters_before_blocks(self) -> list[Parameter]:
        """Returns the parameters of `embed`."""
        return [*self.patch_embed.get_parameters(), self.pos_embed]

    def finish(self, x):
        """Returns the stages after the last block, from its output."""
        neck = self.neck(x)
        net_2 = self.net_2(neck)
        net_3 = self.net_3(net_2)
        tokens = net_3.reshape((net_3.shape[0], -1, self.out_width))
        return neck, net_2, net_3, tokens
