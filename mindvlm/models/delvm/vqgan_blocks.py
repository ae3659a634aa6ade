"""The blocks of DeLVM's VQGAN: convolutions, norms, residual and attention blocks, changes of the resolution.

N pictures, R rows, K columns, C channels, P positions (R * K). Activations are channels-last, (N, R, K, C), so that a
convolution is one matrix product.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.models.delvm.model_config import NUM_GROUPS
from mindvlm.nn.layout import read_with
from mindvlm.nn.patches import append_zero_row, neighbour_rows

NORM_EPS = 1e-6


@ops.constexpr
def neighbours(rows: int, columns: int, halves: bool) -> Tensor:
    """Returns the flat indices of the 3 x 3 neighbourhood of each output, (outputs * 9,) int32.

    `halves`: stride 2, with one row of padding below and one column to the right only.
    """
    indices = neighbour_rows((rows, columns), 1).reshape(rows, columns, 9)
    return Tensor((indices[1::2, 1::2] if halves else indices).reshape(-1).astype(np.int32))


@ops.constexpr
def doubled(rows: int, columns: int) -> Tensor:
    """Returns the flat index of the source of each position of a map with both edges doubled, int32."""
    flat = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    return Tensor(flat.repeat(2, 0).repeat(2, 1).reshape(-1))


class Conv(nn.Cell):
    """A 3 x 3 convolution with padding, or a 1 x 1 convolution. x (N, R, K, in) -> (N, R, K, out).

    `weight` (out, in, size, size) as in torch. With `halves`, the stride is 2: (N, R // 2, K // 2, out).
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, *, halves: bool = False):
        super().__init__()
        self.in_channels, self.out_channels, self.size, self.halves = in_channels, out_channels, size, halves
        shape = (out_channels, in_channels, size, size)
        self.weight = Parameter(initializer("zeros", shape, ms.float32), name="weight")
        self.bias = Parameter(initializer("zeros", (out_channels,), ms.float32), name="bias")
        self.matmul, self.bias_add = ops.MatMul(transpose_b=True), ops.BiasAdd()

    def construct(self, x):
        num_images, rows, columns, _ = x.shape
        flat = x.reshape((num_images, rows * columns, self.in_channels))
        if self.size == 3:
            flat = ops.gather(append_zero_row(flat), neighbours(rows, columns, self.halves), 1)
        flat = flat.reshape((-1, self.size**2 * self.in_channels))
        weight = read_with(self.weight, flat).reshape((self.out_channels, self.in_channels, -1)).transpose((0, 2, 1))
        y = self.matmul(flat, weight.reshape((self.out_channels, -1)))
        y = self.bias_add(y, read_with(self.bias, y))
        if self.halves:
            rows, columns = rows // 2, columns // 2
        return y.reshape((num_images, rows, columns, self.out_channels))


class GroupNorm(nn.Cell):
    """Normalization over positions and the channels of a group, with `weight` and `bias` (C,). x (N, R, K, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = Parameter(initializer("ones", (channels,), ms.float32), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,), ms.float32), name="bias")
        self.matmul, self.tile = ops.BatchMatMul(), ops.Tile()

    def construct(self, x):
        num_images, rows, columns, channels = x.shape
        flat = x.reshape((num_images, rows * columns, channels))
        # BroadcastTo takes 8 times as long as Tile on a CPU
        repeats = (1, rows * columns, 1)
        centred = flat - self.tile(self.group_means(flat), repeats)
        scale = ops.rsqrt(self.group_means(centred * centred) + NORM_EPS) * read_with(self.weight, x)
        shift = self.tile(read_with(self.bias, x).reshape((1, 1, -1)), (num_images, rows * columns, 1))
        return (centred * self.tile(scale, repeats) + shift).reshape(x.shape)

    def group_means(self, flat):
        """Returns the mean of the group of each channel: (N, P, C) -> (N, 1, C)."""
        num_images, num_positions, channels = flat.shape
        # a matrix product sums in blocks, which rounds less than a reduction
        means = self.matmul(ops.ones((num_images, 1, num_positions), flat.dtype), flat) / num_positions
        means = means.reshape((num_images, NUM_GROUPS, -1)).mean(-1, keep_dims=True)
        shape = (num_images, NUM_GROUPS, channels // NUM_GROUPS)
        return ops.broadcast_to(means, shape).reshape((num_images, 1, channels))


def swish(x):
    return x * ops.sigmoid(x)


class ResnetBlock(nn.Cell):
    """x + conv(swish(norm(conv(swish(norm x))))), with a 1 x 1 convolution of x if the widths differ."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(in_channels), Conv(in_channels, out_channels)
        self.norm2, self.conv2 = GroupNorm(out_channels), Conv(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.nin_shortcut = Conv(in_channels, out_channels, 1)

    def construct(self, x):
        y = self.conv1(swish(self.norm1(x)))
        y = self.conv2(swish(self.norm2(y)))
        return y + (self.nin_shortcut(x) if self.has_shortcut else x)


class AttentionBlock(nn.Cell):
    """x + attention of one head among all positions of the norm of x. (N, R, K, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v = (Conv(channels, channels, 1) for _ in range(3))
        self.proj_out = Conv(channels, channels, 1)
        self.scores, self.weighted, self.softmax = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(), ops.Softmax(-1)

    def construct(self, x):
        normed = self.norm(x)
        shape = (x.shape[0], -1, x.shape[-1])
        query, key, value = (part(normed).reshape(shape) for part in (self.q, self.k, self.v))
        weights = self.softmax(self.scores(query, key) * x.shape[-1] ** -0.5)
        return x + self.proj_out(self.weighted(weights, value).reshape(x.shape))


class Downsample(nn.Cell):
    """Halves rows and columns, with a convolution or by averaging."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = Conv(channels, channels, halves=True)

    def construct(self, x):
        if self.with_conv:
            return self.conv(x)
        num_images, rows, columns, channels = x.shape
        x = x[:, : rows // 2 * 2, : columns // 2 * 2]
        return x.reshape((num_images, rows // 2, 2, columns // 2, 2, channels)).mean((2, 4))


class Upsample(nn.Cell):
    """Repeats rows and columns, then convolves."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = Conv(channels, channels)

    def construct(self, x):
        num_images, rows, columns, channels = x.shape
        wide = ops.gather(x.reshape((num_images, -1, channels)), doubled(rows, columns), 1)
        wide = wide.reshape((num_images, 2 * rows, 2 * columns, channels))
        return self.conv(wide) if self.with_conv else wide
