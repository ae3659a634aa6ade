"""A contender of the benchmark in a process of its own, which runs one phase when it is told to.

Started by `Worker` as `python -m mindvlm.tools.benchmarks.worker JOB.json`. Each line on standard input names a method
of the contender; the answer is a line of JSON on standard output, see `measured`. The end of the input ends the
process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import peak_memory
from mindvlm.tools.benchmarks.workload import Workload, read_workload, workload_record

NUM_KEPT_LOGITS = 4096
OURS = "mindvlm"


class InferencePeer(ABC):
    """A framework that answers the prompt of a workload; made with (workload, num_threads=).

    All results are on the host when a method returns. `vision`, `prefill` and `decode` can run again in this order.
    """

    PHASES = ("load", "compile", "vision", "prefill", "decode")
    workload: Workload

    @abstractmethod
    def describe(self) -> str:
        """Returns framework, version and settings in one line."""

    @abstractmethod
    def load(self) -> None:
        """Builds the model and fills its weights."""

    def compile(self) -> None:
        """Runs everything once, so that compilation and first-use costs fall here and not into the later phases."""
        self.vision()
        self.prefill()
        self.generate(2)

    @abstractmethod
    def vision(self) -> None:
        """Encodes the image and keeps its features."""

    def prefill(self) -> list[float]:
        """Runs the prompt into an empty cache and chooses the first token; returns the first logits."""
        return self.prompt_logits()[0, :NUM_KEPT_LOGITS].tolist()

    def decode(self) -> list[int]:
        """Generates the answer; returns its ids."""
        return self.generate(self.workload.num_tokens)

    @abstractmethod
    def prompt_logits(self) -> np.ndarray:
        """Prefills and chooses the first token; returns its logits (1, vocab_size)."""

    @abstractmethod
    def generate(self, num_tokens: int) -> list[int]:
        """Runs that many greedy steps; returns the chosen ids."""


class TrainingPeer(Protocol):
    """A framework that trains on a workload; made with (workload, num_threads=)."""

    def describe(self) -> str:
        """Returns framework, version and settings in one line."""

    def load(self) -> None:
        """Builds the model and fills its weights."""

    def compile(self) -> None:
        """Does whatever must happen once before the first step."""

    def step(self) -> float:
        """Runs forward, backward, clipping and update; returns the loss before the update."""


@dataclass(frozen=True)
class PeerEntry:
    """The module of a contender and the needs of its process.

    Attributes:
        module: defines `Inference` and `Training`, the two kinds of peer.
        requires: the package to install.
        environment: variables of its process.
    """

    module: str
    requires: str
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS: dict[str, PeerEntry] = {
    OURS: PeerEntry("mindvlm.tools.benchmarks.mindvlm_peer", "mindspore"),
    # huge pages spare torch the page faults of its large temporaries, which cost its vision phase up to half again
    "torch": PeerEntry("mindvlm.tools.benchmarks.torch_peer", "torch", {"THP_MEM_ALLOC_ENABLE": "1"}),
}


class Worker:
    """The process of a contender. A context manager that ends it.

    Args:
        name: a key of `PEERS`.
        kind: "Inference" or "Training".
        workload: a dataclass of the family's benchmark module.
        num_threads: for the operators of the framework.
    """

    def __init__(self, name: str, kind: str, workload: Any, *, num_threads: int):
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        job = {"peer": name, "kind": kind, "workload": workload_record(workload), "num_threads": num_threads}
        path = Path(self.folder.name, "job.json")
        path.write_text(json.dumps(job))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.__stderr__,
            text=True,
            env=os.environ | PEERS[name].environment | {"OMP_NUM_THREADS": str(num_threads)},
        )

    def ask(self, phase: str) -> dict[str, Any]:
        """Runs a phase and returns what `measured` found.

        Raises:
            UserError: the process failed; its own messages have gone to standard error.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{phase}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise UserError(
                f"peer {self.name} ended with status {status}; its messages are above (killed: out of memory?)"
            )
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def check_installed(name: str) -> None:
    """Raises UserError if the framework of a peer is not installed."""
    package = PEERS[name].requires
    if importlib.util.find_spec(package) is None:
        raise UserError(f"peer {name} needs the package {package}, which is not installed: pip install {package}")


def measured(action: Callable[[], Any]) -> dict[str, Any]:
    """Runs the action; returns its value, the wall and processor seconds, and the peak memory of the process so far."""
    wall, processor = time.perf_counter(), time.process_time()
    value = action()
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": peak_memory(),
        "value": value,
    }


def main(arguments: list[str]) -> None:
    job = json.loads(Path(arguments[0]).read_text())
    # frameworks print to standard output as well
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer_type = getattr(importlib.import_module(PEERS[job["peer"]].module), job["kind"])
    workload = read_workload(job["workload"])
    peer = peer_type(workload, num_threads=job["num_threads"])
    for line in sys.stdin:
        print(json.dumps(measured(getattr(peer, line.strip()))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
