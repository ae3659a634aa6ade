"""One side of the comparison in a process of its own.

Started as `python -m mindvlm.convert.parity.process SIDE FOLDER`: reads FOLDER/request.json, leaves the outputs of all
stages in FOLDER/SIDE.safetensors. Lines on standard output that begin with `PROGRESS` are passed on; the last line on
standard error says why it failed.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError

PROGRESS = "progress: "
REFUSED = 2
_REMEDIES = {
    "torch": "--verify logits needs torch for the reference; run: pip install mindvlm[torch]",
    "mindspore": "--verify logits needs mindspore for the converted model; run: pip install mindvlm",
}
_MEMORY = "free memory (4 bytes per parameter and a third more are needed), or verify without logits"


def run_child(side: str, folder: Path, progress: Callable[[str], None] | None = None) -> None:
    """Run one side and wait for it; it is ended if this process is interrupted.

    Raises:
        UserError: it failed; the message is its last line and what helps.
    """
    command = [sys.executable, "-m", __name__, side, str(folder)]
    messages = folder / f"{side}.stderr"
    with (
        open(messages, "wb") as stderr,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as child,
    ):
        try:
            for line in child.stdout:
                text = line.decode(errors="replace").rstrip()
                if progress and text.startswith(PROGRESS):
                    progress(text.removeprefix(PROGRESS))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise UserError(failure_message(side, child.returncode, messages.read_text(errors="replace")))


def failure_message(side: str, status: int, stderr: str) -> str:
    """One line for a process that ended with `status` and these messages."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if status == REFUSED:
        return last
    name = "torch reference" if side == "reference" else "MindSpore model"
    if status < 0:
        signal_name = signal.Signals(-status).name
        last = f"killed by {signal_name}" + (", most likely for want of memory" if signal_name == "SIGKILL" else "")
    short = "memory" in last.lower() or "allocate" in last.lower()
    remedy = _MEMORY if short else "the error is one of the check itself, not of the conversion; please report it"
    if "CUDA out of memory" in last:
        remedy = "set CUDA_VISIBLE_DEVICES= to compute the reference on the CPU"
    return f"--verify logits: the {name} failed ({last}); {remedy}"


def say(line: str) -> None:
    """Report a step to the process that waits."""
    print(PROGRESS + line, flush=True)


def run_side(side: str, folder: Path) -> None:
    """Compute all stages of one side and write them; metadata say what it took."""
    from mindvlm.convert.parity.comparison import GREEDY_IDS, MODELS, ParityRequest

    started = time.monotonic()
    request = ParityRequest(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    module, _, function = getattr(MODELS[request.model], side).partition(":")
    run = getattr(importlib.import_module(module), function)
    if side == "reference":
        framework, stages = run(request, say)
    else:
        with open_checkpoint(folder / "reference.safetensors") as reference:
            forced_ids = reference.read(GREEDY_IDS).data if GREEDY_IDS in reference.infos else None
        framework, stages = run(request, forced_ids, say)
    metadata = {
        "framework": framework,
        "seconds": str(time.monotonic() - started),
        "peak_memory_bytes": str(peak_memory_bytes()),
    }
    write_checkpoint(folder / f"{side}.safetensors", MemorySource(stages), metadata=metadata)


def peak_memory_bytes() -> int:
    """The most memory that this process ever held, 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def main(arguments: list[str]) -> int:
    try:
        run_side(arguments[0], Path(arguments[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except ModuleNotFoundError as error:
        print(_REMEDIES.get((error.name or "").partition(".")[0], error), file=sys.stderr)
        return REFUSED if (error.name or "").partition(".")[0] in _REMEDIES else 1
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        print(f"{type(error).__name__}: {first_line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
