"""Batches of a job in a fixed order, on any number of devices and processes, from any point on.

The rows of an optimizer step, over all devices and accumulated passes, are its lanes. Lane l of R takes the sample
numbers first + l, first + l + R, first + l + 2R, ... one a step. Where a sample cannot be used, the next of its lane
takes its place, so lanes never wait for each other, devices need not talk, and no number is used twice. Row i of pass a
on device d is lane (a * num_shards + d) * batch_size + i: one device with the batch of two sees what two devices see.
"""

from collections import deque
from collections.abc import Iterable
from typing import Literal

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.collate import Collator, SampleBatch
from mindvlm.training.datasets.samples import Sample, SampleOptions, Skipped
from mindvlm.training.datasets.skip_log import SkipLog
from mindvlm.training.datasets.workers import SampleWorkers

BadSamples = Literal["skip", "stop"]
MAX_SKIPS_IN_A_ROW = 200


class BatchLoader:
    """The batches of one device.

    Args:
        options: what samples are made from.
        collator: pads them.
        batch_size: rows of this device in one pass.
        shard, num_shards: this device and the number of data-parallel ones.
        accumulation: passes of one optimizer step.
        num_workers: processes; 0 makes samples when they are asked for.
        look_ahead: batches made ahead of their use.
        bad_samples: "skip" lists a sample that cannot be used and goes on, "stop" is an error.
        skip_log: list of what is skipped.
        state: of `state` or `merge_states`, to go on from there; None begins with sample 0.

    Raises:
        UserError: the state is of another kind, or data cannot be opened.
    """

    def __init__(
        self,
        options: SampleOptions,
        collator: Collator,
        *,
        batch_size: int,
        shard: int = 0,
        num_shards: int = 1,
        accumulation: int = 1,
        num_workers: int = 0,
        look_ahead: int = 4,
        bad_samples: BadSamples = "skip",
        skip_log: SkipLog | None = None,
        state: dict | None = None,
    ):
        self.collator, self.batch_size, self.bad_samples = collator, batch_size, bad_samples
        self.shard, self.num_shards, self.accumulation = shard, num_shards, accumulation
        self.rows_per_step = batch_size * num_shards * accumulation
        self.epoch_size = options.mixture.epoch_size
        self.skip_log = skip_log or SkipLog()
        self.skips_in_a_row = 0
        self.first, self.num_batches, self.skips = self._start(state)
        # samples that each lane has ordered, and the orders not yet taken
        self.num_ordered = {lane: self._turn(lane) for lane in self._own_lanes()}
        self.orders: dict[int, deque] = {lane: deque() for lane in self.num_ordered}
        self.workers = SampleWorkers(options, num_workers)
        self.look_ahead = look_ahead if num_workers else 0
        for ahead in range(self.look_ahead):
            for lane in self._lanes(self.num_batches + ahead):
                self._order(lane)

    def take(self) -> SampleBatch:
        """The next batch.

        Raises:
            UserError: too many samples in a row cannot be used, or one with `bad_samples` "stop".
        """
        for lane in self._lanes(self.num_batches + self.look_ahead):
            self._order(lane)
        samples = [self._take(lane) for lane in self._lanes(self.num_batches)]
        self.num_batches += 1
        return self.collator(samples)

    @property
    def epoch(self) -> float:
        """Epochs gone through so far."""
        return (self.first + self.num_batches // self.accumulation * self.rows_per_step) / self.epoch_size

    @property
    def state(self) -> dict:
        """Where the lanes of this device stand, for JSON. Only between optimizer steps.

        Raises:
            ValueError: called between the passes of one step.
        """
        if self.num_batches % self.accumulation:
            raise ValueError(
                f"{self.num_batches % self.accumulation} of {self.accumulation} passes of the step are taken"
            )
        return {
            "first": self.first,
            "rows_per_step": self.rows_per_step,
            "num_steps": self.num_batches // self.accumulation,
            "skips": {str(lane): count for lane, count in self.skips.items() if count and lane in self.orders},
        }

    def close(self) -> None:
        """Ends the processes."""
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
        return self.num_batches // self.accumulation + self.skips.get(lane, 0)

    def _lanes(self, batch_number: int) -> range:
        begin = (batch_number % self.accumulation * self.num_shards + self.shard) * self.batch_size
        return range(begin, begin + self.batch_size)

    def _own_lanes(self) -> list[int]:
        return [lane for number in range(self.accumulation) for lane in self._lanes(number)]

    def _start(self, state: dict | None) -> tuple[int, int, dict[int, int]]:
        if state is None:
            return 0, 0, {}
        try:
            first, rows, num_steps = (int(state[key]) for key in ("first", "rows_per_step", "num_steps"))
            skips = {int(lane): int(count) for lane, count in state["skips"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"data position {state!r} cannot be read; start again without resuming") from None
        if rows == self.rows_per_step:
            return first, num_steps * self.accumulation, skips
        # other lanes: they begin behind the last number that any of the old ones has used
        behind = max((lane + 1 + (count - 1) * rows for lane, count in skips.items() if count), default=0)
        return first + num_steps * rows + max(0, behind), 0, {}


def merge_states(states: Iterable[dict]) -> dict:
    """The states of all devices of one moment as one, which any device can go on from.

    Raises:
        UserError: they are not of the same moment.
    """
    first, *others = states
    skips = dict(first["skips"])
    for other in others:
        if any(other[key] != first[key] for key in ("first", "rows_per_step", "num_steps")):
            raise UserError("data positions of the devices differ; resume from another checkpoint")
        skips |= other["skips"]
    return {**first, "skips": skips}
