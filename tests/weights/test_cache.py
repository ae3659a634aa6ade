"""The folder of converted weights: where it is, and that several who use it at once do no harm."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource
from mindvlm.checkpoint.source import CHUNK_BYTES
from mindvlm.core import caches
from mindvlm.core.caches import cache_folder
from mindvlm.core.errors import UserError
from mindvlm.core.progress import progress_to
from mindvlm.weights import cache as weights_cache
from mindvlm.weights.cache import entry_folder, kept_weights


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Made(MemorySource):
    recipe = "as it was made"


def weights_of(seed: int, recipe: str) -> MemorySource:
    """Several chunks of one number each."""
    weights = Made({name: np.full(CHUNK_BYTES, seed, np.float32) for name in ("a", "b")})
    weights.recipe = recipe
    return weights


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.bin").write_bytes(b"source")
    return tmp_path / "source" / "x.bin"


def test_another_recipe_is_another_entry(cache, source):
    for recipe, number in (("one", 1), ("two", 2)):
        weights = weights_of(number, recipe)
        assert kept_weights(weights, [source]) is weights
    with kept_weights(weights_of(3, "two"), [source]) as kept:
        assert (kept.read("a").data == 2).all()


def test_the_oldest_weights_go_first(cache, tmp_path, monkeypatch):
    sources = [tmp_path / name / "x.bin" for name in ("one", "two", "three")]
    entries = [entry_folder(source) for source in sources]
    size = 2 * 4 * CHUNK_BYTES
    monkeypatch.setitem(caches.MAX_BYTES, "weights", 5 * size // 2)
    for source in sources:
        source.parent.mkdir()
        source.write_bytes(b"source")
    for number in (0, 1, 0, 2):
        # an earlier use is a minute ago
        for path in cache.rglob("*"):
            status = path.stat()
            os.utime(path, (status.st_atime - 60, status.st_mtime - 60 * (path.name != "weights.safetensors")))
        kept_weights(weights_of(number, "one"), [sources[number]]).close()
    assert [entry.exists() for entry in entries] == [True, False, True]
    # the newest is kept whatever its size
    monkeypatch.setitem(caches.MAX_BYTES, "weights", 0)
    kept_weights(weights_of(1, "one"), [sources[1]]).close()
    assert [entry.exists() for entry in entries] == [False, True, False]


def test_only_chunks_are_in_memory(cache, source):
    largest = 0

    class Watched(Made):
        def read_range(self, name, start, stop):
            nonlocal largest
            largest = max(largest, 4 * (stop - start))
            return super().read_range(name, start, stop)

    kept_weights(Watched({"a": np.ones(8 * CHUNK_BYTES, np.float32)}), [source]).close()
    assert 0 < largest <= CHUNK_BYTES


def test_an_entry_that_is_replaced_stays_readable_to_who_has_it(cache, source):
    kept_weights(weights_of(1, "one"), [source])
    first = kept_weights(weights_of(1, "one"), [source])

    lines = []

    def another_process(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            kept_weights(weights_of(2, "two"), [source])

    with progress_to(another_process):
        kept_weights(weights_of(3, "three"), [source])
    third = kept_weights(weights_of(3, "three"), [source])
    for kept, number in ((first, 1), (third, 3)):
        assert kept.path.is_relative_to(cache) and (kept.read("b").data == number).all()
        kept.close()
    (entry,) = cache.iterdir()
    assert sorted(os.listdir(entry)) == ["manifest.json", "weights.safetensors"]


RACE = """
import sys
from pathlib import Path
import numpy as np
from mindvlm.checkpoint import MemorySource
from mindvlm.weights.cache import kept_weights

class Made(MemorySource):
    recipe = ""

for turn in range(12):
    number = (turn // 3 + int(sys.argv[2])) % 2
    weights = Made({name: np.full(100_000, number) for name in "ab"})
    weights.recipe = str(number)
    with kept_weights(weights, [Path(sys.argv[1])]) as kept:
        assert all((kept.read(name).data == number).all() for name in kept.infos)
"""


def test_processes_at_once_do_no_harm(cache, source):
    """Each wants the entry to be its own half of the time."""
    command = [sys.executable, "-c", RACE, str(source)]
    running = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(3)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in running] == [("", 0)] * 3
    assert len(list(cache.iterdir())) == 1


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINDVLM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "mindvlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "mindvlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "mindvlm"
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("MINDVLM_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MINDVLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(weights_cache.Path, "home", no_home)
    with pytest.raises(UserError, match="no home folder .* set MINDVLM_CACHE"):
        cache_folder()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_folders_of_one_name_have_entries_of_their_own(cache, tmp_path):
    entries = {entry_folder(tmp_path / parent / "My model!" / "model.safetensors") for parent in "ab"}
    assert len(entries) == 2 and all(entry.name.startswith("My_model_-") for entry in entries)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a" / "My model!")
    assert entry_folder(link / "model.safetensors") in entries
