"""Helpers of the tests of `mindvlm-check`: they run it in this process and read its lines."""

import pytest
from mindspore import device_context

from mindvlm.checkpoint import Checkpoint
from mindvlm.nn import parameters as weights_module
from mindvlm.tools import check_model

NAMES = ["config", "files", "tokenizer", "model", "weights", "device", "dtype", "memory", "plan"]


def checker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The tool as a function of its arguments to (status, out, err); reading any value of a tensor ends the test."""

    def forbidden(*arguments, **options):
        raise AssertionError("the check must not load weights")

    monkeypatch.setattr(Checkpoint, "read_range", forbidden)
    monkeypatch.setattr(weights_module, "fill_parameters", forbidden)
    # a process that has run on the CPU cannot move, so it must not be asked to
    monkeypatch.setattr(device_context.ascend, "is_available", lambda: False)

    def run(*argv) -> tuple[int, str, str]:
        status = check_model.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def found(out: str) -> dict[str, list[tuple[str, str]]]:
    """Status and text of each check's lines; indented lines are tables."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for line in out.splitlines():
        fields = line.split(maxsplit=2)
        if len(fields) == 3 and fields[1] in NAMES and not line.startswith(" "):
            lines.setdefault(fields[1], []).append((fields[0], fields[2]))
    return lines


def statuses(out: str) -> dict[str, str]:
    """Each check's worst status; "skipped" if all lines are, because a plan skips what the sizes do not allow."""
    order = ["skipped", "ok", "warning", "FAILED"]
    return {name: max((status for status, _ in lines), key=order.index) for name, lines in found(out).items()}


def assert_failed(result, expected: dict[str, str], *texts: str) -> None:
    """The named checks have these statuses, all others are ok, and the texts are in the lines of those that failed."""
    status, out, err = result
    assert status == 2
    assert statuses(out) == dict.fromkeys(NAMES, "ok") | expected
    failed = [name for name in NAMES if expected.get(name) == "FAILED"]
    (line,) = err.splitlines()
    assert line.startswith(f"error: {len(failed)} of 9 check") and f"failed: {', '.join(failed)};" in line
    shown = "\n".join(text for name in failed for status, text in found(out)[name] if status == "FAILED")
    for text in texts:
        assert text in shown
    assert "Traceback" not in out + err
