"""A contender of the benchmark in a process of its own, which runs one phase when it is told to.

Started by `Worker` as `python -m mindvlm.tools.benchmarks.worker JOB.json`. Each line on standard input is a JSON list
of a method of the contender and its arguments; the answer is a line of JSON on standard output, see `measured`. The end
of the input ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
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
    """A framework that answers the prompt of a workload; made with (workload, dtype=, num_threads=).

    All results are on the host when a method returns. `vision`, `prefill` and `decode` can run again in this order.
    """

    PHASES = ("load", "compile", "vision", "prefill", "decode")
    workload: Workload

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns facts about the loaded model.

        `text` is framework, version and settings in one line, `stored_bytes` the size of all weights that it holds,
        `decode_bytes` that of the weights which a decode step reads.
        """

    @abstractmethod
    def load(self) -> None:
        """Builds the model and fills its weights."""

    def compile(self) -> float:
        """Runs everything once, so that compilation and first-use costs fall here and not into the later phases.

        Returns:
            `compile_seconds`.
        """
        self.vision()
        self.prefill()
        self.generate(2)
        return self.compile_seconds()

    def compile_seconds(self) -> float:
        """Returns the time in which graphs were compiled so far; 0 without graphs."""
        return 0.0

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

    @abstractmethod
    def start_rows(self, ids: np.ndarray, capacity: int) -> None:
        """Prefills prompts of text (B, L) and chooses their first tokens.

        Args:
            capacity: number of positions of a row, answer included.
        """

    @abstractmethod
    def continue_rows(self, num_tokens: int) -> None:
        """Generates that many further tokens in every row."""

    def grow(self, num_rows: int, length: int, num_tokens: int) -> dict[str, float]:
        """Returns `prefill_s` and `decode_s` of prompts of this length and answers in several rows, without compiling.

        One token is generated before the clock of the answer starts.
        """
        ids = self.workload.text_ids(num_rows, length)
        seconds = {}
        for stage, action in (
            ("prefill_s", functools.partial(self.start_rows, ids, length + num_tokens + 2)),
            ("first_s", functools.partial(self.continue_rows, 1)),
            ("decode_s", functools.partial(self.continue_rows, num_tokens)),
        ):
            start, compiled = time.perf_counter(), self.compile_seconds()
            action()
            seconds[stage] = time.perf_counter() - start - (self.compile_seconds() - compiled)
        return seconds


class TrainingPeer(Protocol):
    """A framework that trains on a workload; made with (workload, dtype=, num_threads=)."""

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
    """The module of a framework and the needs of its process.

    Attributes:
        module: defines `Inference` and perhaps `Training`, the two kinds of peer.
        bits: the formats of weights that are measured, with the bits of a value.
        requires: the packages to install.
        phases: of `InferencePeer.PHASES`.
        environment: variables of its process.
    """

    module: str
    bits: Mapping[str, int]
    requires: tuple[str, ...]
    phases: tuple[str, ...] = InferencePeer.PHASES
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS: dict[str, PeerEntry] = {
    OURS: PeerEntry(
        "mindvlm.tools.benchmarks.mindvlm_peer",
        {"float32": 32, "16bit": 16, "int8": 8, "int8c": 8, "int4": 4, "int4k": 4},
        ("mindspore",),
    ),
    "torch": PeerEntry(
        "mindvlm.tools.benchmarks.torch_peer",
        {"float32": 32, "bfloat16": 16},
        ("torch",),
        # huge pages spare torch the page faults of its large temporaries, which cost its vision phase up to half again
        environment={"THP_MEM_ALLOC_ENABLE": "1"},
    ),
    "llamacpp": PeerEntry(
        "mindvlm.tools.benchmarks.llamacpp_peer",
        {"bf16": 16, "q8_0": 8, "q4_0": 4, "q4_K": 4},
        ("xllamacpp", "gguf"),
        phases=("load", "compile", "prefill", "decode"),
    ),
}


@dataclass(frozen=True)
class Contender:
    """A framework with one format of weights.

    Attributes:
        peer: a key of `PEERS`.
        dtype: a key of `PeerEntry.bits`; of our own also another value of the key `weights`, such as
            "int4,head=int4".
    """

    peer: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.peer}:{self.dtype}"

    @property
    def entry(self) -> PeerEntry:
        return PEERS[self.peer]

    @property
    def bits(self) -> int | None:
        """Bits of a weight of the decoder; None if our own are those of the checkpoint."""
        return self.entry.bits.get(self.dtype.partition(",")[0])


def parse_contenders(texts: Iterable[str]) -> list[Contender]:
    """Returns the contenders of PEER or PEER:FORMAT, also several with commas; a peer stands for all its formats.

    Raises:
        UserError: a peer or its format does not exist.
    """
    found = []
    for text in ",".join(texts).split(","):
        peer, _, dtype = text.strip().partition(":")
        if peer not in PEERS or (dtype and dtype not in PEERS[peer].bits):
            formats = PEERS[peer].bits if peer in PEERS else ()
            expected = ", ".join(f"{peer}:{name}" for name in formats) if formats else ", ".join(sorted(PEERS))
            raise UserError(f"{text.strip()!r} is no contender; expected {expected}")
        found += [Contender(peer, name) for name in ([dtype] if dtype else PEERS[peer].bits)]
    return list(dict.fromkeys(found))


class Worker:
    """The process of a contender. A context manager that ends it.

    Args:
        contender: the framework and its weights.
        kind: "Inference" or "Training".
        workload: a dataclass of the family's benchmark module.
        num_threads: for the operators of the framework.
    """

    def __init__(self, contender: Contender, kind: str, workload: Any, *, num_threads: int):
        self.contender = contender
        self.folder = tempfile.TemporaryDirectory()
        job = {"module": contender.entry.module, "kind": kind, "workload": workload_record(workload)}
        job |= {"dtype": contender.dtype, "num_threads": num_threads}
        path = Path(self.folder.name, "job.json")
        path.write_text(json.dumps(job))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.__stderr__,
            text=True,
            env=os.environ | contender.entry.environment | {"OMP_NUM_THREADS": str(num_threads)},
        )

    def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Runs a method of the contender and returns what `measured` found.

        Raises:
            UserError: the process failed; its own messages have gone to standard error.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise UserError(
                f"peer {self.contender} ended with status {status}; its messages are above (killed: out of memory?)"
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


def check_installed(contenders: Iterable[Contender]) -> None:
    """Raises UserError if the framework of a contender is not installed."""
    for contender in contenders:
        missing = [name for name in contender.entry.requires if importlib.util.find_spec(name) is None]
        if missing:
            needed = " and ".join(missing)
            raise UserError(
                f"peer {contender.peer} needs {needed}, not installed here: pip install {' '.join(missing)}"
            )


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
    peer_type = getattr(importlib.import_module(job["module"]), job["kind"])
    peer = peer_type(read_workload(job["workload"]), dtype=job["dtype"], num_threads=job["num_threads"])
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer = measured(functools.partial(getattr(peer, method), *arguments))
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
