"""The graphs of inference, with their compilation and timing.

N images, T tokens per image, B cache rows, b rows of a call, L length, R rotated dimensions, V vocabulary.
"""

import time
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.core import runtime
from mindvlm.core.interruption import uninterrupted
from mindvlm.generation.graph_cache import compile_cached

STAGES = ("compile", "vision", "prefill", "decode")

BLOCK = 64
"""Prompts are padded to a multiple of this many tokens, which keeps the number of graphs small at little extra work."""


UNCHECKED_PHASE = "increment"
"""With this phase, MindSpore runs the compiled form in `phase_cache` without looking at the inputs, which would take a
quarter of the time of a small model's decode step. MindFormers uses it for the decode steps of large models."""


class Graph(nn.Cell):
    """Base of the graphs, which share their Cells. On a CPU, only a `GraphRunner` may call them.

    MindSpore writes the phase of a graph, which names its compiled form, to every Cell in it at every call. With 900
    Cells this takes 2 ms, so it is done only for a new phase: before the graph is compiled.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        if ms.get_context("device_target") == "CPU":
            self.phase = UNCHECKED_PHASE

    @property
    def compile_phase(self):
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, phase):
        if phase not in self.compile_cache:
            nn.Cell.compile_phase.fset(self, phase)


class VisionGraph(Graph):
    """Pixels of each tower -> image features (N, T, hidden)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, *pixels):
        return self.model.encode_images(*pixels)


class MergeGraph(Graph):
    """Token embeddings with image features in place of the placeholders, (B, L, hidden); inputs as in `merge`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, input_ids, image_features, sources):
        return self.model.merge(input_ids, image_features, sources)


class PrefillGraph(Graph):
    """Runs new tokens of some rows against the cache; returns the logits of the last token of each prompt.

    The head multiplies a row for each row of the cache, so that logits do not depend on the number of prompts.
    """

    def __init__(self, model, caches):
        super().__init__()
        self.model = model
        self.caches = caches
        # without kernels, the only row is read without a copy
        self.selects_rows = model.language_model.has_exact_rows or caches[0].key.shape[0] > 1

    def construct(self, ids, image_features, sources, positions, inv_freq, ends, rows):
        """Runs the tokens.

        Args:
            ids, image_features, sources: see `ImageTextModel.merge`; ids and sources (1, b * L).
            positions: (b, L) int32.
            inv_freq: (b, R/2) float32.
            ends: (B,) int32, index of the last token of a cache row's prompt among all tokens; 0 for other rows.
            rows: (b,) int32, cache rows to use; other rows are unchanged.

        Returns:
            Logits (B, V).
        """
        batch_size, length = positions.shape
        decoder, rows = self.model.language_model, rows if self.selects_rows else None
        embeds = self.model.merge(ids, image_features, sources).reshape((batch_size, length, -1))
        hidden = decoder.with_cache(embeds, positions, ops.expand_dims(inv_freq, 1), self.caches, rows)
        return decoder.lm_head(ops.gather(hidden.reshape((batch_size * length, -1)), ends, 0))


class DecodeGraph(Graph):
    """One token per row: ids (B,), positions (B, 1) int32 and inv_freq (B, R/2) float32 -> logits (B, V)."""

    def __init__(self, language_model, caches):
        super().__init__()
        self.language_model = language_model
        self.caches = caches

    def construct(self, ids, positions, inv_freq):
        embeds = self.language_model.embed_tokens(ids.reshape((-1, 1)))
        hidden = self.language_model.with_cache(embeds, positions, ops.expand_dims(inv_freq, 1), self.caches)
        return self.language_model.lm_head(hidden[:, 0])


class ScoreGraph(Graph):
    """A forward pass without a cache: embeds (B, L, hidden) -> logits (B, L, V)."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        return self.language_model.lm_head(self.language_model(embeds, inv_freq))


class GraphRunner:
    """Runs and times graphs; compiles each once per shape.

    Args:
        graph_mode: whether Cells are compiled; False for PyNative mode.
        on_compile: called with the name of the stage before a large graph is compiled.
        cache_graphs: whether graphs are kept on disk, see `mindvlm.generation.graph_cache`.

    Attributes:
        seconds: time per stage since the last `reset_clock`.
        compiled: the phase of each compiled graph and shape.
    """

    def __init__(
        self, *, graph_mode: bool, on_compile: Callable[[str], None] | None = None, cache_graphs: bool = False
    ):
        self.graph_mode = graph_mode
        self.on_compile = on_compile
        self.cache_graphs = cache_graphs
        self.compiled: dict[tuple, str] = {}
        self.reset_clock()

    def reset_clock(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def run(self, stage: str, graph: nn.Cell | Callable, *inputs: Tensor):
        """Runs a graph, or a function on the host, and adds the time to its stage.

        A graph that raises an error is compiled again at its next call.
        """
        if isinstance(graph, nn.Cell):
            self.compile(stage, graph, *inputs)
        start = time.perf_counter()
        try:
            result = graph(*inputs)
            runtime.wait_for_device()
        except Exception:
            if isinstance(graph, nn.Cell):
                self.drop(graph)
            raise
        self.seconds[stage] += time.perf_counter() - start
        return result

    def compile(self, stage: str, graph: nn.Cell, *inputs: Tensor) -> None:
        """Compiles a graph for inputs of these shapes, or selects its compiled form."""
        runtime.set_mode(self.graph_mode)
        if not self.graph_mode:
            return
        key = (id(graph), graph.training, tuple((x.shape, x.dtype) for x in inputs))
        if key in self.compiled:
            graph.phase_cache[graph.phase] = self.compiled[key]
            return
        start = time.perf_counter()
        with uninterrupted():
            if self.cache_graphs:
                compile_cached(graph, inputs, lambda: self.announce(stage, graph))
            else:
                self.announce(stage, graph)
                graph.compile(*inputs)
        self.compiled[key] = graph.phase_cache[graph.phase]
        self.seconds["compile"] += time.perf_counter() - start

    def announce(self, stage: str, graph: nn.Cell) -> None:
        if self.on_compile and isinstance(graph, VisionGraph | PrefillGraph | DecodeGraph):
            self.on_compile(stage)

    def drop(self, graph: nn.Cell) -> None:
        """Drops the compiled forms of a graph, because MindSpore refuses all calls of one after an error."""
        self.forget(graph)
        graph.compile_cache.clear()

    def forget(self, *graphs: nn.Cell | None) -> None:
        """Forgets graphs that are about to be deleted, because Python reuses ids."""
        gone = {id(graph) for graph in graphs}
        self.compiled = {key: phase for key, phase in self.compiled.items() if key[0] not in gone}


def bucket_length(length: int) -> int:
    """Returns the padded length of a prompt: the next multiple of `BLOCK`."""
    return -(-length // BLOCK) * BLOCK


def cache_capacity(length: int, max_length: int) -> int:
    """Returns the cache capacity for `length` tokens.

    Capacities are powers of two from 128 on, so attention reads at most twice the valid positions, limited to the
    maximum context.
    """
    capacity = 128
    while capacity < length:
        capacity *= 2
    return max(length, min(capacity, bucket_length(max_length)))


def padded_ids(ids: list[int], length: int) -> np.ndarray:
    """Returns one row of ids padded with zeros, (1, length) int32."""
    out = np.zeros((1, length), np.int32)
    out[0, : len(ids)] = ids
    return out
