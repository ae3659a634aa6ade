"""Tokens per second of one training process and of several data-parallel ones, each with the same rows.

`python scaling.py JOB.json` under `msrun` is one of the processes; the first one writes the figures.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.tools.benchmarks.worker import measured
from mindvlm.tools.benchmarks.workload import read_workload, workload_record

MAX_SHOWN_LINES = 20


def scaling(
    workload: Any, *, num_processes: int, num_threads: int, num_steps: int, num_warm_up: int
) -> dict[str, dict[str, Any]]:
    """Measures one process with a share of the threads, one with all threads, and several with a share each.

    Args:
        num_threads: of all processes together.

    Returns:
        By name: `processes`, `threads` (of each), `step_s`, `tokens_per_s` (of all together), `losses`.
    """
    share = max(1, num_threads // num_processes)
    layouts = {"1": (1, share), str(num_processes): (num_processes, share)}
    if num_threads > share:
        layouts["1 with all threads"] = (1, num_threads)
    found = {}
    for name, (processes, threads) in layouts.items():
        steps = run_processes(workload, processes, num_threads=threads, num_steps=num_warm_up + num_steps)
        seconds = statistics.median(step["seconds"] for step in steps[num_warm_up:])
        found[name] = {
            "processes": processes,
            "threads": threads,
            "step_s": seconds,
            "tokens_per_s": processes * workload.tokens_per_step / seconds,
            "losses": [step["value"] for step in steps],
        }
    return found


def describe(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a line for each layout, with its speed relative to the first."""
    first = next(iter(figures.values()))["tokens_per_s"]
    return [
        f"processes {one['processes']}, threads of each {one['threads']}: {one['tokens_per_s']:.0f} tokens/s, "
        f"{one['step_s']:.2f} s a step, {one['tokens_per_s'] / first:.2f}x"
        for one in figures.values()
    ]


def run_processes(workload: Any, num_processes: int, *, num_threads: int, num_steps: int) -> list[dict[str, Any]]:
    """Returns what `measured` found in each step of the first process.

    Raises:
        UserError: a process failed; the end of the first one's messages goes to standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, result, logs = Path(folder, "job.json"), Path(folder, "result.json"), Path(folder, "logs")
        job = {
            "workload": workload_record(workload),
            "num_processes": num_processes,
            "num_threads": num_threads,
            "num_steps": num_steps,
            "result": str(result),
        }
        path.write_text(json.dumps(job))
        command = [sys.executable, __file__, str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
        if num_processes > 1:
            bin_folder = Path(sys.executable).parent
            # msrun starts `python`: the one that runs this
            environment["PATH"] = f"{bin_folder}{os.pathsep}{environment.get('PATH', '')}"
            sizes = [f"--worker_num={num_processes}", f"--local_worker_num={num_processes}", "--join=True"]
            meeting = [f"--master_port={free_port()}", f"--log_dir={logs}"]
            command = [str(bin_folder / "msrun"), *sizes, *meeting, *command[1:]]
        done = subprocess.run(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode or not result.is_file():
            print("\n".join(done.stdout.splitlines()[-MAX_SHOWN_LINES:]), file=sys.stderr)
            raise UserError(f"{num_processes} training processes ended with status {done.returncode}; see above")
        return json.loads(result.read_text())


def free_port() -> int:
    """Returns an unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(path: str) -> None:
    # imported here: the process that starts the others needs no MindSpore
    from mindvlm.parallel.launch import ends_all_ranks
    from mindvlm.tools.benchmarks.mindvlm_peer import Training

    job = json.loads(Path(path).read_text())
    with ends_all_ranks():
        peer = Training(
            read_workload(job["workload"]), num_threads=job["num_threads"], num_processes=job["num_processes"]
        )
        peer.load()
        peer.compile()
        steps = [measured(peer.step) for _ in range(job["num_steps"])]
        if peer.mesh.is_first:
            Path(job["result"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(sys.argv[1])
