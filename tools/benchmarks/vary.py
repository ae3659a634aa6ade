"""The benchmark of Vary: its models, the prompt, and the batch of the training benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config, infos_of, vary_toy_config
from mindvlm.models.vary.model_config import VaryModelConfig
from mindvlm.models.vary.names import HF
from mindvlm.nn.config import height_and_width
from mindvlm.nn.shapes import Shapes
from mindvlm.tools.benchmarks.workload import BenchmarkModel, Workload, prompt
from mindvlm.weights.rules.planning import make_plan

IGNORED_LABEL = -100


class VaryWorkload(Workload):
    """A Vary-toy, asked "Provide the ocr results of this image." in the released template: 292 tokens."""

    family = "vary"
    decode_prefixes = ("transformer.h.", "transformer.ln_f", "lm_head")
    architecture = "qwen"
    before = "151644 8948 198 2610 1265 1795 279 11221 15516 323 10339 697 11253 304 7716 13 151645 151644 872 198"
    behind = "198 60424 279 297 5082 3059 315 419 2168 13 151645 151644 77091 198"

    @cached_property
    def shapes(self) -> Shapes:
        plan = make_plan(HF.reverse(), infos_of(self.model_config))
        return {name: info.shape for name, info in plan.infos.items()}

    @property
    def placeholder_id(self) -> int:
        return self.config["im_patch_token"]

    @property
    def prompt_ids(self) -> np.ndarray:
        config = self.config
        span = [config["im_start_token"], *[self.placeholder_id] * config["image_token_len"], config["im_end_token"]]
        return prompt(self.before, span, self.behind, vocab_size=config["im_start_token"])

    @property
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        towers = (self.model_config.vision_tower, self.model_config.vision_vocabulary)
        return tuple((1, 3, *height_and_width(tower.image_size)) for tower in towers)

    @cached_property
    def model_config(self) -> VaryModelConfig:
        return from_hf_config(self.config)

    def reference_type(self) -> Any:
        from mindvlm.convert.reference.vary import ReferenceVary

        return ReferenceVary

    def reference(self, dtype: Any) -> Any:
        model = super().reference(dtype)
        model.image_tokens = ImageTokens.of(self.config)
        return model


@dataclass(frozen=True, kw_only=True)
class TrainingWorkload(VaryWorkload):
    """Steps of AdamW on one batch of random answers to a picture; the towers are frozen.

    Attributes:
        config: an official config.json of Vary-toy as a dict.
        seed: of weights, pixels and answers.
        batch_size: rows, each with one picture.
        length: tokens of a row; those behind the prompt are learned.
        recompute: our own step computes its blocks again in the backward pass.
    """

    num_tokens: int = 0
    batch_size: int
    length: int
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    recompute: bool = False

    @property
    def input_ids(self) -> np.ndarray:
        """(B, L) int32: the benchmark's prompt, then random text."""
        prompt_ids = self.prompt_ids[0]
        text_size = min(self.config["im_start_token"], self.config["vocab_size"])
        rng = np.random.default_rng(self.seed)
        answers = rng.integers(0, text_size, (self.batch_size, self.length - len(prompt_ids)))
        return np.concatenate([np.tile(prompt_ids, (self.batch_size, 1)), answers], 1).astype(np.int32)

    @property
    def labels(self) -> np.ndarray:
        """(B, L) int32: the answers, -100 for the prompt."""
        labels = self.input_ids
        labels[:, : self.prompt_ids.shape[1]] = IGNORED_LABEL
        return labels

    @property
    def pixels(self) -> tuple[np.ndarray, ...]:
        """Noise for both towers, (B, 3, height, width) float32 each."""
        return tuple(np.repeat(branch, self.batch_size, 0) for branch in super().pixels)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    def reference(self, dtype: Any) -> tuple[Any, list[dict[str, Any]]]:
        """Returns the torch reference with frozen towers, and the parameter groups of its optimizer. Imports torch."""
        from mindvlm.convert.reference.vary import parameter_groups

        model = super().reference(dtype).train()
        for tower in (model.transformer.vision_tower, model.transformer.vision_tower_high):
            tower.requires_grad_(False)
        groups = parameter_groups(model, weight_decay=0.0)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        return model, groups


def decoder_sizes(
    *, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, vocab_size: int
) -> dict[str, int]:
    """Returns the decoder's part of a config.json; the image tokens are the last three of the vocabulary."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "kv_channels": hidden_size // num_heads,
        "vocab_size": vocab_size,
        "im_start_token": vocab_size - 3,
        "im_end_token": vocab_size - 2,
        "im_patch_token": vocab_size - 1,
    }


def smoke_config(num_layers: int = 2) -> dict[str, Any]:
    """Returns the layout of Vary-toy with sizes so small that the whole benchmark takes seconds."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sam = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1]}
    return {
        **vary_toy_config(),
        **decoder_sizes(hidden_size=64, intermediate_size=192, num_layers=num_layers, num_heads=2, vocab_size=256),
        "image_token_len": 16,
        "vision_config": tower | {"image_size": 56},
        "vision_high_config": sam | {"image_size": 256, "out_chans": 16, "net_2_channels": 24, "net_3_channels": 32},
    }


def small_config(num_layers: int) -> dict[str, Any]:
    """Returns the layout of Vary-toy with a decoder of 512 channels: 10 layers make 50 million parameters."""
    sam = {"embed_dim": 64, "depth": 2, "num_heads": 1, "global_attn_indexes": [1]}
    decoder = decoder_sizes(
        hidden_size=512, intermediate_size=2 * 1376, num_layers=num_layers, num_heads=8, vocab_size=16000
    )
    return {
        **vary_toy_config(),
        **decoder,
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
        "vision_high_config": sam | {"out_chans": 64, "net_2_channels": 128, "net_3_channels": 128},
    }


def small_training(*, seed: int, num_layers: int = 10, recompute: bool = False) -> TrainingWorkload:
    """Returns 50 million parameters and 4 rows of 512 tokens."""
    return TrainingWorkload(small_config(num_layers), seed, batch_size=4, length=512, recompute=recompute)


def smoke_training(*, seed: int, num_layers: int = 2, recompute: bool = False) -> TrainingWorkload:
    """Returns a workload that takes seconds."""
    return TrainingWorkload(smoke_config(num_layers), seed, batch_size=2, length=64, recompute=recompute)


MODELS = {
    "vary_toy": BenchmarkModel(
        VaryWorkload, vary_toy_config, training=small_training, trained="a Vary-toy of 50 million parameters"
    ),
    "smoke": BenchmarkModel(VaryWorkload, smoke_config, is_small=True, training=smoke_training, trained="a tiny one"),
}
