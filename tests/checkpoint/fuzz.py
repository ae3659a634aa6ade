"""Fuzzing of the checkpoint readers: damaged and lying files made from small valid ones.

    python -m tests.checkpoint.fuzz --minutes 15 --seed 1

The only outcomes allowed are tensors or a UserError of one line, within two CPU seconds and 300 MB per file, with
nothing executed and no file opened but those of the case. Each finding is kept with its case number; `--case N` runs
one again. Not collected by pytest: what it finds becomes a test in test_bad_files.py or test_hostile_files.py.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.checkpoint.fuzz_mutations import mutate

_SECONDS_PER_FILE = 2
_BYTES_PER_FILE = 300 * 2**20
_READ_LIMIT = 16 * 2**20
_BATCH = 2000
_EXECUTION = (
    "os.system",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.",
    "socket.",
    "ctypes.",
    "exec",
)
# Loaded before the files are watched: importing one opens a file and executes it.
_CODECS = ("utf-32-le", "cp437", "latin-1")


class Timeout(BaseException):
    """Not an Exception, so that no reader catches it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="CPU time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "checkpoint_findings")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.corpus:
        return _run_batch(arguments)
    with tempfile.TemporaryDirectory() as folder:
        from tests.checkpoint.fuzz_corpus import write_corpus

        write_corpus(Path(folder))
        return _supervise(arguments, folder)


def _supervise(arguments: argparse.Namespace, corpus: str) -> int:
    """Run batch after batch in child processes, which may die without ending the search."""
    arguments.findings.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.checkpoint.fuzz", "--corpus", corpus, "--seed", str(arguments.seed)]
    command += ["--findings", str(arguments.findings)]
    num_findings, totals = 0, {"read": 0, "refused": 0}
    first = arguments.case if arguments.case is not None else 0
    while _cpu_minutes() < arguments.minutes:
        extra = ["--first", str(first)] + (["--case", str(arguments.case)] if arguments.case is not None else [])
        result = subprocess.run(command + extra, capture_output=True, text=True)
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        ended = bool(lines) and "refused" in lines[-1]
        findings = lines[:-1] if ended else lines
        for finding in findings:
            print(json.dumps(finding), flush=True)
        num_findings += len(findings)
        if ended:
            totals = {key: totals[key] + lines[-1][key] for key in totals}
            first += _BATCH
        else:
            at = int((arguments.findings / "current").read_text())
            print(json.dumps({"case": at, "died": result.returncode, "stderr": result.stderr[-2000:]}), flush=True)
            num_findings += 1
            first = at + 1
        print(f"{_cpu_minutes():.1f} CPU minutes, {first} cases, {totals}, {num_findings} findings", flush=True)
        if arguments.case is not None:
            break
    return 1 if num_findings else 0


def _run_batch(arguments: argparse.Namespace) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    corpus = {path.name: path.read_bytes() for path in sorted(arguments.corpus.iterdir())}
    signal.signal(signal.SIGPROF, _on_alarm)
    counts = {"read": 0, "refused": 0}
    current = arguments.findings / "current"
    with tempfile.TemporaryDirectory() as folder:
        watch = _Watch(folder)
        importlib.import_module("mindvlm.checkpoint")
        for codec in _CODECS:
            codecs.lookup(codec)
        sys.addaudithook(watch)
        last = arguments.first + (1 if arguments.case is not None else _BATCH)
        for case in range(arguments.first, last):
            current.write_text(str(case))
            files = mutate(corpus, random.Random(f"{arguments.seed}/{case}"))
            path = _write(files, folder)
            before, watch.on, watch.seen = _peak(), True, []
            began = time.process_time()
            problem = None
            try:
                signal.setitimer(signal.ITIMER_PROF, _SECONDS_PER_FILE)
                outcome = _read(path)
            except BaseException:
                watch.on = False
                problem = traceback.format_exc()[-3000:]
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                watch.on = False
            seconds = time.process_time() - began
            if problem is None and outcome not in counts:
                problem = outcome
            if _peak() - before > _BYTES_PER_FILE:
                problem = f"{_peak() - before} bytes"
            if watch.seen:
                problem = f"events {watch.seen}"
            if problem:
                kept = _write(files, _fresh(arguments.findings / f"{arguments.seed}-{case}"))
                print(
                    json.dumps({"case": case, "file": str(kept), "s": round(seconds, 2), "problem": problem}),
                    flush=True,
                )
            else:
                counts[outcome] += 1
    print(json.dumps(counts), flush=True)
    return 0


def _read(path: Path) -> str:
    """Open and read everything, as a conversion would; return "read", "refused" or what is wrong with the message."""
    from mindvlm.checkpoint import open_checkpoint
    from mindvlm.core.errors import UserError

    try:
        with open_checkpoint(path) as checkpoint:
            left = _READ_LIMIT
            for name, info in checkpoint.infos.items():
                if info.num_bytes <= left:
                    data = checkpoint.read(name).data
                    if data.shape != info.shape:
                        return f"shape {data.shape} instead of {info.shape}"
                    left -= info.num_bytes
                elif info.num_elements:
                    checkpoint.read_range(name, info.num_elements - 1, info.num_elements)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000 or not text.isprintable():
            return f"message of {len(text)} characters: {text[:500]!r}"
        return "refused"
    return "read"


class _Watch:
    """An audit hook that notes execution, and files opened outside the folder of the case."""

    def __init__(self, folder: str):
        self.folder, self.on, self.seen = folder, False, []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(self.folder):
            self.seen.append(f"open {arguments[0]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
            self.seen.append(f"open for writing {arguments[0]}")
        elif event.startswith(_EXECUTION):
            self.seen.append(event)


def _write(files: dict[str, bytes], folder: str | Path) -> Path:
    """Write the files of a case over those of the one before; return the one to open."""
    folder = Path(folder)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def _fresh(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _cpu_minutes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def _peak() -> int:
    # Not ru_maxrss, which a child process inherits.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def _on_alarm(*_: object) -> None:
    raise Timeout


if __name__ == "__main__":
    sys.exit(main())
