"""Names and shapes of the parameters of each part, derived from its typed config. Imports no framework.

`tests/nn/test_shapes.py` compares them with the Cells. Weights are (out, in) as in torch.
"""

from mindvlm.nn.config import FEED_FORWARD_FACTOR, NUM_OFFSET_ROWS, DecoderConfig, VitConfig

Shapes = dict[str, tuple[int, ...]]


def linear_shapes(name: str, num_out: int, num_in: int, *, bias: bool = True) -> Shapes:
    """Returns the shapes of a `Linear`."""
    weight: Shapes = {f"{name}.weight": (num_out, num_in)}
    return weight | {f"{name}.bias": (num_out,)} if bias else weight


def norm_shapes(name: str, width: int, *, bias: bool = True) -> Shapes:
    """Returns the shapes of a norm: `LayerNorm` has a bias, `RMSNorm` does not."""
    return {f"{name}.{ending}": (width,) for ending in (("weight", "bias") if bias else ("weight",))}


def decoder_shapes(config: DecoderConfig, prefix: str = "") -> Shapes:
    """Returns the shapes of a `CausalLM`; a tied head has no parameter of its own."""
    hidden, has_norm_bias = config.hidden_size, config.norm == "layer_norm"
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        shapes[f"{prefix}embed_positions.weight"] = (config.max_position_embeddings + NUM_OFFSET_ROWS, hidden)
    for layer in range(config.num_hidden_layers):
        shapes |= decoder_layer_shapes(config, f"{prefix}layers.{layer}.")
    shapes |= norm_shapes(f"{prefix}norm", hidden, bias=has_norm_bias)
    if not config.tie_word_embeddings:
        shapes |= linear_shapes(f"{prefix}lm_head", config.vocab_size, hidden, bias=config.head_bias)
    return shapes


def decoder_layer_shapes(config: DecoderConfig, prefix: str) -> Shapes:
    """Returns the shapes of a `DecoderLayer`, sequential or parallel."""
    hidden, inner, has_norm_bias = config.hidden_size, config.intermediate_size, config.norm == "layer_norm"
    width, key_width = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = norm_shapes(f"{prefix}input_layernorm", hidden, bias=has_norm_bias)
    for name, num_out in (("q", width), ("k", key_width), ("v", key_width)):
        shapes |= linear_shapes(f"{prefix}self_attn.{name}_proj", num_out, hidden, bias=config.qkv_bias)
    shapes |= linear_shapes(f"{prefix}self_attn.o_proj", hidden, width, bias=config.o_bias)
    if config.residual == "sequential":
        shapes |= norm_shapes(f"{prefix}post_attention_layernorm", hidden, bias=has_norm_bias)
    if config.mlp == "plain":
        shapes |= linear_shapes(f"{prefix}mlp.fc1", inner, hidden, bias=config.mlp_bias)
        return shapes | linear_shapes(f"{prefix}mlp.fc2", hidden, inner, bias=config.mlp_bias)
    for name in ("gate", "up"):
        shapes |= linear_shapes(f"{prefix}mlp.{name}_proj", inner, hidden, bias=False)
    return shapes | linear_shapes(f"{prefix}mlp.down_proj", hidden, inner, bias=False)


def vit_shapes(config: VitConfig, prefix: str = "") -> Shapes:
    """Returns the shapes of a `VisionTransformer` of either dialect."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: Shapes = {f"{prefix}embeddings.patch_embedding.weight": (width, 3, patch, patch)}
    if config.dialect == "siglip":
        shapes[f"{prefix}embeddings.patch_embedding.bias"] = (width,)
    else:
        shapes[f"{prefix}embeddings.class_embedding"] = (width,)
        shapes |= norm_shapes(f"{prefix}pre_layrnorm", width)
    shapes[f"{prefix}embeddings.position_embedding.weight"] = (config.num_tokens, width)
    for layer in range(config.num_hidden_layers):
        block = f"{prefix}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{block}self_attn.{name}", width, width)
        shapes |= norm_shapes(f"{block}layer_norm1", width) | norm_shapes(f"{block}layer_norm2", width)
        shapes |= linear_shapes(f"{block}mlp.fc1", inner, width) | linear_shapes(f"{block}mlp.fc2", width, inner)
    return shapes | norm_shapes(f"{prefix}post_layernorm", width)


def resampler_shapes(
    image_width: int, *, width: int, out_width: int, num_queries: int, num_layers: int, prefix: str = ""
) -> Shapes:
    """Returns the shapes of a `Resampler`; arguments as of the Cell."""
    inner = FEED_FORWARD_FACTOR * width
    shapes: Shapes = {f"{prefix}queries": (num_queries, width)}
    for layer in range(num_layers):
        block = f"{prefix}resampler_blocks.{layer}."
        shapes |= norm_shapes(f"{block}norm_image", image_width) | norm_shapes(f"{block}norm_hidden", width)
        for name, num_in in (("q", width), ("k", image_width), ("v", image_width), ("out", width)):
            shapes |= linear_shapes(f"{block}to_{name}", width, num_in, bias=False)
        shapes |= norm_shapes(f"{block}feed_forward.0", width)
        shapes |= linear_shapes(f"{block}feed_forward.1", inner, width, bias=False)
        shapes |= linear_shapes(f"{block}feed_forward.3", width, inner, bias=False)
    return (
        shapes
        | norm_shapes(f"{prefix}post_norm", width)
        | linear_shapes(f"{prefix}final_proj", out_width, width, bias=False)
    )
