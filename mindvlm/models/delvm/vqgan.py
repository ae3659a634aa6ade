"""The VQGAN of DeLVM: openMUSE's taming VQGAN, a convolutional autoencoder with a codebook.

N pictures, R rows, K columns, P positions (R * K), E width of a code, V codes. Activations are channels-last.
"""

import math

import mindspore as ms
from mindspore import nn, ops

from mindvlm.models.delvm.model_config import VqganConfig
from mindvlm.models.delvm.vqgan_blocks import AttentionBlock, Conv, Downsample, GroupNorm, ResnetBlock, Upsample, swish
from mindvlm.nn.layout import widen
from mindvlm.nn.linear import Embedding


@ops.constexpr
def side(num_codes: int) -> int:
    """Returns the edge of a square of codes."""
    return math.isqrt(num_codes)


class Level(nn.Cell):
    """The blocks of one resolution, then a change of the resolution (`downsample` or `upsample`), if any."""

    def __init__(self, config: VqganConfig, level: int, in_channels: int, num_blocks: int):
        super().__init__()
        width = config.widths[level]
        groups = config.num_groups
        self.block = nn.CellList([ResnetBlock(width if i else in_channels, width, groups) for i in range(num_blocks)])
        has_attention = config.resolution // 2**level in config.attn_resolutions
        self.attn = nn.CellList([AttentionBlock(width, groups) for _ in range(num_blocks if has_attention else 0)])
        # the original skips the attention of a level with one block, although it has weights
        self.attends = has_attention and num_blocks > 1

    def blocks(self, x):
        for i in range(len(self.block)):
            x = self.block[i](x)
            if self.attends:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    def __init__(self, config: VqganConfig, level: int):
        below = config.widths[level - 1] if level else config.hidden_channels
        super().__init__(config, level, below, config.num_res_blocks)
        self.changes = level < config.num_levels - 1
        if self.changes:
            self.downsample = Downsample(config.widths[level], config.resample_with_conv)

    def construct(self, x):
        x = self.blocks(x)
        return self.downsample(x) if self.changes else x


class UpLevel(Level):
    def __init__(self, config: VqganConfig, level: int):
        super().__init__(config, level, config.widths[min(level + 1, config.num_levels - 1)], config.num_res_blocks + 1)
        self.changes = level > 0
        if self.changes:
            self.upsample = Upsample(config.widths[level], config.resample_with_conv)

    def construct(self, x):
        x = self.blocks(x)
        return self.upsample(x) if self.changes else x


class Middle(nn.Cell):
    """Two blocks of the lowest resolution, with attention between them if the config has it."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        width, groups = config.widths[-1], config.num_groups
        self.block_1, self.block_2 = ResnetBlock(width, width, groups), ResnetBlock(width, width, groups)
        self.has_attention = not config.no_attn_mid_block
        if self.has_attention:
            self.attn_1 = AttentionBlock(width, groups)

    def construct(self, x):
        x = self.block_1(x)
        if self.has_attention:
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Cell):
    """Pixels (N, R, K, 3) -> (N, R / 2^(levels - 1), K / 2^(levels - 1), z_channels)."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        self.conv_in = Conv(config.num_channels, config.hidden_channels)
        self.down = nn.CellList([DownLevel(config, level) for level in range(config.num_levels)])
        self.mid = Middle(config)
        self.norm_out = GroupNorm(config.widths[-1], config.num_groups)
        self.conv_out = Conv(config.widths[-1], config.z_channels)

    def construct(self, x):
        x = self.conv_in(x)
        for i in range(len(self.down)):
            x = self.down[i](x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Cell):
    """(N, r, k, z_channels) -> pixels (N, r * 2^(levels - 1), k * 2^(levels - 1), 3)."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        self.conv_in = Conv(config.z_channels, config.widths[-1])
        self.mid = Middle(config)
        self.up = nn.CellList([UpLevel(config, level) for level in range(config.num_levels)])
        self.norm_out = GroupNorm(config.widths[0], config.num_groups)
        self.conv_out = Conv(config.widths[0], config.num_channels)

    def construct(self, x):
        x = self.mid(self.conv_in(x))
        for i in range(len(self.up)):
            x = self.up[len(self.up) - 1 - i](x)
        return self.conv_out(swish(self.norm_out(x)))


class Quantizer(nn.Cell):
    """The codebook: `embedding` (V, E)."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        self.embedding = Embedding(config.num_embeddings, config.quantized_embed_dim)
        self.commitment_cost = config.commitment_cost
        self.matmul = ops.MatMul(transpose_b=True)

    def distances(self, latent):
        """Returns the squared distance of each position to each code: (N, r, k, E) -> (N * P, V)."""
        codebook = self.embedding.product.matrix(latent)
        flat = latent.reshape((-1, latent.shape[-1]))
        products = self.matmul(flat, codebook)
        lengths = (flat * flat).sum(1).reshape((-1, 1)), (codebook * codebook).sum(1).reshape((1, -1))
        return widen(lengths[0], products) + widen(lengths[1], products) - 2.0 * products

    def codes(self, latent):
        """Returns the nearest codes row by row, the first of equals: (N, r, k, E) -> (N, P) int32."""
        return ops.argmin(self.distances(latent), 1).astype(ms.int32).reshape((latent.shape[0], -1))

    def losses(self, latent, quantized):
        """Returns the codebook loss (scalar) and `quantized` with the gradient of `latent`.

        As in openMUSE, the commitment cost weights the term that moves the codes.
        """
        commitment = ops.square(ops.stop_gradient(quantized) - latent).mean()
        loss = commitment + self.commitment_cost * ops.square(quantized - ops.stop_gradient(latent)).mean()
        return loss, latent + ops.stop_gradient(quantized - latent)


class Vqgan(nn.Cell):
    """Pictures to codes and back. Pixels are in 0..1, (N, 3, height, width) float32, without normalization."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = Conv(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = Conv(config.quantized_embed_dim, config.z_channels, 1)

    def latent(self, pixels):
        """Returns what is quantized: pixels -> (N, r, k, E)."""
        return self.quant_conv(self.encoder(ops.transpose(pixels, (0, 2, 3, 1))))

    def encode(self, pixels):
        """Returns the codes of pictures row by row, (N, P) int32; -1 where the latent is NaN or infinite."""
        latent = self.latent(pixels)
        codes = self.quantize.codes(latent)
        # 0 times NaN or infinity is not 0
        is_finite = (latent * 0.0).sum(-1).reshape(codes.shape) == 0.0
        return ops.select(is_finite, codes, ops.full_like(codes, -1))

    def decode(self, quantized):
        """Returns pixels: (N, r, k, E) -> (N, 3, height, width); values may lie outside 0..1."""
        return ops.transpose(self.decoder(self.post_quant_conv(quantized)), (0, 3, 1, 2))

    def entries(self, codes, rows: int):
        """Returns the codebook rows of codes (N, P) as a map of `rows` rows, (N, rows, P / rows, E)."""
        return self.quantize.embedding(codes).reshape((codes.shape[0], rows, codes.shape[1] // rows, -1))

    def decode_codes(self, codes):
        """Returns pixels of square pictures: codes (N, P) int32 -> (N, 3, height, width)."""
        return self.decode(self.entries(codes, side(codes.shape[1])))

    def construct(self, pixels):
        """Returns the reconstruction and the codebook loss; trains encoder, decoder and codebook."""
        latent = self.latent(pixels)
        quantized = self.entries(self.quantize.codes(latent), latent.shape[1])
        loss, passed = self.quantize.losses(latent, quantized)
        return self.decode(passed), loss
