"""All benchmarks. A module of this package defines BENCHMARKS: name -> `Benchmark`."""

import pkgutil
from importlib import import_module

from mindvlm.core.errors import UserError
from mindvlm.evaluation.benchmark import Benchmark


def benchmarks() -> dict[str, Benchmark]:
    """Returns name -> benchmark. Does not import MindSpore."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {name: benchmark for module in modules for name, benchmark in module.BENCHMARKS.items()}


def get_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of a name. Raises UserError if there is none."""
    known = benchmarks()
    if name not in known:
        raise UserError(f"--benchmark {name}: no such benchmark; expected one of {', '.join(known)} (see --list)")
    return known[name]
