"""One side of the comparison in its own process.

Started as `python -m mindvlm.convert.parity.process SIDE FOLDER`: reads FOLDER/request.json and writes the outputs of
all stages to FOLDER/SIDE.safetensors. The parent logs lines on standard output that begin with `PROGRESS`; the
last line on standard error is the reason of a failure.
"""

from __future__ import annotations

import importlib
import json
import logging
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.stages import GREEDY_IDS
from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import peak_memory
from mindvlm.core.progress import progress_to

logger = logging.getLogger(__name__)

SIDES = {"reference": "mindvlm.convert.reference.stages", "mindspore": "mindvlm.convert.parity.graphs"}
"""The module of each side. Its `run` takes the request and returns the framework in words and the outputs by stage.

Ours also takes the ids that the reference chose: it decodes along them and returns its own choice at each step.
"""
PROGRESS = "progress: "
REFUSED = 2
_REMEDIES = {
    "torch": "--verify logits needs torch for the reference; run: pip install torch",
    "mindspore": "--verify logits needs mindspore for the converted model; run: pip install 'mindspore>=2.10,<2.11'",
}
_MEMORY = "free memory (4 bytes per parameter and a third more are needed), or verify without logits"


def run_child(side: str, folder: Path) -> None:
    """Runs one side and waits for it; kills it if this process is interrupted.

    Raises:
        UserError: it failed; the message is its last line and a remedy.
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
                if text.startswith(PROGRESS):
                    logger.info(text.removeprefix(PROGRESS))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise UserError(failure_message(side, child.returncode, messages.read_text(errors="replace")))


def failure_message(side: str, status: int, stderr: str) -> str:
    """Returns one line about a process that ended with `status` and these messages."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if status == REFUSED:
        return last
    name = "torch reference" if side == "reference" else "MindSpore model"
    if status < 0:
        signal_name = signal.Signals(-status).name
        last = f"killed by {signal_name}" + (", probably out of memory" if signal_name == "SIGKILL" else "")
    short = "memory" in last.lower() or "allocate" in last.lower()
    remedy = _MEMORY if short else "this is an error of the check, not of the conversion; please report it"
    if "CUDA out of memory" in last:
        remedy = "set CUDA_VISIBLE_DEVICES= to compute the reference on the CPU"
    return f"--verify logits: the {name} failed ({last}); {remedy}"


def run_side(side: str, folder: Path) -> None:
    """Computes all stages of one side and writes them; the metadata hold framework, duration and memory."""
    started = time.monotonic()
    request = ParityRequest(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    run = importlib.import_module(SIDES[side]).run
    if side == "reference":
        framework, stages = run(request)
    else:
        with open_checkpoint(folder / "reference.safetensors") as reference:
            forced_ids = reference.read(GREEDY_IDS).data if GREEDY_IDS in reference.infos else None
        framework, stages = run(request, forced_ids)
    metadata = {
        "framework": framework,
        "seconds": str(time.monotonic() - started),
        "peak_memory_bytes": str(peak_memory()),
    }
    write_checkpoint(folder / f"{side}.safetensors", MemorySource(stages), metadata=metadata)


def main(arguments: list[str]) -> int:
    try:
        with progress_to(lambda line: print(PROGRESS + line, flush=True)):
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
