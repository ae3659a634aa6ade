"""Torch reference of Vary-toy (Wei et al., arXiv 2401.12503; `vary_qwen_vary.py` of the official repository).

B batch, L prompt length, N images, T feature rows per image. The state dict has the official names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.qwen import KVCache, QwenDecoder
from mindvlm.convert.reference.random_weights import fill_random
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary_layout import clip_config, has_vision, vocabulary_config

IGNORED_LABEL = -100
# Buffers that some published checkpoints carry although they are computed, not learned.
COMPUTED_SUFFIXES = (".embeddings.position_ids", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

ImagePair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VaryOutput:
    """logits (B, L, vocab); last_hidden (B, L, hidden) after the final norm; block_inputs, one (B, L, hidden) per
    block; merged_embeds (B, L, hidden); loss, a float32 scalar or None."""

    logits: Tensor
    last_hidden: Tensor
    block_inputs: list[Tensor]
    merged_embeds: Tensor
    loss: Tensor | None


@dataclass(frozen=True)
class Generated:
    """ids (B, num_new); logits, one (B, vocab) per step: those the id of that step was chosen from."""

    ids: Tensor
    logits: list[Tensor]


class VaryTransformer(QwenDecoder):
    """Decoder, both towers and both projectors: `transformer.*` of the official state dict."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if has_vision(config):
            clip, vocabulary = clip_config(config), vocabulary_config(config)
            half = config["hidden_size"] // 2
            self.vision_tower = ClipTower(clip)
            self.vision_tower_high = VisionVocabulary(vocabulary)
            self.mm_projector = nn.Linear(clip["hidden_size"], half)
            self.mm_projector_vary = nn.Linear(vocabulary["net_3_channels"], half)


