"""What the training benchmark computes: a Vary-toy of known sizes, a batch, labels. Imports no framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindvlm.convert.reference.vary_layout import parameter_shapes, vary_toy_config
from mindvlm.tools.benchmark_workload import VaryWorkload, smoke_config

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TrainingWorkload:
    """Steps of AdamW on one batch of random answers to a picture; the towers are frozen.

    Attributes:
        config: an official config.json of Vary-toy as a dict.
        batch_size: rows, each with one picture.
        length: tokens of a row; those behind the prompt are learned.
        seed: of weights, pixels and answers.
        recompute: our own step computes its blocks again on the way back.
    """

    config: dict[str, Any]
    batch_size: int
    length: int
    seed: int = 0
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    recompute: bool = False

    @property
    def input_ids(self) -> np.ndarray:
        """(B, L) int32: the benchmark's prompt, then random text."""
        prompt = VaryWorkload(self.config, seed=self.seed, num_tokens=1).prompt_ids[0]
        text_size = min(self.config["im_start_token"], self.config["vocab_size"])
        rng = np.random.default_rng(self.seed)
        answers = rng.integers(0, text_size, (self.batch_size, self.length - len(prompt)))
        return np.concatenate([np.tile(prompt, (self.batch_size, 1)), answers], 1).astype(np.int32)

    @property
    def labels(self) -> np.ndarray:
        """(B, L) int32: the answers, -100 for the prompt."""
        labels = self.input_ids
        labels[:, : VaryWorkload(self.config, seed=self.seed, num_tokens=1).prompt_ids.shape[1]] = IGNORED_LABEL
        return labels

    @property
    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Noise for both towers, (B, 3, height, width) float32 each."""
        branches = VaryWorkload(self.config, seed=self.seed, num_tokens=1).pixels
        return tuple(np.repeat(branch, self.batch_size, 0) for branch in branches)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, towers included."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length


def small_config(num_layers: int) -> dict[str, Any]:
    """The layout of Vary-toy with a decoder of 512 channels: 10 layers make 50 million parameters."""
    vocab_size = 16000
    return vary_toy_config() | {
        "hidden_size": 512,
        "intermediate_size": 2 * 1376,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "kv_channels": 64,
        "vocab_size": vocab_size,
        "im_start_token": vocab_size - 3,
        "im_end_token": vocab_size - 2,
        "im_patch_token": vocab_size - 1,
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
        "vision_high_config": {
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 1,
            "global_attn_indexes": [1],
            "out_chans": 64,
            "net_2_channels": 128,
            "net_3_channels": 128,
        },
    }


def training_workload(
    name: str, *, seed: int, num_layers: int | None = None, recompute: bool = False
) -> TrainingWorkload:
    """ "small": 50 million parameters, 4 rows of 512 tokens; "smoke": seconds for a whole run.

    Args:
        num_layers: of the decoder, in place of the usual number.
    """
    if name == "smoke":
        layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
        return TrainingWorkload(smoke_config() | layers, batch_size=2, length=64, seed=seed, recompute=recompute)
    config = small_config(num_layers or 10)
    return TrainingWorkload(config, batch_size=4, length=512, seed=seed, recompute=recompute)
