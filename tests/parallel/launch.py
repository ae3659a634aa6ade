"""Starting the processes of a test with msrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(script: Path, *arguments: str, num_processes: int, log_dir: Path) -> subprocess.Popen:
    """Starts a job; its console output is the Popen's stdout.

    msrun's scheduler waits 6 seconds for a lost rank here instead of 30.
    """
    environment = {**os.environ, "MS_NODE_TIMEOUT": "6", "PYTHONPATH": str(ROOT)}
    command = [
        str(Path(sys.executable).with_name("msrun")),
        f"--worker_num={num_processes}",
        f"--local_worker_num={num_processes}",
        f"--master_port={free_port()}",
        f"--log_dir={log_dir}",
        "--join=True",
        str(script),
        *arguments,
    ]
    # msrun starts `python`: the one that runs the tests
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.Popen(
        command, env=environment, cwd=log_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
