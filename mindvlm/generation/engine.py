"""Runs a model's inference graphs: vision, merge, prefill by length buckets, decode, over one growing KV cache.

B batch, L length, S slots, N images, T tokens an image, V vocabulary.
"""

import time
from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.core.interruption import uninterrupted
from mindvlm.generation.graphs import (
    DecodeGraph,
    MergeGraph,
    PrefillGraph,
    ScoreGraph,
    VisionGraph,
    bucket_length,
    cache_capacity,
    pad_rows,
)
from mindvlm.nn.rotary import inverse_frequencies, ntk_alpha
from mindvlm.nn.splice import splice_sources

# A longer prompt is prefilled in pieces of this many tokens, so that attention scores stay small.
MAX_PREFILL_LENGTH = 1024
STAGES = ("compile", "vision", "prefill", "decode")


class Engine:
    """One model, one KV cache, B rows that grow together.

    Args:
        model: a family's model Cell with `language_model`, `encode_images` and `merge`.
        placeholder_id: the token that stands for one image feature row.
        max_length: the most tokens that a row may reach.
        graph_mode: whether Cells are compiled (PyNative otherwise).
        on_compile: called with a graph's name before it is compiled.

    Attributes:
        lengths: (B,) tokens whose keys and values are in the cache.
        owner: whose conversation the cache holds; None after a reset.
        num_prefills: how often tokens were appended, to notice that the cache went to somebody else.
        seconds: time spent per stage since the last `reset_clock`.
    """

    def __init__(
        self,
        model: nn.Cell,
        *,
        placeholder_id: int,
        max_length: int,
        graph_mode: bool = True,
        on_compile: Callable[[str], None] | None = None,
    ):
        self.model = model.set_train(False)
        self.config = model.config.language_model
        self.placeholder_id = placeholder_id
        self.max_length = max_length
        self.graph_mode = graph_mode
        self.on_compile = on_compile
        self.vision = VisionGraph(model)
        self.merge = MergeGraph(model)
        self.score = ScoreGraph(model.language_model)
        self.prefill = self.decode = None
        self.lengths = np.zeros(0, np.int32)
        self.owner = None
        self.num_prefills = 0
        self.num_slots = 0
        self.caches = None
        self.alpha = 1
        self.inv_freq = None
        self.compiled: set = set()
        self.reset_clock()

    def reset_clock(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def encode_images(self, *pixels: np.ndarray) -> Tensor:
        """Pixels of the family's towers, each (N, 3, height, width) float32 -> image features (N, T, hidden)."""
        dtype = self.model.language_model.dtype
        return self.run("vision", self.vision, *(Tensor(array).astype(dtype) for array in pixels))

    def reset(self, batch_size: int) -> None:
        """Empties the cache for B new rows."""
        if len(self.lengths) != batch_size:
            self.caches, self.num_slots = None, 0
        self.owner = None
        self.lengths = np.zeros(batch_size, np.int32)

    def alpha_for(self, length: int) -> float:
        """The dynamic NTK factor that a prompt of this length asks for."""
        return ntk_alpha(length, self.config.training_length) if self.config.use_dynamic_ntk else 1

    def append(
        self, rows: list[list[int]], image_features: Tensor | None = None, order: np.ndarray | None = None
    ) -> Tensor:
        """Prefill: adds tokens to every row and returns the logits (B, V) behind each row's last token.

        The NTK factor follows from the rows' length when the cache is empty and stays until it is reset.

        Args:
            rows: B lists of ids, at least one each.
            image_features: (N, T, hidden), in the order of the placeholders in `rows`.
            order: the feature row for each placeholder where that is another order, see `splice_sources`.

        Raises:
            UserError: a row passes `max_length`, or placeholders and features differ in number.
        """
        self.num_prefills += 1
        counts = np.array([len(row) for row in rows], np.int32)
        totals = self.lengths + counts
        self.check_length(int(totals.max()))
        if not self.lengths.any():
            self.set_alpha(self.alpha_for(int(totals.max())))
        # near the end of the context the padding gives way, so that the cache need not grow beyond it
        room = bucket_length(self.max_length) - int(self.lengths.max())
        padded = max(min(self.padded_length(int(counts.max())), room), int(counts.max()))
        embeds = self.merged_embeddings(pad_rows(rows, padded, 0), image_features, order)
        self.ensure_slots(int(self.lengths.max()) + embeds.shape[1])
        logits = None
        for start in range(0, embeds.shape[1], MAX_PREFILL_LENGTH):
            chunk = embeds[:, start : start + MAX_PREFILL_LENGTH]
            stop = start + chunk.shape[1]
            positions = self.lengths[:, None] + np.arange(start, stop, dtype=np.int32)
            last = np.clip(counts - 1, start, stop - 1) - start
            of_chunk = self.run("prefill", self.prefill, chunk, Tensor(positions), self.inv_freq, Tensor(last))
            ends_here = Tensor(((counts > start) & (counts <= stop))[:, None])
            logits = of_chunk if logits is None else ops.select(ends_here, of_chunk, logits)
        self.lengths = totals
        return logits

    def padded_length(self, length: int) -> int:
        """Whole chunks and a bucket for the rest."""
        chunks, rest = divmod(length, MAX_PREFILL_LENGTH)
        return chunks * MAX_PREFILL_LENGTH + (bucket_length(rest) if rest else 0)

    def step(self, ids: Tensor) -> Tensor:
        """Decode: feeds one token a row, ids (B,) int32 -> logits (B, V).

        A full row, which has ended while others go on, keeps writing its last slot.
        """
        positions = np.minimum(self.lengths, self.max_length - 1)
        self.ensure_slots(int(positions.max()) + 1)
        logits = self.run("decode", self.decode, ids, Tensor(positions[:, None]), self.inv_freq)
        self.lengths = positions + 1
        return logits

    def truncate(self, length: int) -> None:
        """Forgets what every row holds beyond `length` tokens."""
        self.lengths = np.minimum(self.lengths, np.int32(length))

    def logits(
        self, input_ids: np.ndarray, image_features: Tensor | None = None, order: np.ndarray | None = None
    ) -> Tensor:
        """Logits at every position, without the cache: input_ids (B, L) int32 -> (B, L, V)."""
        self.check_length(input_ids.shape[1])
        inv_freq = self.frequencies(self.alpha_for(input_ids.shape[1]))
        return self.run("prefill", self.score, self.merged_embeddings(input_ids, image_features, order), inv_freq)

    def check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"the prompt has {length} tokens but the context holds {self.max_length}; "
                "shorten it or raise model.max_length (tokenizer_model_max_length in a folder's config.json)"
            )

    def merged_embeddings(
        self, input_ids: np.ndarray, image_features: Tensor | None, order: np.ndarray | None = None
    ) -> Tensor:
        if image_features is None:
            sources = splice_sources(input_ids, 0, 0, self.placeholder_id)
            # an empty tensor cannot enter a graph; one row that nothing points at can
            blank = np.zeros((1, 1, self.config.hidden_size), np.float32)
            image_features = Tensor(blank).astype(self.model.language_model.dtype)
        else:
            num_images, image_token_len, _ = image_features.shape
            sources = splice_sources(input_ids, num_images, image_token_len, self.placeholder_id, order=order)
        # a placeholder may have no embedding; its row is taken from the features
        ids = Tensor(np.maximum(input_ids, 0))
        return self.run("prefill", self.merge, ids, image_features, Tensor(sources))

    def frequencies(self, alpha: float) -> Tensor:
        return Tensor(inverse_frequencies(self.config.rotary_dim, self.config.rope_theta, alpha=alpha))

    def set_alpha(self, alpha: float) -> None:
        self.alpha = alpha
        self.inv_freq = self.frequencies(alpha)

    def ensure_slots(self, needed: int) -> None:
        """Allocates the cache, or a larger one that takes over what is in it."""
        if self.num_slots >= needed:
            return
        num_slots = cache_capacity(needed, self.max_length)
        caches = self.model.language_model.new_caches(len(self.lengths), num_slots)
        if self.caches is not None and self.lengths.any():
            for new_layer, old_layer in zip(caches, self.caches, strict=True):
                for new, filled in ((new_layer.key, old_layer.key), (new_layer.value, old_layer.value)):
                    buffer = np.zeros(new.shape, filled.asnumpy().dtype)
                    buffer[:, :, : filled.shape[2]] = filled.asnumpy()
                    new.set_data(Tensor.from_numpy(buffer))
        # Python gives the ids of graphs that go away out again
        gone = {id(self.prefill), id(self.decode)}
        self.compiled = {key for key in self.compiled if key[0] not in gone}
        self.prefill = PrefillGraph(self.model.language_model, caches)
        self.decode = DecodeGraph(self.model.language_model, caches)
        # last, so that Ctrl-C before it leaves a cache that is too small and is enlarged the next time
        self.caches, self.num_slots = caches, num_slots

    def prepare_step(self) -> None:
        """Compiles the decode graph, so that nothing is compiled between the first token and the second."""
        ids = Tensor(np.zeros(len(self.lengths), np.int32))
        self.compile_once("decode", self.decode, ids, Tensor(self.lengths[:, None]), self.inv_freq)

    def compile_once(self, stage: str, graph: nn.Cell, *inputs: Tensor) -> None:
        """Compiles a graph for inputs of a new shape, under the clock of compiling."""
        runtime.set_mode(self.graph_mode)
        key = (id(graph), graph.training, tuple((x.shape, x.dtype) for x in inputs))
        if not self.graph_mode or key in self.compiled:
            return
        start = time.perf_counter()
        if self.on_compile and isinstance(graph, VisionGraph | PrefillGraph | DecodeGraph):
            self.on_compile(stage)
        with uninterrupted():
            graph.compile(*inputs)
        self.compiled.add(key)
        self.seconds["compile"] += time.perf_counter() - start

    def run(self, stage: str, graph: nn.Cell, *inputs: Tensor) -> Tensor:
        """Runs a graph under the clock of its stage; a new shape is compiled first."""
        self.compile_once(stage, graph, *inputs)
        start = time.perf_counter()
        result = graph(*inputs)
        runtime.wait_for_device()
        self.seconds[stage] += time.perf_counter() - start
        return result
