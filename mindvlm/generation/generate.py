"""The token loop: sample, stop per row, feed back."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation.engine import Engine
from mindvlm.generation.graphs import pad_rows
from mindvlm.generation.sampling import EMPTY, Sampler
from mindvlm.generation.stopping import RowStop

MAX_NEW_TOKENS, CONTEXT_FULL = "max_new_tokens", "context_full"


@dataclass
class Row:
    """One answer as it grows. `ids` are all generated ids, the stop token included; `stop_reason` is None until the
    row has ended."""

    ids: list[int] = field(default_factory=list)
    stop_reason: str | None = None


class Generator:
    """Generation with an engine. Samplers are kept, so the same rules are compiled once."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.samplers: dict[tuple, Sampler] = {}

    def stream(
        self,
        prompts: list[list[int]],
        logits: Tensor,
        config: GenerationConfig,
        *,
        stops: list[RowStop],
        seed: int,
    ) -> Iterator[list[Row]]:
        """Yields the rows after every step, until all have ended.

        Args:
            prompts: all ids of each row so far (what the repetition rules look at).
            logits: (B, V) behind the prompts, from `Engine.append`.
            config: the rules.
            stops: one stop rule a row.
            seed: of the draws.

        Raises:
            UserError: (while it runs) the engine was given something else before the rows had ended.
        """
        return self.steps(prompts, logits, config, stops, seed, self.engine.num_prefills)

    def steps(
        self,
        prompts: list[list[int]],
        logits: Tensor,
        config: GenerationConfig,
        stops: list[RowStop],
        seed: int,
        num_prefills: int,
    ) -> Iterator[list[Row]]:
        engine = self.engine
        rows = [Row() for _ in prompts]
        sampler = self.sampler(config, len(prompts))
        if sampler.keeps_history:
            sampler.history.set_data(Tensor.from_numpy(pad_rows(prompts, sampler.num_slots, EMPTY)))
        if config.max_new_tokens > 1 and engine.lengths.max() < engine.num_slots:
            engine.prepare_step()
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        random = np.random.default_rng(seed)
        while True:
            if engine.num_prefills != num_prefills:
                raise UserError("the model was asked something else before this answer had ended; read it to its end")
            uniform = Tensor(random.random(len(rows)).astype(np.float32))
            ids = engine.run("decode", sampler, logits, Tensor(counts), uniform)
            counts = np.minimum(counts + 1, sampler.num_slots - 1)
            for row, stop, token in zip(rows, stops, ids.asnumpy().tolist(), strict=True):
                if row.stop_reason is None:
                    row.ids.append(token)
                    row.stop_reason = stop.reason_after(token)
            for row, length in zip(rows, engine.lengths, strict=True):
                if row.stop_reason is None and len(row.ids) >= config.max_new_tokens:
                    row.stop_reason = MAX_NEW_TOKENS
                elif row.stop_reason is None and length >= engine.max_length:
                    row.stop_reason = CONTEXT_FULL
            yield rows
            if all(row.stop_reason for row in rows):
                return
            logits = engine.step(ids)

    def sampler(self, config: GenerationConfig, batch_size: int) -> Sampler:
        num_slots = self.engine.max_length + 1
        key = (
            batch_size,
            num_slots,
            config.do_sample,
            *((config.temperature, config.top_k, config.top_p) if config.do_sample else ()),
            config.repetition_penalty,
            config.no_repeat_ngram_size,
        )
        if key not in self.samplers:
            self.samplers[key] = Sampler(
                config, batch_size=batch_size, vocab_size=self.engine.config.vocab_size, num_slots=num_slots
            )
        return self.samplers[key]
