"""The plain vision transformer: CLIP's tower (arXiv 2103.00020), parameter names as in Hugging Face.

N images, P patches, T = P + 1 tokens, H heads, D head dimension.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.models.common.activation import activation
from mindvlm.models.common.attention_core import attention_core
from mindvlm.models.common.fused_attention import FusedAttention, can_fuse
from mindvlm.models.common.layout import permute_rows, widen
from mindvlm.models.common.linear import Embedding, Linear
from mindvlm.models.common.norm import LayerNorm
from mindvlm.models.common.patches import PatchConv, grid_size


@dataclass(kw_only=True)
class VitConfig:
    """Sizes of a vision transformer. `image_size` in pixels, one number for a square or [height, width]."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int | list[int] = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class VitEmbeddings(nn.Cell):
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
        self.core = FusedAttention() if can_fuse(dtype, self.head_dim) else attention_core()

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
    """

    def __init__(self, config: VitConfig, *, select_layer: int = -2, dtype=ms.float32):
        super().__init__()
        self.num_feature_layers = select_layer % (config.num_hidden_layers + 1)
        self.embeddings = VitEmbeddings(config, dtype)
        # the checkpoint's own spelling
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.encoder = VitEncoder(config, dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def construct(self, pixels):
        """pixels (N, 3, height, width) -> patch features (N, P, hidden), without class token and final norm."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for i in range(self.num_feature_layers):
            x = self.encoder.layers[i](x)
        return x[:, 1:]

    def hidden_states(self, pixels):
        """Every entry of the feature list, (N, T, hidden) each, and the normed class token (N, hidden) behind them."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        states = (x,)
        for layer in self.encoder.layers:
            x = layer(x)
            states = states + (x,)
        return states, self.post_layernorm(x[:, 0])
