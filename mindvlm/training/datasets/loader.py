"""Batches of a job in a fixed order, on any number of devices and processes, resumable at any step.

The rows of an optimizer step, over all devices and accumulated passes, are its lanes. Lane l of R takes the sample
numbers first + l, first + l + R, first + l + 2R, ..., one a step. If a sample cannot be used, the next of its lane
replaces it, so lanes never wait for each other, devices do not communicate, and no number is used twice. Row i of pass
a on device d is lane (a * num_shards + d) * batch_size + i: one device with twice the batch size sees what two devices
see.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from mindvlm.core.errors import UserError
from mindvlm.core.processes import ProcessPool
from mindvlm.training.datasets.collate import Collator, SampleBatch
from mindvlm.training.datasets.config import DatasetsConfig
from mindvlm.training.datasets.samples import Sample, SampleMaker, SampleOptions, Skipped
from mindvlm.training.datasets.skip_log import SkipLog

MAX_SKIPS_IN_A_ROW = 200


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's part of every optimizer step.

    Attributes:
        shard, num_shards: the index of this data-parallel replica and their number.
        num_passes: passes of one optimizer step.
    """

    shard: int = 0
    num_shards: int = 1
    num_passes: int = 1


class BatchLoader:
    """The batches of one replica.

    Args:
        options: describes how samples are made.
        collator: pads them.
        config: batch size, worker processes, batches made ahead, and what happens to samples that cannot be used.
        share: of this process.
        skip_log: lists skipped samples.
        state: from `state` or `merge_states`, to resume; None starts with sample 0.

    Raises:
        UserError: the state is malformed, or data cannot be opened.
    """

    def __init__(
        self,
        options: SampleOptions,
        collator: Collator,
        config: DatasetsConfig,
        share: Share,
        *,
        skip_log: SkipLog | None = None,
        state: dict | None = None,
    ):
        self.collator, self.batch_size, self.bad_samples = collator, config.batch_size, config.bad_samples
        self.shard, self.num_shards, self.num_passes = share.shard, share.num_shards, share.num_passes
        self.rows_per_step = self.batch_size * self.num_shards * self.num_passes
        self.epoch_size = options.mixture.epoch_size
        self.skip_log = skip_log or SkipLog()
        self.skips_in_a_row = 0
        self.first, self.num_batches, self.skips = self._start(state)
        # samples ordered by each lane, and orders not yet taken
        self.num_ordered = {lane: self._turn(lane) for lane in self._own_lanes()}
        self.orders: dict[int, deque] = {lane: deque() for lane in self.num_ordered}
        self.workers = SampleWorkers(options, config.num_workers)
        self.look_ahead = config.look_ahead if config.num_workers else 0
        for ahead in range(self.look_ahead):
            for lane in self._lanes(self.num_batches + ahead):
                self._order(lane)

    def take(self) -> SampleBatch:
        """Returns the next batch.

        Raises:
            UserError: too many samples in a row cannot be used, or a single one with `bad_samples` "stop".
        """
        for lane in self._lanes(self.num_batches + self.look_ahead):
            self._order(lane)
        samples = [self._take(lane) for lane in self._lanes(self.num_batches)]
        self.num_batches += 1
        return self.collator(samples)

    @property
    def epoch(self) -> float:
        """Completed epochs, with the fraction of the current one."""
        return (self.first + self.num_batches // self.num_passes * self.rows_per_step) / self.epoch_size

    @property
    def state(self) -> dict:
        """The position of this device's lanes, for JSON. Available between optimizer steps only.

        Raises:
            ValueError: called between the passes of one step.
        """
        if self.num_batches % self.num_passes:
            raise ValueError(f"{self.num_batches % self.num_passes} of {self.num_passes} passes of the step are taken")
        return {
            "first": self.first,
            "rows_per_step": self.rows_per_step,
            "num_steps": self.num_batches // self.num_passes,
            "skips": {str(lane): count for lane, count in self.skips.items() if count and lane in self.orders},
        }

    def close(self) -> None:
        """Stops the worker processes."""
        self.workers.close()

    def _take(self, lane: int) -> Sample:
        while True:
            made = self.workers.result(self.orders[lane].popleft())
            if isinstance(made, Sample):
                self.skips_in_a_row = 0
                return made
            self._skip(lane, made)
            self._order(lane)

    def _skip(self, lane: int, skipped: Skipped) -> None:
        if self.bad_samples == "stop":
            raise UserError(str(skipped))
        self.skip_log.add(skipped)
        self.skips[lane] = self.skips.get(lane, 0) + 1
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise UserError(f"{self.skips_in_a_row} samples in a row cannot be used, the last is {skipped}")

    def _order(self, lane: int) -> None:
        number = self.first + lane + self.num_ordered[lane] * self.rows_per_step
        self.orders[lane].append(self.workers.order(number))
        self.num_ordered[lane] += 1

    def _turn(self, lane: int) -> int:
        return self.num_batches // self.num_passes + self.skips.get(lane, 0)

    def _lanes(self, batch_number: int) -> range:
        begin = (batch_number % self.num_passes * self.num_shards + self.shard) * self.batch_size
        return range(begin, begin + self.batch_size)

    def _own_lanes(self) -> list[int]:
        return [lane for number in range(self.num_passes) for lane in self._lanes(number)]

    def _start(self, state: dict | None) -> tuple[int, int, dict[int, int]]:
        if state is None:
            return 0, 0, {}
        try:
            first, rows, num_steps = (int(state[key]) for key in ("first", "rows_per_step", "num_steps"))
            skips = {int(lane): int(count) for lane, count in state["skips"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"data position {state!r} cannot be read; start again without resuming") from None
        if rows == self.rows_per_step:
            return first, num_steps * self.num_passes, skips
        # with another number of lanes, start after the last number that any old lane has used
        behind = max((lane + 1 + (count - 1) * rows for lane, count in skips.items() if count), default=0)
        return first + num_steps * rows + max(0, behind), 0, {}


def merge_states(states: Iterable[dict]) -> dict:
    """Merges the states of all devices after the same step into one that any device can resume from.

    Raises:
        UserError: the states are of different steps.
    """
    first, *others = states
    skips = dict(first["skips"])
    for other in others:
        if any(other[key] != first[key] for key in ("first", "rows_per_step", "num_steps")):
            raise UserError("data positions of the devices differ; resume from another checkpoint")
        skips |= other["skips"]
    return {**first, "skips": skips}


class SampleWorkers:
    """Makes samples by number in `num_workers` processes; with 0, in this process on request."""

    def __init__(self, options: SampleOptions, num_workers: int):
        self.maker = SampleMaker(options) if num_workers == 0 else None
        self.pool = None
        if num_workers:
            remedy = "lower data.num_workers or data.look_ahead"
            self.pool = ProcessPool(num_workers, _prepare, (options,), remedy=remedy)

    def order(self, number: int) -> Future | int:
        """Orders sample `number`; pass the return value to `result`. Raises UserError if a process was killed."""
        return number if self.pool is None else self.pool.submit(_make, number)

    def result(self, order: Future | int) -> Sample | Skipped:
        """Waits for an ordered sample. Raises UserError if a process was killed."""
        return self.maker.make(order) if self.pool is None else self.pool.result(order)

    def close(self) -> None:
        """Cancels open orders and stops the processes."""
        if self.pool is not None:
            self.pool.close()


_maker: SampleMaker | None = None


def _prepare(options: SampleOptions) -> None:
    global _maker
    _maker = SampleMaker(options)


def _make(number: int) -> Sample | Skipped:
    return _maker.make(number)
