"""Torch reference of the vision towers CLIP (Radford et al. 2021; `CLIPVisionModel` of transformers) and SigLIP
(arXiv 2303.15343; `SiglipVisionModel` without its pooling head).

N images, T patches (and in CLIP one class token), C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.nn.config import VitConfig


class ClipAttention(nn.Module):
    """Multi-head attention without a mask; all projections have a bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values: (N, T, C) -> (N, H, T, D) each."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in projections)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Returns the activation of that name in a config.json.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r}: the reference knows {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class ClipMlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = ClipAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = ClipMlp(width, config.intermediate_size, activation(config.hidden_act))
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class SiglipEmbeddings(nn.Module):
    """Patch embedding with a bias and without a class token."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class ClipEncoder(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))


class ClipVisionModel(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixels))


class SiglipVisionModel(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.embeddings(pixels)


class VisionTower(nn.Module):
    """A vision transformer with the state dict of transformers.

    Args:
        vision_model: the embeddings, layers and norms.
    """

    def __init__(self, vision_model: ClipVisionModel | SiglipVisionModel) -> None:
        super().__init__()
        self.vision_model = vision_model

    def hidden_states(self, pixels: Tensor, *, num_layers: int | None = None) -> list[Tensor]:
        """Returns the input of the encoder, then the output of each layer.

        Args:
            pixels: (N, 3, height, width).
            num_layers: limit of the layers to run.

        Returns:
            A list of (N, tokens, C).
        """
        states = [self.vision_model.embed(pixels)]
        for layer in self.vision_model.encoder.layers[:num_layers]:
            states.append(layer(states[-1]))
        return states

    def features(self, pixels: Tensor, *, select_layer: int = -2, num_dropped_tokens: int = 1) -> Tensor:
        """Returns one hidden state without its first tokens: pixels (N, 3, height, width) -> (N, T, C), row-major.

        `select_layer` indexes the list of `hidden_states`; later layers are not run.

        Raises:
            ValueError: `select_layer` is out of range.
        """
        depth = len(self.vision_model.encoder.layers)
        wanted = select_layer if select_layer >= 0 else depth + 1 + select_layer
        if not 0 <= wanted <= depth:
            raise ValueError(f"vision_select_layer {select_layer}: must lie in -{depth + 1}..{depth}")
        x = self.vision_model.embed(pixels)
        for layer in self.vision_model.encoder.layers[:wanted]:
            x = layer(x)
        return x[:, num_dropped_tokens:]

    def pooled(self, last_hidden_state: Tensor) -> Tensor:
        """Returns the first token (CLIP's class token) after the last norm: (N, tokens, C) -> (N, C)."""
        return self.vision_model.post_layernorm(last_hidden_state[:, 0])


class ClipTower(VisionTower):
    """CLIP: `CLIPVisionModel`."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(ClipVisionModel(config))


class SiglipTower(VisionTower):
    """SigLIP: `SiglipVisionModel` without its pooling head."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(SiglipVisionModel(config))


def build_tower(config: VitConfig) -> VisionTower:
    """Returns the tower of the config's dialect."""
    return (SiglipTower if config.dialect == "siglip" else ClipTower)(config)


class TowerHolder(nn.Module):
    """The tower under one more level of names."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.vision_tower = build_tower(config)
