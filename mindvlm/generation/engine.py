"""Generation engine: B slots over one KV cache, prefill in length buckets, one decode graph for all slots.

B slots, L length, N images, T tokens per image, R rotated dimensions, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
from mindspore import Tensor, nn

from mindvlm.core.errors import UserError
from mindvlm.generation.graphs import (
    BLOCK,
    DecodeGraph,
    GraphRunner,
    MergeGraph,
    PrefillGraph,
    ScoreGraph,
    VisionGraph,
    cache_capacity,
)
from mindvlm.generation.prefill import RUN_SIZES, NewTokens, PrefillRun, packed_runs, separate_runs
from mindvlm.generation.request import Addition, Request, Slot
from mindvlm.generation.sampling import NOT_FINITE, Sampler
from mindvlm.nn.rotary import decoder_frequencies, ntk_alpha
from mindvlm.nn.rows import concatenated, padded, rows_between, with_rows, wrapped
from mindvlm.nn.splice import splice_sources


class Engine:
    """Generates tokens for up to B independent requests with one model and one KV cache.

    `add` prefills a request in a free slot, `step` generates the next token of every running slot, `release` frees a
    slot. Requests may be added and released between any two steps. The result of a row does not depend on other rows:
    not by a bit if `is_exact`, else up to rounding.

    Args:
        model: a family's model Cell with `language_model`, `encode_images` and `merge`.
        placeholder_id: token that stands for one image feature row.
        max_length: maximum number of tokens of a row.
        num_slots: B.
        graph_mode: whether Cells are compiled; False for PyNative mode.
        on_compile: called with the name of the stage before a large graph is compiled.
        cache_graphs: whether compiled graphs are kept on disk.

    Attributes:
        slots: the slot of each row; None for a free row.
        next_logits: (B, V) logits of the last step; for a new request, the logits after its prompt.
        capacity: number of positions in the cache.
        is_exact: whether a row has the same bits whatever its prompt is prefilled with, and however many of its blocks
            are in the cache. Prompts are then prefilled together.
        run_sizes: see `packed_runs`.
        runner: compiles, runs and times the graphs.
    """

    def __init__(
        self,
        model: nn.Cell,
        *,
        placeholder_id: int,
        max_length: int,
        num_slots: int = 1,
        graph_mode: bool = True,
        on_compile: Callable[[str], None] | None = None,
        cache_graphs: bool = False,
    ):
        self.model = model.set_train(False)
        self.config = model.config.language_model
        self.placeholder_id = placeholder_id
        self.max_length = max_length
        self.runner = GraphRunner(graph_mode=graph_mode, on_compile=on_compile, cache_graphs=cache_graphs)
        self.sampler = Sampler(self.runner.run, vocab_size=self.config.vocab_size, max_ids=max_length + 1)
        self.vision = VisionGraph(model)
        self.merge = MergeGraph(model)
        self.score = ScoreGraph(model.language_model)
        self.slots: list[Slot | None] = []
        self.blank_row = Tensor(np.zeros((1, self.config.hidden_size), np.float32), model.language_model.dtype)
        self.caches = None
        self.is_exact = model.language_model.has_exact_rows
        self.run_sizes = RUN_SIZES
        self.resize(num_slots)

    def resize(self, num_slots: int) -> None:
        """Releases all slots. A different number of slots drops the cache."""
        for slot in filter(None, self.slots):
            self.release(slot)
        if len(self.slots) != num_slots:
            if self.caches is not None:
                self.runner.forget(self.prefill, self.decode)
            self.prefill = self.decode = self.caches = self.next_logits = None
            self.capacity = 0
        self.slots = [None] * num_slots
        self.inv_freq = np.tile(decoder_frequencies(self.config), (num_slots, 1))

    def clear(self) -> None:
        """Releases all slots and overwrites the cache, which a failure may have left with NaN."""
        self.resize(len(self.slots))
        for cache in self.caches or ():
            for row in range(len(self.slots)):
                cache.clear_row(row)

    def add(self, request: Request, *, slot: Slot | None = None, num_kept: int | None = None) -> Slot:
        """Prefills a request and returns its slot.

        Args:
            request: the request.
            slot: a finished, unreleased slot to continue. The common prefix of its ids is not recomputed, unless the
                longer prompt has another NTK factor. `request.features` must begin with the features of its pictures.
            num_kept: number of ids of `slot` that are not recomputed; None for the common prefix.

        Raises:
            UserError: no slot is free, the prompt is longer than `max_length`, or the numbers of placeholders and
                feature rows differ. The engine is unchanged.
        """
        return self.add_all([Addition(request, slot, num_kept)])[0]

    def add_all(self, additions: Sequence[Addition]) -> list[Slot]:
        """Prefills several requests and returns their slots. Errors are those of `add`."""
        if not additions:
            return []
        free = [row for row, slot in enumerate(self.slots) if slot is None]
        prompts, features, alphas = [], [], []
        for request, slot, num_kept in additions:
            ids, alpha = list(request.ids), self.alpha_for(len(request.ids))
            self.check_length(len(ids))
            # the last token is always computed, for its logits
            start = 0
            if slot and slot.alpha == alpha:
                start = min(slot.common_length(ids) if num_kept is None else num_kept, len(ids) - 1)
            features.append(self.new_features(request, start))
            if slot is None and not free:
                raise UserError(f"all {len(self.slots)} slots are busy; release one before another request")
            row = slot.row if slot else free.pop(0)
            prompts.append(NewTokens(row, start, ids[start:], decoder_frequencies(self.config, alpha)))
            alphas.append(alpha)
        for prompt, (_, slot, _) in zip(prompts, additions, strict=True):
            if slot:
                # an interruption leaves the rest of the row invalid
                slot.cached = slot.cached[: prompt.start]
        self.run_prefill(prompts, concatenated(rows for rows in features if rows is not None))
        added = []
        for prompt, alpha, (request, slot, _) in zip(prompts, alphas, additions, strict=True):
            if slot:
                self.release(slot)
            self.slots[prompt.row] = new = Slot(prompt.row, request, alpha)
            self.inv_freq[prompt.row] = prompt.inv_freq
            added.append(new)
        if any(slot.request.options.max_new_tokens > 1 and len(slot.cached) < self.capacity for slot in added):
            # compiles before the first token is returned
            self.runner.compile("decode", self.decode, *self.decode_inputs())
        return added

    def step(self) -> list[Slot]:
        """Appends the next token to `new_ids` of every running slot; returns these slots.

        A slot whose logits contain NaN or infinity ends with an `error`; the other slots continue.
        """
        running = [slot for slot in self.slots if slot and slot.is_running]
        if not running:
            return []
        self.run_decode(running)
        ids = self.model.from_first_rank(self.sampler.choose(self.next_logits, running))
        for slot in running:
            token = int(ids[slot.row]) if slot.forced_id is None else slot.forced_id
            if token == NOT_FINITE:
                self.fail(slot)
            else:
                slot.take(token, self.max_length)
        return running

    def fail(self, slot: Slot) -> None:
        """Ends an answer whose logits contain NaN or infinity."""
        dtype = str(self.model.language_model.dtype).lower()
        remedy = (
            "values beyond its range overflow; set dtype to bfloat16 or float32"
            if dtype == "float16"
            else "the weights are damaged; convert the original checkpoint again with mindvlm-convert --verify"
        )
        step = f"token {len(slot.new_ids) + 1} of the answer"
        slot.fail(UserError(f"the logits of {step} contain NaN or infinity in {dtype}: {remedy}"))
        # attention multiplies hidden positions by zero, which does not hide NaN from the next request
        for cache in self.caches:
            cache.clear_row(slot.row)

    def release(self, slot: Slot) -> None:
        """Frees the row of a slot; does nothing if it is already released."""
        if not slot.is_released:
            slot.is_released = True
            self.slots[slot.row] = None

    def complete(self, requests: Sequence[Request]) -> list[Slot]:
        """Answers all requests, as many at a time as slots are free; returns their released slots."""
        slots: list[Slot] = []
        try:
            while len(slots) < len(requests) or any(slot.is_running for slot in slots):
                waiting = requests[len(slots) : len(slots) + self.slots.count(None)]
                slots += self.add_all([Addition(request) for request in waiting])
                if not self.step():
                    raise UserError(f"{len(requests)} requests are waiting but no slot is free; release one")
                for slot in slots:
                    if slot.stop_reason:
                        self.release(slot)
        finally:
            # releases the rows after an error or Ctrl-C too
            for slot in slots:
                self.release(slot)
        return slots

    def encode_images(self, *pixels: np.ndarray) -> Tensor:
        """Encodes the pixels of each tower, (N, 3, height, width) float32, to image features (N, T, hidden)."""
        dtype = self.model.language_model.dtype
        return self.runner.run("vision", self.vision, *(Tensor(array).astype(dtype) for array in pixels))

    def logits(self, input_ids: np.ndarray, features: Tensor | None = None) -> Tensor:
        """Returns the logits (B, L, V) at every position of input_ids (B, L) int32, without the cache.

        The NTK factor is that of length L. `features` are as in `Request`.
        """
        self.check_length(input_ids.shape[1])
        inv_freq = self.frequencies(self.alpha_for(input_ids.shape[1]))
        return self.runner.run("prefill", self.score, self.merged_embeddings(input_ids, features), inv_freq)

    def merged_embeddings(self, input_ids: np.ndarray, features: Tensor | None = None) -> Tensor:
        """Returns token embeddings (B, L, hidden) with features (..., hidden) in place of the placeholders."""
        rows = None if features is None else features.reshape((-1, self.config.hidden_size))
        return self.runner.run("prefill", self.merge, *self.merge_inputs(input_ids, rows))

    def merge_inputs(self, input_ids: np.ndarray, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the inputs of the model's `merge`: ids (B, L), feature rows (B * L, hidden) and sources (B, L).

        The rows are padded to the number of tokens, so that graphs do not depend on the number of pictures.

        Args:
            rows: feature rows (num_rows, hidden); None without.
        """
        sources = splice_sources(input_ids, 0 if rows is None else len(rows), 1, self.placeholder_id)
        rows = padded(self.blank_row if rows is None else rows, input_ids.size)
        # a placeholder may be negative; its row comes from the features
        return wrapped(np.maximum(input_ids, 0)), rows, wrapped(sources)

    def alpha_for(self, length: int) -> float:
        """Returns the dynamic NTK factor of a prompt of this length."""
        return ntk_alpha(length, self.config.training_length) if self.config.use_dynamic_ntk else 1

    def frequencies(self, alpha: float) -> Tensor:
        """Returns the rotary frequencies (R/2,) float32."""
        return Tensor(decoder_frequencies(self.config, alpha))

    def check_length(self, length: int) -> None:
        """Raises UserError if a prompt of this length exceeds the context."""
        if length > self.max_length:
            raise UserError(
                f"the prompt has {length} tokens but the context holds {self.max_length}; "
                "shorten it or raise model.max_length (in a folder's config.json tokenizer_model_max_length, or else "
                "max_position_embeddings)"
            )

    def new_features(self, request: Request, start: int) -> Tensor | None:
        """Returns the feature rows of the placeholders from position `start` on, (num_rows, hidden), or None."""
        num_new = list(request.ids[start:]).count(self.placeholder_id)
        features = request.features
        num_rows = 0 if features is None else features.size // self.config.hidden_size
        if num_new > num_rows or (start == 0 and num_new < num_rows):
            raise UserError(
                f"the prompt has {num_new} image placeholders but the images give {num_rows} feature rows; give one "
                "<image> for each picture"
            )
        if num_new == 0:
            return None
        return rows_between(features.reshape((-1, self.config.hidden_size)), num_rows - num_new, num_rows)

    def run_prefill(self, prompts: Sequence[NewTokens], features: Tensor | None) -> None:
        """Prefills prompts and updates `next_logits`.

        Args:
            features: the rows of all their placeholders in order, (num_rows, hidden); None without.
        """
        runs = list(packed_runs(prompts, self.run_sizes) if self.is_exact else separate_runs(prompts, self.max_length))
        ends = [prompt.start + len(prompt.ids) for prompt in prompts]
        # of exact runs, the padding is not stored
        self.reserve(max(ends) if self.is_exact else max(int(run.positions[-1, -1]) + 1 for run in runs))
        num_used = 0
        for run in runs:
            num_rows = int((run.ids == self.placeholder_id).sum())
            rows = rows_between(features, num_used, num_used + num_rows) if num_rows else None
            num_used += num_rows
            logits = self.runner.run("prefill", self.prefill, *self.prefill_inputs(run, rows))
            self.take_logits(logits, list(run.ends))

    def prefill_inputs(self, run: PrefillRun, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Returns the inputs of the prefill graph for a run with these feature rows."""
        ends = np.zeros(len(self.slots), np.int32)
        ends[list(run.ends)] = list(run.ends.values())
        merged = self.merge_inputs(run.ids.reshape(1, -1), rows)
        return *merged, *map(wrapped, (run.positions, run.inv_freq, ends, run.rows))

    def compile_runs(self) -> None:
        """Compiles the graphs of packed runs of each of `run_sizes` blocks."""
        for size in self.run_sizes:
            prompt = NewTokens(0, 0, [0] * (size * BLOCK), decoder_frequencies(self.config))
            (run,) = packed_runs([prompt], (size,))
            self.runner.compile("prefill", self.prefill, *self.prefill_inputs(run, None))

    def run_decode(self, running: list[Slot]) -> None:
        """Runs the last id of every running slot that has one and updates `next_logits`."""
        fed = [slot for slot in running if slot.new_ids]
        if not fed:
            return
        # the graph writes a token to every row, which must not overwrite the tokens of idle slots
        self.reserve(max(min(len(slot.cached) + 1, self.max_length) for slot in self.slots if slot))
        logits = self.runner.run("decode", self.decode, *self.decode_inputs())
        for slot in fed:
            slot.cached.append(slot.new_ids[-1])
        # idle rows are not read
        self.take_logits(logits, [slot.row for slot in fed] if len(fed) < len(running) else range(len(self.slots)))

    def decode_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids (B,), positions (B, 1) and frequencies (B, R/2) of a decode step.

        Every row writes one token. An idle row writes after its last token; a full one overwrites its last token, which
        no continuation reuses.
        """
        ids, positions = np.zeros((2, len(self.slots)), np.int32)
        for slot in filter(None, self.slots):
            ids[slot.row] = slot.new_ids[-1] if slot.new_ids else 0
            positions[slot.row] = min(len(slot.cached), self.max_length - 1)
        return wrapped(ids), wrapped(positions[:, None]), wrapped(self.inv_freq)

    def take_logits(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Replaces some rows of `next_logits` by those of logits (B, V)."""
        if self.next_logits is None or len(rows) == len(self.slots):
            self.next_logits = logits
        elif rows:
            self.next_logits = with_rows(self.next_logits, logits, rows)

    def reserve(self, length: int) -> None:
        """Ensures capacity for rows of this length; allocates the cache, or a larger one with the same contents."""
        if self.capacity >= length:
            return
        capacity = cache_capacity(length, self.max_length)
        caches = self.model.language_model.new_caches(len(self.slots), capacity)
        if self.caches is not None and any(slot and slot.cached for slot in self.slots):
            for larger, smaller in zip(caches, self.caches, strict=True):
                larger.copy_from(smaller)
        self.runner.forget(self.prefill, self.decode)
        self.prefill = PrefillGraph(self.model, caches)
        self.decode = DecodeGraph(self.model.language_model, caches)
        # assigned last, so an interruption leaves the old cache in place
        self.caches, self.capacity = caches, capacity
