"""The benchmark of TinyLLaVA: its models and the prompt."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mindvlm.models.hf.towers import SIGLIP_384
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.names import LLAMA, infos_of
from mindvlm.models.tinyllava.released import llama_config
from mindvlm.nn.config import height_and_width
from mindvlm.nn.shapes import Shapes
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.tools.benchmarks.workload import BenchmarkModel, Workload, prompt
from mindvlm.weights.rules.planning import make_plan


class TinyLlavaWorkload(Workload):
    """A TinyLLaVA, asked "What is unusual about this image?" in the template `v1`: 778 tokens for 729 of the image."""

    family = "tinyllava"
    decode_prefixes = ("model.layers.", "model.norm.", "model.final_layernorm.", "lm_head")
    architecture = "llama"
    before = (
        "1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 "
        "1248 568 6089 304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871"
    )
    behind = "29871 13 5618 338 22910 1048 445 1967 29973 319 1799 9047 13566 29901"
    placeholder_id = PLACEHOLDER_ID

    @cached_property
    def shapes(self) -> Shapes:
        plan = make_plan(LLAMA.tables[1].reverse(), infos_of(self.model_config))
        return {name: info.shape for name, info in plan.infos.items()}

    @property
    def prompt_ids(self) -> np.ndarray:
        span = [PLACEHOLDER_ID] * self.model_config.image_token_len
        return prompt(self.before, span, self.behind, vocab_size=self.config["vocab_size"])

    @property
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return ((1, 3, *height_and_width(self.model_config.vision_tower.image_size)),)

    @cached_property
    def model_config(self) -> TinyLlavaModelConfig:
        return from_hf_config(self.config)

    def reference_type(self) -> Any:
        from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava

        return ReferenceTinyLlava


def smoke_config() -> dict[str, Any]:
    """Returns the layout of TinyLLaVA-1.5B with sizes so small that the whole benchmark takes seconds."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return llama_config() | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "vision_config": {**SIGLIP_384, **tower, "image_size": 60},
    }


MODELS = {
    "tinyllava_1_5b": BenchmarkModel(TinyLlavaWorkload, llama_config),
    "tinyllava_smoke": BenchmarkModel(TinyLlavaWorkload, smoke_config, is_small=True),
}
