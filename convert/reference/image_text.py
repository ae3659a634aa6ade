"""The base of the torch references of image-text models: weights, the forward pass, greedy decoding.

B batch, L prompt length, N images, T feature rows per image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.random_weights import RandomSource
from mindvlm.convert.reference.rotary import KVCache

IGNORED_LABEL = -100
# computed buffers that some published checkpoints contain
COMPUTED_SUFFIXES = (".embeddings.position_ids", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

Images = Sequence["Tensor | tuple[Tensor, ...] | None"]
Model = TypeVar("Model", bound="ImageTextReference")


@dataclass(frozen=True)
class ReferenceOutput:
    """The result of `forward`.

    Attributes:
        logits: (B, L, vocab).
        last_hidden: (B, L, hidden), after the final norm.
        block_inputs: one (B, L, hidden) per block.
        merged_embeds: (B, L, hidden).
        loss: float32 scalar, or None.
    """

    logits: Tensor
    last_hidden: Tensor
    block_inputs: list[Tensor]
    merged_embeds: Tensor
    loss: Tensor | None


@dataclass(frozen=True)
class Generated:
    """The result of `generate`: ids (B, num_new), and logits (B, vocab) of each step."""

    ids: Tensor
    logits: list[Tensor]


class ImageTextReference(nn.Module, ABC):
    """Base class of a reference model, built from the family's model config.

    A subclass sets `transformer` (a decoder with `wte`, `decode` and `config`) and `lm_head`, and defines
    `placeholder_id`, `encode_images` and `place`. `from_state`, `from_source` and `from_seed` build it without a second
    copy of the weights.
    """

    config: Any

    @classmethod
    def from_state(
        cls: type[Model],
        config: Any,
        state: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Model:
        """Builds the model from an official state dict. Names and shapes must match; computed buffers are dropped."""
        model = _build_empty(cls, config, device, dtype)
        model.load_state_dict({name: value for name, value in state.items() if not name.endswith(COMPUTED_SUFFIXES)})
        return model

    @classmethod
    def from_source(
        cls: type[Model],
        config: Any,
        source: TensorSource,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Model:
        """Builds the model from a checkpoint with the official names, read tensor by tensor."""
        model = _build_empty(cls, config, device, dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(source.read(name).to_float32()))
        return model

    @classmethod
    def from_seed(cls: type[Model], config: Any, seed: int, *, device: torch.device | str | None = None) -> Model:
        """Builds the model with the weights of `random_weights.random_tensor(name, shape, seed)`."""
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in cls(config).named_parameters()}
        return cls.from_source(config, RandomSource(shapes, seed), device=device)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """The id of the placeholder of one feature row."""

    @abstractmethod
    def encode_images(self, *pixels: Tensor) -> Tensor:
        """Returns the rows of images in the prompt: pixels (N, 3, height, width) of each tower -> (N, T, hidden)."""

    @abstractmethod
    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Writes features (N, T, hidden) over the placeholders of one sample, in embeds (L, hidden) with ids (L,).

        Raises:
            ValueError: the placeholders do not match the features.
        """

    def merge(self, input_ids: Tensor, image_features: Sequence[Tensor | None] | None = None) -> Tensor:
        """Returns the embeddings (B, L, hidden) of ids (B, L), with image features in place of the placeholders.

        Args:
            input_ids: (B, L).
            image_features: per sample (N_i, T, hidden) or None, in the order of the placeholders. Ignored for a sample
                without placeholders.

        Raises:
            ValueError: the number of entries differs from that of samples, or placeholders do not match features.
        """
        input_ids = input_ids.to(self.device)
        # placeholder ids may be negative
        embeds = self.transformer.wte(input_ids.clamp(min=0))
        if image_features is None:
            return embeds
        if len(image_features) != len(input_ids):
            raise ValueError(f"{len(image_features)} image entries for {len(input_ids)} samples: give one per sample")
        embeds = embeds.clone()
        for row, features in enumerate(image_features):
            if bool((input_ids[row] == self.placeholder_id).any()):
                self.place(embeds[row], input_ids[row], features)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits of normed hidden states: (..., hidden) -> (..., vocab)."""
        return self.lm_head(hidden)

    def forward(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ReferenceOutput:
        """Computes all positions of a batch without a cache.

        Args:
            input_ids: (B, L).
            images: per sample pixels (N_i, 3, height, width), a tuple of such for several towers, or None.
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
        return ReferenceOutput(logits, last_hidden, block_inputs, embeds, loss)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Returns an empty cache with the dtype and device of the model."""
        return KVCache(
            self.transformer.config, batch_size=batch_size, capacity=capacity, dtype=self.dtype, device=self.device
        )

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, cache: KVCache, *, attention_mask: Tensor | None = None) -> Tensor:
        """Writes a prompt (B, L, hidden) into the cache and returns the logits (B, vocab) of its last position."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        hidden, _ = self.transformer.decode(embeds, cache=cache, attention_mask=attention_mask)
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def decode_step(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Appends one token per row (B,) and returns the logits (B, vocab) of the next token."""
        hidden, _ = self.transformer.decode(self.transformer.wte(token_ids[:, None]), cache=cache)
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
    ) -> Generated:
        """Decodes greedily with the cache, without stop ids. Shorter prompts of a batch are padded on the left.

        Raises:
            ValueError: a row ends in padding.
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
        return pixels.to(self.device, self.dtype)

    def _encode(self, input_ids: Tensor, images: Images | None) -> list[Tensor | None] | None:
        if images is None:
            return None
        if len(images) != len(input_ids):
            raise ValueError(f"{len(images)} image entries for {len(input_ids)} samples: give one per sample")
        used = (input_ids == self.placeholder_id).any(dim=1).tolist()
        return [
            self.encode_images(*(entry if isinstance(entry, tuple) else (entry,)))
            if entry is not None and needed
            else None
            for entry, needed in zip(images, used, strict=True)
        ]


def default_device() -> torch.device:
    """Returns CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _build_empty(cls: type[Model], config: Any, device: torch.device | str | None, dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        model = cls(config).to(dtype)
    return model.to_empty(device=device or default_device()).eval()
