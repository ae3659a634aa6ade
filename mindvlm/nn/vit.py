"""Vision transformers: the towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), with the parameter names of
Hugging Face.

N images, P patches, T tokens: P in SigLIP, P + 1 in CLIP.
"""

from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.nn.config import VitConfig
from mindvlm.nn.layout import widen
from mindvlm.nn.linear import Embedding, Linear, matrices
from mindvlm.nn.mlp import PlainMLP
from mindvlm.nn.multi_head import MultiHeadCore
from mindvlm.nn.norm import LayerNorm
from mindvlm.nn.patches import PatchConv


class ClipEmbeddings(nn.Cell):
    """Class token and patches plus learned positions. pixels (N, 3, height, width) -> (N, T, hidden)."""

    def __init__(self, config: VitConfig, dtype):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_tokens = config.num_tokens
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
        self.shape = (config.num_tokens, config.hidden_size)
        self.patch_embedding = PatchConv(3, config.hidden_size, config.patch_size, has_bias=True, dtype=dtype)
        self.position_embedding = Embedding(config.num_tokens, config.hidden_size, dtype=dtype)

    def construct(self, pixels):
        tokens = self.patch_embedding(pixels).reshape((pixels.shape[0], *self.shape))
        return tokens + widen(self.position_embedding.weight, tokens)


class VitAttention(nn.Cell):
    """Bidirectional multi-head attention with biases. x (N, T, hidden) -> the same shape.

    Attributes:
        native: the projections in one operator, see `native_form`; None without.
    """

    def __init__(self, config: VitConfig, context: BuildContext):
        super().__init__()
        dtype = context.dtype
        self.q_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.core = MultiHeadCore(config.hidden_size, config.num_attention_heads, context)
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.joint_products(self.q_proj, self.k_proj, self.v_proj)

    def projections(self, x):
        """Returns query, key and value, (N, T, hidden) each."""
        if self.native:
            return self.native(x, *matrices((self.q_proj, self.k_proj, self.v_proj)))
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def construct(self, x):
        return self.out_proj(self.core(*self.projections(x)))


class VitLayer(nn.Cell):
    """A pre-norm block. x (N, T, hidden) -> the same shape."""

    def __init__(self, config: VitConfig, context: BuildContext):
        super().__init__()
        dtype = context.dtype
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = VitAttention(config, context)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size, hidden_act=config.hidden_act, dtype=dtype)

    def construct(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VitEncoder(nn.Cell):
    """The stack of layers."""

    def __init__(self, config: VitConfig, context: BuildContext):
        super().__init__()
        self.layers = nn.CellList([VitLayer(config, context) for _ in range(config.num_hidden_layers)])


class VisionTransformer(nn.Cell):
    """CLIP's vision tower.

    Args:
        config: sizes.
        select_layer: index of the feature in [embeddings, output of layer 0, output of layer 1, ...]; negative counts
            from the end. Later layers have parameters but do not run.
        num_dropped_tokens: number of leading tokens to drop from the feature, such as the class token.
    """

    def __init__(
        self,
        config: VitConfig,
        context: BuildContext = EAGER_FLOAT32,
        *,
        select_layer: int = -2,
        num_dropped_tokens: int = 1,
    ):
        super().__init__()
        dtype = context.dtype
        self.num_feature_layers = select_layer % (config.num_hidden_layers + 1)
        self.num_dropped_tokens = num_dropped_tokens
        self.embeddings = EMBEDDINGS[config.dialect](config, dtype)
        if config.dialect == "clip":
            # spelled as in the checkpoints
            self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.encoder = VitEncoder(config, context)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def construct(self, pixels):
        """pixels (N, 3, height, width) -> features (N, T - dropped tokens, hidden), without the final norm."""
        x = self.embed(pixels)
        for i in range(self.num_feature_layers):
            x = self.encoder.layers[i](x)
        return self.finish(x)

    def finish(self, x):
        """Returns the features for the output of the last of `blocks`."""
        return x[:, self.num_dropped_tokens :] if self.num_dropped_tokens else x

    @property
    def blocks(self) -> list[nn.Cell]:
        """Layers that the feature depends on."""
        # slicing the CellList would rename the parameters
        return list(self.encoder.layers)[: self.num_feature_layers]

    def parameters_before_blocks(self) -> list[Parameter]:
        """Returns the parameters of `embed`."""
        norm = [self.pre_layrnorm] if "pre_layrnorm" in self.name_cells() else []
        return [parameter for cell in (self.embeddings, *norm) for parameter in cell.get_parameters()]

    def embed(self, pixels):
        """Returns the input of the first layer, (N, T, hidden)."""
        return self.pre_layrnorm(self.embeddings(pixels))

    def hidden_states(self, pixels):
        """Returns every entry of the feature list, (N, T, hidden) each, and the normalized class token (N, hidden)."""
        x = self.embed(pixels)
        states = (x,)
        for layer in self.encoder.layers:
            x = layer(x)
            states = states + (x,)
        return states, self.post_layernorm(x[:, 0])

    def unused_cells(self) -> list[nn.Cell]:
        """Returns the Cells with parameters in the checkpoint that do not affect the feature."""
        return [*list(self.encoder.layers)[self.num_feature_layers :], self.post_layernorm]

    def unused_parameters(self) -> list[Parameter]:
        """Returns the parameters of `unused_cells`, and a class token that is dropped before any layer reads it."""
        parameters = [parameter for cell in self.unused_cells() for parameter in cell.get_parameters()]
        if isinstance(self.embeddings, ClipEmbeddings) and self.num_dropped_tokens and not self.num_feature_layers:
            parameters.append(self.embeddings.class_embedding)
        return parameters


class SiglipTransformer(VisionTransformer):
    """SigLIP's vision tower without its pooling head."""

    def embed(self, pixels):
        return self.embeddings(pixels)


EMBEDDINGS = {"clip": ClipEmbeddings, "siglip": SiglipEmbeddings}
TOWERS = {"clip": VisionTransformer, "siglip": SiglipTransformer}
