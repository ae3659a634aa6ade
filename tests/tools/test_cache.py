"""`mindvlm-cache` on a folder with all kinds of entries and a file of someone else."""

import os
import time
from pathlib import Path

import pytest

from mindvlm.core import caches
from mindvlm.tools.cache import main

PAIR = (caches.WEIGHTS, caches.MANIFEST)
KEY = "0" * 64
WEIGHTS = "Vary-toy-0123abcd/weights.safetensors"
FILES = {
    "weights": [WEIGHTS, "Vary-toy-0123abcd/manifest.json", ".a-0123abcd.77.staging/a-0123abcd/weights.safetensors"],
    "kernels": ["native/kernels-0123.so", "native/kernels-0123.log", "native/.kernels-0123.so-x/kernels.o"],
    "graphs": [f"graphs/VisionGraph-{KEY}.graph", f"graphs/.VisionGraph-{KEY}.graph.77.partial"],
    "": [
        *("photos-0123abcd/a.png", "notes.txt", "native/notes.txt", "graphs/notes.txt"),
        *("run-20261130/weights.safetensors", "run-20261130/manifest.json", "run-20261130/notes.txt"),
        *("run-20261201/weights.safetensors", "run-20261202/checkpoint/model.safetensors"),
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path))
    for name in sum(FILES.values(), []):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'"mindvlm"'.ljust(2048))
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_list_has_a_line_for_each_name(folder, capsys):
    os.utime(folder / f"graphs/VisionGraph-{KEY}.graph", (0, 0))
    for number in range(300):
        (folder / f"graphs/MergeGraph-{number:064x}.graph").write_bytes(bytes(1024))
        os.utime(folder / f"graphs/MergeGraph-{number:064x}.graph", (0, number * 86400))
    before = names(folder)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines[:-1]] == [
        *(["300", "x", "MergeGraph"], ["2", "x", "VisionGraph"], ["3", "x", "kernels"]),
        *(["1", "x", "Vary-toy"], ["1", "x", "a"]),
    ]
    assert lines[0].split()[:5] == ["graphs", "300.0", "KiB", "used", "1970-10-27"]
    assert lines[-1].startswith(f"{folder}: 307 items, ") and names(folder) == before
    assert main(["list", "--kind", "weights"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_list_all_names_each_entry_with_its_size(folder, capsys):
    entry = folder / f"graphs/VisionGraph-{KEY}.graph"
    os.utime(entry, (0, 0))
    before = names(folder)
    assert main(["list", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1].startswith(f"{folder}: 7 items, ")
    assert lines[0].split()[:3] == ["graphs", "2.0", "KiB"] and lines[0].endswith(f"VisionGraph-{KEY}.graph")
    assert "1970-01-01" in lines[0] and any("  Vary-toy-0123abcd" in line for line in lines)
    assert names(folder) == before


def test_the_room_is_for_what_was_used_last(folder, monkeypatch):
    """Whatever the times of access, and with an unfinished entry of a killed process."""
    monkeypatch.setattr(caches, "MAX_BYTES", dict.fromkeys(caches.MAX_BYTES, 7000))
    others, now = names(folder) - set(FILES["weights"]), time.time()
    for number, days in enumerate((0.5, 30, 2)):
        entry = folder / f"used-{number:08x}"
        entry.mkdir()
        for name in (caches.WEIGHTS, caches.MANIFEST):
            (entry / name).write_bytes(b'"mindvlm"'.ljust(1024))
            os.utime(entry / name, (now - 1000, now - 86400 * days))
        os.utime(entry, (now - 86400 * (40 - days),) * 2)
    kept = folder / WEIGHTS
    os.utime(kept, (0, now - 86400 * 3))
    staging = folder / FILES["weights"][2]
    os.utime(staging, (0, now - 86400 * 3))
    caches.remove_oldest("weights", kept.parent)
    assert names(folder) - others == {*FILES["weights"][:2], *(f"used-00000000/{name}" for name in PAIR)}


@pytest.mark.parametrize("kinds", [["graphs"], ["weights", "kernels"], []], ids=str)
def test_clear_removes_the_kinds_and_nothing_else(folder, kinds, capsys):
    assert main(["clear", *(["--kind", *kinds] if kinds else [])]) == 0
    removed = kinds or ["weights", "kernels", "graphs"]
    assert names(folder) == {name for kind, files in FILES.items() if kind not in removed for name in files}
    assert main(["clear", *(["--kind", *kinds] if kinds else [])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"removed from {folder}: 0 items, 0 B"


def test_an_empty_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "none"))
    assert main(["list"]) == 0 and capsys.readouterr().out == f"{tmp_path / 'none'}: 0 items, 0 B\n"


def test_wrong_arguments_are_one_line(folder, capsys):
    before = names(folder)
    assert main(["clear", "--all"]) == 2 and names(folder) == before
    assert capsys.readouterr().err.startswith("error: --all has no effect with clear")
    for arguments in (["remove"], ["clear", "--kind", "models"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
