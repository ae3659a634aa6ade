"""The blocks of DeLVM's VQGAN: convolutions, norms, residual and attention blocks, changes of the resolution.

N pictures, R rows, K columns, C channels, P positions (R * K). Activations are channels-last, (N, R, K, C), so that a
convolution is one matrix product.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

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
def readers(rows: int, columns: int, halves: bool) -> Tensor:
    """Returns the flat index of the output that reads each input at each of its 9 places, (inputs * 9,) int32.

    The index of the row behind the last output stands for none.
    """
    read = np.asarray(neighbours(rows, columns, halves).asnumpy()).reshape(-1, 9)
    indices = np.full((rows * columns + 1, 9), len(read), np.int32)
    for place in range(9):
        indices[read[:, place], place] = np.arange(len(read))
    return Tensor(indices[:-1].reshape(-1))


@ops.constexpr
def doubled(rows: int, columns: int) -> Tensor:
    """Returns the flat index of the source of each position of a map with both edges doubled, int32."""
    flat = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    return Tensor(flat.repeat(2, 0).repeat(2, 1).reshape(-1))


@ops.constexpr
def copies(rows: int, columns: int) -> list[Tensor]:
    """Returns the flat indices of the 4 copies of each position in a map with both edges doubled, int32."""
    flat = np.arange(4 * rows * columns, dtype=np.int32).reshape(2 * rows, 2 * columns)
    return [Tensor(flat[row::2, column::2].reshape(-1)) for row in (0, 1) for column in (0, 1)]


class Product3x3(nn.Cell):
    """The products of a 3 x 3 convolution: x (N, R, K, in), weight (out, 9 * in) -> (N * outputs, out).

    The derived gradient scatters, which takes several times as long as the gathers of this one.
    """

    def __init__(self, halves: bool):
        super().__init__()
        self.halves = halves
        self.matmul, self.by_rows = ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)

    def patches(self, x):
        num_images, rows, columns, channels = x.shape
        flat = append_zero_row(x.reshape((num_images, rows * columns, channels)))
        return ops.gather(flat, neighbours(rows, columns, self.halves), 1).reshape((-1, 9 * channels))

    def construct(self, x, weight):
        return self.matmul(self.patches(x), weight)

    def bprop(self, x, weight, out, dout):
        num_images, rows, columns, channels = x.shape
        num_out = weight.shape[0]
        flat = append_zero_row(dout.reshape((num_images, -1, num_out)))
        around = ops.gather(flat, readers(rows, columns, self.halves), 1).reshape((-1, 9 * num_out))
        turned = weight.reshape((num_out, 9, channels)).transpose((2, 1, 0)).reshape((channels, -1))
        return self.matmul(around, turned).reshape(x.shape), self.by_rows(dout, self.patches(x))


class Double(nn.Cell):
    """Repeats rows and columns: (N, R, K, C) -> (N, 2 R, 2 K, C)."""

    def construct(self, x):
        num_images, rows, columns, channels = x.shape
        wide = ops.gather(x.reshape((num_images, -1, channels)), doubled(rows, columns), 1)
        return wide.reshape((num_images, 2 * rows, 2 * columns, channels))

    def bprop(self, x, out, dout):
        num_images, rows, columns, channels = x.shape
        flat, total = dout.reshape((num_images, -1, channels)), 0
        for indices in copies(rows, columns):
            total = total + ops.gather(flat, indices, 1)
        return (total.reshape(x.shape),)


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
        self.product = Product3x3(halves)

    def construct(self, x):
        num_images, rows, columns, _ = x.shape
        weight = read_with(self.weight, x).reshape((self.out_channels, self.in_channels, -1)).transpose((0, 2, 1))
        weight = weight.reshape((self.out_channels, -1))
        y = self.product(x, weight) if self.size == 3 else self.matmul(x.reshape((-1, self.in_channels)), weight)
        y = self.bias_add(y, read_with(self.bias, y))
        if self.halves:
            rows, columns = rows // 2, columns // 2
        return y.reshape((num_images, rows, columns, self.out_channels))


class GroupNorm(nn.Cell):
    """Normalization over positions and the channels of a group, with `weight` and `bias` (C,). x (N, R, K, C)."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.num_groups = num_groups
        self.weight = Parameter(initializer("ones", (channels,), ms.float32), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,), ms.float32), name="bias")
        self.matmul, self.bias_add = ops.BatchMatMul(), ops.BiasAdd()

    def construct(self, x):
        num_images, rows, columns, channels = x.shape
        flat = x.reshape((num_images, rows * columns, channels))
        centred = flat - self.repeat(self.group_means(flat), flat)
        scale = ops.rsqrt(self.group_means(centred * centred) + NORM_EPS) * read_with(self.weight, x)
        y = (centred * self.repeat(scale, flat)).reshape((-1, channels))
        return self.bias_add(y, read_with(self.bias, y)).reshape(x.shape)

    def repeat(self, row, flat):
        """Repeats (N, 1, C) at all positions. The gradient of a product is faster than that of Tile or BroadcastTo."""
        return self.matmul(ops.ones((flat.shape[0], flat.shape[1], 1), flat.dtype), row)

    def group_means(self, flat):
        """Returns the mean of the group of each channel: (N, P, C) -> (N, 1, C)."""
        num_images, num_positions, channels = flat.shape
        # a matrix product sums in blocks, which rounds less than a reduction
        means = self.matmul(ops.ones((num_images, 1, num_positions), flat.dtype), flat) / num_positions
        means = means.reshape((num_images, self.num_groups, -1)).mean(-1, keep_dims=True)
        shape = (num_images, self.num_groups, channels // self.num_groups)
        return ops.broadcast_to(means, shape).reshape((num_images, 1, channels))


def swish(x):
    return x * ops.sigmoid(x)


class ResnetBlock(nn.Cell):
    """x + conv(swish(norm(conv(swish(norm x))))), with a 1 x 1 convolution of x if the widths differ."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(in_channels, num_groups), Conv(in_channels, out_channels)
        self.norm2, self.conv2 = GroupNorm(out_channels, num_groups), Conv(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.nin_shortcut = Conv(in_channels, out_channels, 1)

    def construct(self, x):
        y = self.conv1(swish(self.norm1(x)))
        y = self.conv2(swish(self.norm2(y)))
        return y + (self.nin_shortcut(x) if self.has_shortcut else x)


class AttentionBlock(nn.Cell):
    """x + attention of one head among all positions of the norm of x. (N, R, K, C)."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups)
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
        self.with_conv, self.double = with_conv, Double()
        if with_conv:
            self.conv = Conv(channels, channels)

    def construct(self, x):
        wide = self.double(x)
        return self.conv(wide) if self.with_conv else wide
