"""Checkpoints of divided jobs, and what ranks tell each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindvlm.parallel.host import Ranks
from mindvlm.parallel.mesh import Mesh, ParallelConfig
from tests.parallel.launch import start
from tests.parallel.tiny_training import TinyTraining
from tests.training.ranks_job import LAYOUTS, run_tensors
from tests.training.small_job import read_tensors

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Folder in which two processes have trained on every layout, saved, and gone on exactly from what they saved."""
    folder = tmp_path_factory.mktemp("ranks")
    job = start(Path(__file__).with_name("ranks_job.py"), str(folder), num_processes=2, log_dir=folder)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_checkpoint_is_that_of_one_process_and_loads_there(results, layout, tmp_path):
    single = TinyTraining("qwen", ParallelConfig(), Mesh())
    tensors = run_tensors(single, Ranks(Mesh()).host)
    single.run(0, 2)
    tensors.write(tmp_path)
    alone, divided = read_tensors(tmp_path), read_tensors(results / layout)
    assert alone.keys() == divided.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(divided[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    tensors.read(results / layout)
    (tmp_path / "again").mkdir()
    tensors.write(tmp_path / "again")
    for name, value in read_tensors(tmp_path / "again").items():
        np.testing.assert_array_equal(value, divided[name], err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_hears_the_same(results, layout):
    heard = [json.loads((results / f"{layout}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["first"] for one in heard] == [[1, "a"]] * 2
    words = [{"rank": rank, "text": "页" * (rank * 50)} for rank in (0, 1)]
    expected = [words, words] if layout.startswith("dp2") else [words[:1], words[1:]]
    assert [one["replicas"] for one in heard] == expected


def test_alone_there_is_nobody_to_hear():
    ranks = Ranks(Mesh())
    assert ranks.of_replicas({"a": None}) == [{"a": None}] and ranks.from_first("x") == "x"
