"""What the machine can do at best, in the same run: reading memory and multiplying matrices, with numpy's BLAS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

READ_BYTES = 512 << 20
MATRIX_SIZE = 1536
REPEATS = 5


def read_bandwidth(num_threads: int) -> float:
    """Returns the bytes per second that all threads together read from memory; the best of several times."""
    parts = [np.ones(READ_BYTES // 4 // num_threads, np.float32) for _ in range(num_threads)]
    return sum(part.nbytes for part in parts) / shortest(lambda part: np.dot(part, part), parts)


def matrix_flops(num_threads: int) -> float:
    """Returns the float32 operations per second of a large matrix product on all threads; the best of several times."""
    generator, size = np.random.default_rng(0), MATRIX_SIZE
    matrices = [generator.standard_normal((size, size), np.float32) for _ in range(num_threads)]
    return num_threads * 2 * size**3 / shortest(lambda matrix: matrix @ matrix, matrices)


def shortest(action: Callable[[np.ndarray], object], arrays: list[np.ndarray]) -> float:
    """Returns the seconds of the action on all arrays at once, a thread each."""
    seconds = []
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(action, arrays))
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def probe(num_threads: int) -> dict[str, float]:
    """Returns `read_gb_per_s` and `gemm_gflops`, measured in a process of its own."""
    command = [sys.executable, "-m", __name__, str(num_threads)]
    # BLAS has one thread in each of the probes' threads
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    threads = int(sys.argv[1])
    print(json.dumps({"read_gb_per_s": read_bandwidth(threads) / 1e9, "gemm_gflops": matrix_flops(threads) / 1e9}))