class ReferenceVary(nn.Module):
    """Vary-toy, configured by the dict of an official config.json (`vision_config` and `vision_high_config` optional).

    Without towers in the config it is the Qwen-1 language model alone. Both towers always run without gradients.
    Build it with `from_state` or `from_seed`, which never hold the weights twice.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.transformer = VaryTransformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        state: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReferenceVary:
        """Build from an official state dict; names and shapes must match exactly, computed buffers are dropped."""
        model = _build_empty(cls, config, device, dtype)
        model.load_state_dict({name: value for name, value in state.items() if not name.endswith(COMPUTED_SUFFIXES)})
        return model

    @classmethod
    def from_seed(
        cls,
        config: Mapping[str, Any],
        seed: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReferenceVary:
        """Build with the weights of `random_weights.random_tensor(name, shape, seed)`."""
        model = _build_empty(cls, config, device, dtype)
        init_random_(model, seed)
        return model

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def clip_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) of the CLIP branch -> (N, T, CLIP width)."""
        select_layer = self.config.get("vision_select_layer", -2)
        return self.transformer.vision_tower.features(self._pixels(pixels), select_layer=select_layer)

    @torch.no_grad()
    def vocabulary_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) of the high-resolution branch -> (N, T, net_3_channels)."""
        return self.transformer.vision_tower_high(self._pixels(pixels))

    def project(self, clip: Tensor, vocabulary: Tensor) -> Tensor:
        """Features of both towers (N, T, width) -> (N, T, hidden), channels ordered [CLIP | vocabulary]."""
        projected = self.transformer.mm_projector(clip), self.transformer.mm_projector_vary(vocabulary)
        return torch.cat(projected, dim=-1)

    def encode_images(self, clip_pixels: Tensor, high_pixels: Tensor) -> Tensor:
        """Pixels of both branches (N, 3, height, width) -> rows for the prompt (N, T, hidden)."""
        return self.project(self.clip_features(clip_pixels), self.vocabulary_features(high_pixels))

    def merge(self, input_ids: Tensor, image_features: Sequence[Tensor | None] | None = None) -> Tensor:
        """Token embeddings (B, L, hidden) of ids (B, L), with the rows between `<img>` and `</img>` replaced.

        Args:
            image_features: per sample (N_i, T, hidden) or None; the k-th image goes behind the k-th `<img>`. A sample
                without placeholders keeps its embeddings, whatever its entry.

        Raises:
            ValueError: another number of entries than samples, unpaired image tokens, a span of another length than T,
                another number of images than `<img>` tokens.
        """
        input_ids = input_ids.to(self.device)
        embeds = self.transformer.wte(input_ids)
        if image_features is None:
            return embeds
        if len(image_features) != len(input_ids):
            raise ValueError(f"{len(image_features)} image entries for {len(input_ids)} samples: give one per sample")
        embeds = embeds.clone()
        for row, features in enumerate(image_features):
            for start, feature in zip(*self._spans(input_ids[row], features), strict=True):
                embeds[row, start : start + feature.shape[0]] = feature.to(embeds.dtype)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., hidden) -> (..., vocab)."""
        return self.lm_head(hidden)

    def forward(
        self,
        input_ids: Tensor,
        images: Sequence[ImagePair | None] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VaryOutput:
        """All positions of a batch, without cache.

        Args:
            input_ids: (B, L).
            images: per sample a pair of pixels ((N_i, 3, h, w) of CLIP, (N_i, 3, H, W) of the vocabulary), or None.
            attention_mask: (B, L), nonzero = real token.
            labels: (B, L), -100 = ignored; the loss is the mean cross-entropy of the next token in float32.
        """
        embeds = self.merge(input_ids, self._encode(input_ids, images))
        last_hidden, block_inputs = self.transformer.decode(embeds, attention_mask=attention_mask)
        logits = self.logits(last_hidden)
        loss = None
        if labels is not None:
            target = labels[:, 1:].to(logits.device).long().flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, ignore_index=IGNORED_LABEL)
        return VaryOutput(logits, last_hidden, block_inputs, embeds, loss)

    def new_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """An empty cache of the model's dtype and device."""
        dtype = self.lm_head.weight.dtype
        return KVCache(self.config, batch_size=batch_size, num_slots=num_slots, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, cache: KVCache, *, attention_mask: Tensor | None = None) -> Tensor:
        """Write a prompt (B, L, hidden) into the cache; returns the logits (B, vocab) of its last position."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        hidden, _ = self.transformer.decode(embeds, cache=cache, attention_mask=attention_mask)
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def decode_step(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """One token per row (B,) -> logits (B, vocab) of the next one."""
        hidden, _ = self.transformer.decode(self.transformer.wte(token_ids[:, None]), cache=cache)
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        images: Sequence[ImagePair | None] | None = None,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
    ) -> Generated:
        """Greedy decoding with the cache and without a stop; a shorter prompt of a batch is padded on the left.

        Raises:
            ValueError: the last slot of some row is padding.
        """
        if attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
            raise ValueError("attention_mask ends in padding: pad prompts on the left for generation")
        embeds = self.merge(input_ids, self._encode(input_ids, images))
        cache = self.new_cache(embeds.shape[0], embeds.shape[1] + max_new_tokens)
        steps = [self.prefill(embeds, cache, attention_mask=attention_mask)]
        ids = [steps[0].argmax(-1)]
        while len(ids) < max_new_tokens:
            steps.append(self.decode_step(ids[-1], cache))
            ids.append(steps[-1].argmax(-1))
        return Generated(torch.stack(ids, dim=1), steps)

    def _pixels(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, self.lm_head.weight.dtype)

    def _encode(self, input_ids: Tensor, images: Sequence[ImagePair | None] | None) -> list[Tensor | None] | None:
        if images is None:
            return None
        if len(images) != len(input_ids):
            raise ValueError(f"{len(images)} image entries for {len(input_ids)} samples: give one per sample")
        used = (input_ids == self.config["im_patch_token"]).any(dim=1).tolist()
        return [
            self.encode_images(*pair) if pair is not None and needed else None
            for pair, needed in zip(images, used, strict=True)
        ]

    def _spans(self, ids: Tensor, features: Tensor | None) -> tuple[list[int], list[Tensor]]:
        if not bool((ids == self.config["im_patch_token"]).any()):
            return [], []
        starts = (ids == self.config["im_start_token"]).nonzero().flatten().tolist()
        num_ends = int((ids == self.config["im_end_token"]).sum())
        num_images = 0 if features is None else len(features)
        if not len(starts) == num_ends == num_images:
            raise ValueError(f"{len(starts)} <img> and {num_ends} </img> tokens for {num_images} images: must be equal")
        length = features.shape[1]
        for start in starts:
            end = start + length + 1
            if end >= len(ids) or int(ids[end]) != self.config["im_end_token"]:
                raise ValueError(f"<img> at {start}: </img> is not {length + 1} tokens behind it")
        return [start + 1 for start in starts], list(features)


def init_random_(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place with `random_weights.random_tensor(name, shape, seed)`.

    Float32 parameters on the CPU are written directly; others pass through one temporary of their own size.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dtype == torch.float32 and parameter.device.type == "cpu":
                fill_random(parameter.numpy(), name, seed=seed)
            else:
                values = fill_random(np.empty(tuple(parameter.shape), np.float32), name, seed=seed)
                parameter.copy_(torch.from_numpy(values))


def random_state(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the official state dict of `from_seed(config, seed)` as (name, float32 tensor), one at a time."""
    with torch.device("meta"):
        empty = ReferenceVary(config)
    for name, parameter in empty.named_parameters():
        yield name, torch.from_numpy(fill_random(np.empty(tuple(parameter.shape), np.float32), name, seed=seed))


def default_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the official trainer: biases and nn.LayerNorm parameters are not decayed, RMSNorm weights are."""
    layer_norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if "bias" in name or id(parameter) in layer_norms else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _build_empty(
    cls: type[ReferenceVary], config: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype
) -> ReferenceVary:
    with torch.device("meta"):
        model = cls(config).to(dtype)
    return model.to_empty(device=device or default_device()).eval()
