"""What our sides of the logits checks have in common: the graphs of a tower and of a decoder, stage by stage."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.convert.parity.comparison import GREEDY_IDS, STEP_LOGITS
from mindvlm.core import runtime
from mindvlm.generation.engine import Engine

Stages = dict[str, np.ndarray]
Say = Callable[[str], None]


def start() -> tuple[ms.Type, str]:
    """The dtype to compute in and the framework in words; always the CPU and float32, where both sides can agree."""
    dtype = runtime.start(runtime.RuntimeConfig(device="cpu"))
    return dtype, f"MindSpore {ms.__version__} on {ms.get_context('device_target')}, graph mode"


class TowerStages(nn.Cell):
    """pixels (N, 3, height, width) -> the tower's features, its last layer, its pooled class token."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        states, pooled = self.tower.hidden_states(pixels)
        return self.tower(pixels), states[-1], pooled


class LayerStages(nn.Cell):
    """One pass without a cache: what every layer hands on (the last one through the norm), and the logits."""

    def __init__(self, language_model):
        super().__init__(auto_prefix=False)
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        states = self.language_model.layer_states(embeds, inv_freq)
        normed = self.language_model.norm(states[-1])
        return ops.stack((*states[1:-1], normed)), self.language_model.lm_head(normed)


class LanguageStages:
    """The graphs of a decoder; compiled once, they can run again after its parameters have changed.

    Args:
        model: a family's model.
        placeholder_id: the token that stands for one image feature row.
        num_tokens: the most greedy steps.
        say: called with one line before each slow step.
    """

    def __init__(self, model: nn.Cell, *, placeholder_id: int, num_tokens: int, say: Say) -> None:
        self.model, self.placeholder_id, self.num_tokens, self.say = model, placeholder_id, num_tokens, say
        self.layers = LayerStages(model.language_model)
        self.engine: Engine | None = None

    def compute(self, input_ids: np.ndarray, features: Tensor | None, forced_ids: np.ndarray | None) -> Stages:
        """Embeddings, layers and logits in one pass; then prefill and steps along `forced_ids`, with the cache."""
        length = input_ids.shape[1]
        if self.engine is None:
            self.engine = Engine(
                self.model,
                placeholder_id=self.placeholder_id,
                max_length=length + self.num_tokens,
                on_compile=lambda stage: self.say(f"compiling the {stage} graph"),
            )
        engine = self.engine
        self.say(f"compiling and running a prompt of {length} tokens")
        embeds = engine.merged_embeddings(input_ids, features)
        inv_freq = engine.frequencies(engine.alpha_for(length))
        stages = named(("merged_embeddings",), (embeds,))
        stages |= named(("layers", "logits"), engine.run("prefill", self.layers, embeds, inv_freq))
        if forced_ids is not None:
            engine.reset(1)
            steps = [engine.append(input_ids.tolist(), features).asnumpy()]
            self.say(f"running {len(forced_ids)} tokens")
            for token in forced_ids[:-1]:
                steps.append(engine.step(Tensor(np.array([token], np.int32))).asnumpy())
            stages[STEP_LOGITS] = np.concatenate(steps)
            stages[GREEDY_IDS] = stages[STEP_LOGITS].argmax(-1).astype(np.int32)
        return stages


def named(names: tuple[str, ...], outputs: tuple[Tensor, ...]) -> Stages:
    return {name: output.asnumpy() for name, output in zip(names, outputs, strict=True)}
