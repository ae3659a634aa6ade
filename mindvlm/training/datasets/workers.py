"""Samples made ahead of their use by other processes; results are asked for in the order the caller wants."""

from concurrent.futures import Future

from mindvlm.training.datasets.samples import Sample, SampleMaker, SampleOptions, Skipped
from mindvlm.training.processes import ProcessPool


class SampleWorkers:
    """Makes samples by number in `num_workers` processes, or here and now with 0."""

    def __init__(self, options: SampleOptions, num_workers: int):
        self.maker = SampleMaker(options) if num_workers == 0 else None
        self.pool = None
        if num_workers:
            remedy = "lower data.num_workers or data.look_ahead"
            self.pool = ProcessPool(num_workers, _prepare, (options,), remedy=remedy)

    def order(self, number: int) -> Future | int:
        """Asks for sample `number`; `result` takes what this returns. Raises UserError if a process was killed."""
        return number if self.pool is None else self.pool.submit(_make, number)

    def result(self, order: Future | int) -> Sample | Skipped:
        """Waits for an order. Raises UserError if a process was killed."""
        return self.maker.make(order) if self.pool is None else self.pool.result(order)

    def close(self) -> None:
        """Drops what is still ordered and ends the processes."""
        if self.pool is not None:
            self.pool.close()


_maker: SampleMaker | None = None


def _prepare(options: SampleOptions) -> None:
    global _maker
    _maker = SampleMaker(options)


def _make(number: int) -> Sample | Skipped:
    return _maker.make(number)
