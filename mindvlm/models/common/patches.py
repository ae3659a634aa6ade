"""Cutting an image into patches and projecting each one."""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer


def height_and_width(size: int | list[int]) -> tuple[int, int]:
    """A square's side or a [height, width] pair as a tuple."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def grid_size(image_size: int | list[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; a rest that fills no patch is dropped, as a strided convolution does."""
    height, width = height_and_width(image_size)
    return height // patch_size, width // patch_size


class PatchConv(nn.Cell):
    """The convolution whose stride equals its kernel, as one matrix product over flattened patches.

    Shapes: `weight` (out_channels, in_channels, patch, patch) as in torch;
    x (N, in_channels, height, width) -> (N, rows, columns, out_channels).
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int, *, has_bias: bool, dtype=ms.float32):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = out_channels
        self.patch_values = in_channels * patch_size * patch_size
        shape = (out_channels, in_channels, patch_size, patch_size)
        self.weight = Parameter(initializer("zeros", shape, dtype), name="weight")
        self.has_bias = has_bias
        if has_bias:
            self.bias = Parameter(initializer("zeros", (out_channels,), dtype), name="bias")
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x):
        num_images, channels, height, width = x.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        x = x[:, :, : rows * size, : columns * size]
        x = x.reshape((num_images, channels, rows, size, columns, size)).transpose((0, 2, 4, 1, 3, 5))
        y = self.matmul(x.reshape((-1, self.patch_values)), self.weight.reshape((self.out_channels, -1)))
        if self.has_bias:
            y = y + self.bias
        return y.reshape((num_images, rows, columns, self.out_channels))
