"""The plain vision transformer: the towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), parameter names as
in Hugging Face.

N images, P patches, T tokens: P in SigLIP, P + 1 in CLIP; H heads, D head dimension.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.activation import activation
from mindvlm.nn.attention_core import attention_core
from mindvlm.nn.fused_attention import (
    HEAD_DIM_UNIT,
    FusedAttention,
    PaddedFusedAttention,
    can_fuse,
    padded_head_dim,
)
from mindvlm.nn.layout import permute_rows, widen
from mindvlm.nn.linear import Embedding, Linear
from mindvlm.nn.norm import LayerNorm
from mindvlm.nn.patches import PatchConv, grid_size


@dataclass(kw_only=True)
class VitConfig:
    """Sizes and dialect of a vision transformer.

    Attributes:
        dialect: "clip": a class token, patches without bias, a norm before the layers; "siglip": patches with bias and
            nothing else.
        image_size: in pixels, one number for a square or [height, width]; what fills no patch is left out.
    """

    dialect: Literal["clip", "siglip"] = "clip"

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int | list[int] = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class ClipEmbeddings(nn.Cell):
    """Class token and patches plus learned positions. pixels (N, 3, height, width) -> (N, T, hidden)."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.hidden_size = config.hidden_size
        rows, columns = grid_size(config.image_size, config.patch_size)
        self.num_tokens = rows * columns + 1
        self.class_embedding = Parameter(initializer("zeros", (config.hidden_size,), dtype), name="class_embedding")
        self.patch_embedding = PatchConv(3, config.hidden_size, config.patch_size, has_bias=False, dtype=dtype)
        self.position_embedding = Embedding(self.num_tokens, config.hidden_size, dtype=dtype)

    def construct(self, pixels):
        num_images = pixels.shape[0]
        patches = self.patch_embedding(pixels).reshape((num_images, self.num_tokens - 1, self.hidden_size))
        class_token = ops.broadcast_to(
            self.class_embedding.reshape((1, 1, self.hidden_size)), (num_images, 1, self.hidden_size)
        )
        tokens = ops.concat((class_token, patches), 1)
        return tokens + widen(self.position_embedding.weight, tokens)


class SiglipEmbeddings(nn.Cell):
    """Patches plus learned positions. pixels (N, 3, height, width) -> (N, T, hidden)."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        rows, columns = grid_size(config.image_size, config.patch_size)
        self.shape = (rows * columns, config.hidden_size)
        self.patch_embedding = PatchConv(3, config.hidden_size, config.patch_size, has_bias=True, dtype=dtype)
        self.position_embedding = Embedding(rows * columns, config.hidden_size, dtype=dtype)

    def construct(self, pixels):
        tokens = self.patch_embedding(pixels).reshape((pixels.shape[0], *self.shape))
        return tokens + widen(self.position_embedding.weight, tokens)


class VitAttention(nn.Cell):
    """Bidirectional multi-head attention with biases. x (N, T, hidden) -> the same shape."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.q_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        if not can_fuse(dtype, padded_head_dim(self.head_dim)):
            self.core = attention_core()
        elif self.head_dim % HEAD_DIM_UNIT:
            self.core = PaddedFusedAttention()
        else:
            self.core = FusedAttention()

    def split_heads(self, x):
        return permute_rows(x.reshape((x.shape[0], x.shape[1], self.num_heads, self.head_dim)), (0, 2, 1))

    def construct(self, x):
        query = self.split_heads(self.q_proj(x) * self.scale)
        out = self.core(query, self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        return self.out_proj(permute_rows(out, (0, 2, 1)).reshape(x.shape[:2] + (-1,)))


class VitMLP(nn.Cell):
    """fc2(act(fc1 x)). x (N, T, hidden) -> the same shape."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)
        self.act = activation(config.hidden_act)

    def construct(self, x):
        return self.fc2(self.act(self.fc1(x)))


class VitLayer(nn.Cell):
    """Pre-norm block. x (N, T, hidden) -> the same shape."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = VitAttention(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = VitMLP(config, dtype)

    def construct(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VitEncoder(nn.Cell):
    """The stack of layers."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.layers = nn.CellList([VitLayer(config, dtype) for _ in range(config.num_hidden_layers)])


class VisionTransformer(nn.Cell):
    """CLIP's vision tower.

    Args:
        config: sizes.
        select_layer: which entry of the list [embeddings, after layer 0, after layer 1, ...] is the feature, counted
            from the end when negative. Layers behind it keep their parameters and are not computed.
        num_dropped_tokens: as many tokens at the front, the class token for one, are no feature.
    """

    def __init__(self, config: VitConfig, *, select_layer: int = -2, num_dropped_tokens: int = 1, dtype=ms.float32):
        super().__init__()
        self.num_feature_layers = select_layer % (config.num_hidden_layers + 1)
        self.num_dropped_tokens = num_dropped_tokens
        self.embeddings = EMBEDDINGS[config.dialect](config, dtype)
        if config.dialect == "clip":
            # the checkpoint's own spelling
            self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.encoder = VitEncoder(config, dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def construct(self, pixels):
        """pixels (N, 3, height, width) -> features (N, T - dropped tokens, hidden), without the final norm."""
        x = self.embed(pixels)
        for i in range(self.num_feature_layers):
            x = self.encoder.layers[i](x)
        return self.finish(x)

    def finish(self, x):
        """The features, from what the last of `blocks` gives."""
        return x[:, self.num_dropped_tokens :] if self.num_dropped_tokens else x

    @property
    def blocks(self) -> list[nn.Cell]:
        """The layers that take part in the feature."""
        # a slice of a CellList would give the parameters new names
        return list(self.encoder.layers)[: self.num_feature_layers]

    def parameters_before_blocks(self) -> list[Parameter]:
        """The parameters of `embed`."""
        norm = [self.pre_layrnorm] if "pre_layrnorm" in self.name_cells() else []
        return [parameter for cell in (self.embeddings, *norm) for parameter in cell.get_parameters()]

    def embed(self, pixels):
        """What enters the first layer, (N, T, hidden)."""
        return self.pre_layrnorm(self.embeddings(pixels))

    def hidden_states(self, pixels):
        """Every entry of the feature list, (N, T, hidden) each, and the normed class token (N, hidden) behind them."""
        x = self.embed(pixels)
        states = (x,)
        for layer in self.encoder.layers:
            x = layer(x)
            states = states + (x,)
        return states, self.post_layernorm(x[:, 0])

    def unused_cells(self) -> list[nn.Cell]:
        """Cells whose parameters are in the checkpoint and take no part in the feature."""
        return [*list(self.encoder.layers)[self.num_feature_layers :], self.post_layernorm]


class SiglipTransformer(VisionTransformer):
    """SigLIP's vision tower without its pooling head."""

    def embed(self, pixels):
        return self.embeddings(pixels)


EMBEDDINGS = {"clip": ClipEmbeddings, "siglip": SiglipEmbeddings}
TOWERS = {"clip": VisionTransformer, "siglip": SiglipTransformer}
