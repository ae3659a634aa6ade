"""One contender of the training benchmark in a process of its own, which takes a step when it is told to.

Started by `benchmark_training.py` as `python -m mindvlm.tools.benchmark_training_worker JOB.json`. Every line on its
standard input is a command, every answer a line of JSON on its standard output: "prepare" builds and compiles, "step"
takes one step. The end of the input ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mindvlm.tools.benchmark_stages import PeerEntry, peak_resident_bytes
from mindvlm.tools.benchmark_training_workload import TrainingWorkload


class TrainingPeer(Protocol):
    """A framework that trains the workload; made with (workload, num_threads=)."""

    def describe(self) -> str:
        """Framework, version and settings, in one line."""

    def load(self) -> None:
        """Build the model and fill its weights."""

    def compile(self) -> None:
        """Whatever must happen once before the first step."""

    def step(self) -> float:
        """Forward, backward, clip, update; returns the loss before the update."""


TRAINING_PEERS: dict[str, PeerEntry] = {
    "mindvlm": PeerEntry("mindvlm.tools.benchmark_training_peer:MindvlmTrainingPeer", "mindspore"),
    "torch": PeerEntry(
        "mindvlm.tools.benchmark_training_torch_peer:TorchTrainingPeer", "torch", {"THP_MEM_ALLOC_ENABLE": "1"}
    ),
}


def measured(action: Callable[[], Any]) -> dict[str, Any]:
    """What the action returned, with seconds on the wall and of the processor, and the peak of memory so far."""
    wall, processor = time.perf_counter(), time.process_time()
    value = action()
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": peak_resident_bytes(),
        "value": value,
    }


def answer(peer: TrainingPeer, command: str) -> dict[str, Any]:
    if command == "prepare":
        load, compiled = measured(peer.load), measured(peer.compile)
        return {"load": load, "compile": compiled, "description": peer.describe()}
    return measured(peer.step)


def main(arguments: list[str]) -> None:
    job = json.loads(Path(arguments[0]).read_text())
    # frameworks print to standard output as well
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, attribute = TRAINING_PEERS[job["peer"]].location.partition(":")
    peer_class = getattr(importlib.import_module(module), attribute)
    peer = peer_class(TrainingWorkload(**job["workload"]), num_threads=job["num_threads"])
    for line in sys.stdin:
        print(json.dumps(answer(peer, line.strip())), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
