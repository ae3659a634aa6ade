"""One contender's run in a process of its own: every stage timed once, with the peak of resident memory.

Started by `benchmark.py` as `python -m mindvlm.tools.benchmark_stages JOB.json RESULT.json`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindvlm.tools.benchmark_workload import MODELS, Workload

NUM_KEPT_LOGITS = 4096


class Peer(Protocol):
    """A framework running the workload; made with (workload, num_threads=).

    All results are on the host when a method returns. `vision`, `prefill`, `decode` may be called again in this order.
    """

    def describe(self) -> str:
        """Framework, version and settings, in one line."""

    def load(self) -> None:
        """Build the model and fill its weights."""

    def vision(self) -> None:
        """Encode the image; keep the features."""

    def prefill(self) -> np.ndarray:
        """Splice, run the prompt into an empty cache, choose the first token; returns its logits (1, vocab)."""

    def decode(self, num_tokens: int) -> list[int]:
        """Run that many greedy steps; returns the chosen ids."""


@dataclass(frozen=True)
class PeerEntry:
    """Where a peer lives and what its process needs: `module:Class`, pip requirement, environment."""

    location: str
    requires: str
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS: dict[str, PeerEntry] = {
    "mindvlm": PeerEntry("mindvlm.tools.benchmark_peer:MindvlmPeer", "mindspore"),
    # Huge pages spare torch the page faults of its large temporaries, which cost its vision stage up to half again.
    "torch": PeerEntry("mindvlm.tools.benchmark_torch_peer:TorchPeer", "torch", {"THP_MEM_ALLOC_ENABLE": "1"}),
}


@dataclass(frozen=True)
class Stage:
    """A timed step of a run; what `run` returns is kept in the result under the stage's name."""

    name: str
    run: Callable[[Peer, Workload], Any]


def warm_up(peer: Peer, workload: Workload) -> None:
    """Everything once, so that compilation and first-use costs fall here and not into the stages that follow."""
    peer.vision()
    peer.prefill()
    peer.decode(2)


STAGES: tuple[Stage, ...] = (
    Stage("load", lambda peer, workload: peer.load()),
    Stage("compile", warm_up),
    Stage("vision", lambda peer, workload: peer.vision()),
    Stage("prefill", lambda peer, workload: peer.prefill()[0, :NUM_KEPT_LOGITS].tolist()),
    Stage("decode", lambda peer, workload: peer.decode(workload.num_tokens)),
)


def make_peer(name: str, workload: Workload, num_threads: int) -> Peer:
    module, _, attribute = PEERS[name].location.partition(":")
    return getattr(importlib.import_module(module), attribute)(workload, num_threads=num_threads)


def run_stages(peer: Peer, workload: Workload) -> dict[str, Any]:
    """Seconds, returned values and peak resident bytes (so far) of every stage, as JSON-ready dicts."""
    seconds, values, peak_bytes = {}, {}, {}
    for stage in STAGES:
        start = time.perf_counter()
        values[stage.name] = stage.run(peer, workload)
        seconds[stage.name] = time.perf_counter() - start
        peak_bytes[stage.name] = peak_resident_bytes()
    return {"seconds": seconds, "values": values, "peak_bytes": peak_bytes, "description": peer.describe()}


def peak_resident_bytes() -> int:
    """VmHWM of this process: the most memory it ever held, shared libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no VmHWM line; the benchmark measures memory on Linux only")


def main(arguments: list[str]) -> None:
    job = json.loads(Path(arguments[0]).read_text())
    kinds = {model.kind.family: model.kind for model in MODELS.values()}
    workload = kinds[job["family"]](**job["workload"])
    result = run_stages(make_peer(job["peer"], workload, job["num_threads"]), workload)
    Path(arguments[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
