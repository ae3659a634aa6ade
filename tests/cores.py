"""The cores of the tests.

Between two kernels, and while they compile, MindSpore's threads wait in busy loops. A process that is bound to one core
takes half of the processor time, and takes none from the processes beside it.
"""

import os

# read before any thread is bound
CORES = sorted(os.sched_getaffinity(0))


def bind_to_core(number: int) -> None:
    """Binds the calling thread, and the processes that it starts, to one core; counts round beyond the last core."""
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})
