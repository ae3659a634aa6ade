import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.config import DatasetsConfig
from mindvlm.training.datasets.loader import merge_states
from tests.training.datasets.opened_loader import open_loader


@pytest.fixture
def open_job(registry, make_processor):
    """Opens a loader over both data sets; arguments as of `open_loader`, others go into the config."""
    opened = []

    def open_one(batch_size=4, datasets="pages+talk", max_length=256, num_workers=0, config=None, **options):
        data = DatasetsConfig(
            registry=str(registry),
            datasets=datasets,
            batch_size=batch_size,
            max_length=max_length,
            num_workers=num_workers,
            look_ahead=2,
            **config or {},
        )
        opened.append(open_loader(data, make_processor, seed=5, **options))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def numbers(loader, num_batches):
    return [loader.take().numbers for _ in range(num_batches)]


def test_broken_samples_are_skipped_listed_and_leave_their_place_to_the_next_of_their_lane(open_job, tmp_path, said):
    loader = open_job(skip_list=tmp_path / "skipped.jsonl")
    assert loader.epoch_size == 40 + 2 * 9
    taken = numbers(loader, 14)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted((entry["dataset"], entry["record"]) for entry in listed) == [("pages", 7), ("pages", 8)]
    reasons = {entry["record"]: entry["reason"] for entry in listed}
    assert "no such file" in reasons[8] and "damaged" in reasons[7]
    assert {entry["record"]: entry["line"] for entry in listed}[8] == 2 + 8 * 13
    assert loader.skip_log.num_skipped == 2 and len([line for line in said if "skipped: data set 'pages'" in line]) == 2
    gone = {entry["number"] for entry in listed}
    for lane in range(4):
        expected = [n for n in range(lane, 100, 4) if n not in gone][:14]
        assert [batch[lane] for batch in taken] == expected
    flat = list(chain(*taken))
    assert len(set(flat)) == len(flat)
    assert loader.epoch == 56 / 58


def test_processes_change_nothing(open_job):
    alone, helped = open_job(), open_job(num_workers=2)
    for _ in range(12):
        first, second = alone.take(), helped.take()
        assert first.numbers == second.numbers
        for name in ("input_ids", "labels", "sources"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        for name in ("clip", "high"):
            np.testing.assert_array_equal(first.pixels[name], second.pixels[name])


@pytest.mark.parametrize(("num_shards", "num_passes"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_devices_and_passes_share_the_rows_of_one_step(open_job, num_shards, num_passes):
    whole = numbers(open_job(batch_size=8), 6)
    size = 8 // num_shards // num_passes
    loaders = [
        open_job(batch_size=size, shard=shard, num_shards=num_shards, num_passes=num_passes)
        for shard in range(num_shards)
    ]
    parts = [list(chain(*(loader.take().numbers for _ in range(num_passes) for loader in loaders))) for _ in range(6)]
    assert parts == whole


def test_a_resumed_job_goes_on_with_the_next_sample(open_job):
    whole = numbers(open_job(), 20)
    first = open_job(num_workers=2)
    assert numbers(first, 9) == whole[:9]
    state = json.loads(json.dumps(first.state))
    assert set(state) == {"first", "rows_per_step", "num_steps", "skips"}
    assert numbers(open_job(state=state), 11) == whole[9:]
    # on two devices
    halves = [open_job(batch_size=2, shard=shard, num_shards=2, state=state) for shard in (0, 1)]
    assert [halves[0].take().numbers + halves[1].take().numbers for _ in range(6)] == whole[9:15]
    merged = merge_states([loader.state for loader in halves])
    assert numbers(open_job(state=merged), 5) == whole[15:]


def test_another_number_of_rows_uses_no_sample_again(open_job):
    first = open_job()
    used = set(chain(*numbers(first, 7)))
    later = set(chain(*numbers(open_job(batch_size=3, state=first.state), 9)))
    assert not used & later
    assert min(later) <= max(used) + 4


def test_a_state_is_taken_between_steps_only(open_job):
    loader = open_job(num_passes=2)
    loader.take()
    with pytest.raises(ValueError, match="1 of 2 passes"):
        _ = loader.state


@pytest.mark.parametrize("state", [{}, {"first": 0}, [], {"first": 0, "rows_per_step": 4, "num_steps": 1, "skips": 3}])
def test_foreign_states_are_refused(open_job, state):
    with pytest.raises(UserError, match="data position"):
        open_job(state=state)


def test_states_of_different_moments_do_not_merge(open_job):
    first, second = (open_job(batch_size=2, shard=shard, num_shards=2) for shard in (0, 1))
    first.take()
    with pytest.raises(UserError, match="positions of the devices differ"):
        merge_states([first.state, second.state])


def test_a_bad_sample_can_stop_the_job(open_job):
    loader = open_job(config={"bad_samples": "stop"})
    with pytest.raises(UserError, match=r"data set 'pages', record [78] \(line \d+\): image .*"):
        numbers(loader, 20)


def test_a_job_without_usable_samples_ends(open_job, registry):
    (registry.parent / "empty").mkdir()
    registry.write_text("pages: {images: empty, annotations: pages.json}\n")
    with pytest.raises(UserError, match="200 samples in a row cannot be used, the last is .*no such file"):
        open_job(datasets="pages").take()


def test_the_list_of_skips_survives_a_kill_and_lists_once(open_job, tmp_path):
    path = tmp_path / "skipped.jsonl"
    numbers(open_job(skip_list=path), 14)
    before = path.read_text()
    path.write_text(before + '{"number": 9')
    loader = open_job(skip_list=path)
    numbers(loader, 14)
    assert path.read_text() == before and loader.skip_log.num_skipped == 2
    path.write_text("7\n")
    with pytest.raises(UserError, match="is not a list of skipped samples"):
        open_job(skip_list=path)


def test_pictures_and_text_share_a_batch(open_job):
    loader = open_job(batch_size=6)
    batches = [loader.take() for _ in range(6)]
    # every placeholder is a row of a picture of 4 rows
    numbers = [(batch.sources >= batch.input_ids.size).sum() // 4 for batch in batches]
    assert {*numbers} - {0, 6}, "mixed batches occur"
    for batch, num_images in zip(batches, numbers, strict=True):
        assert batch.input_ids.shape == batch.labels.shape == batch.sources.shape
        assert batch.input_ids.shape[1] % 64 == 0
        assert all(array.dtype == np.int32 for array in (batch.input_ids, batch.labels, batch.sources))
        assert batch.pixels["clip"].shape == (6, 3, 4, 4) and batch.pixels["high"].shape == (6, 3, 8, 16)
        assert batch.pixels["high"].dtype == np.float32
        assert not batch.pixels["high"][num_images:].any() and batch.pixels["high"][:num_images].any()
        flat = batch.sources.reshape(-1)
        features = flat[flat >= flat.size] - flat.size
        np.testing.assert_array_equal(features, np.arange(4 * num_images))


def test_lengths_are_chosen_from_a_list(open_job):
    loader = open_job(batch_size=1, config={"lengths": [30, 60, 300], "image_slots": 0})
    seen = {(batch.input_ids.shape[1], len(batch.pixels["clip"])) for batch in (loader.take() for _ in range(12))}
    assert {length for length, _ in seen} <= {30, 60, 300}
    # no tower runs on no view
    assert {count for _, count in seen} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [64, 32], "max_length": 32}, "expected rising numbers"),
        (
            {"lengths": [64], "max_length": 65},
            "data.lengths ends with 64 but data.max_length is 65; append 65 or lower data.max_length",
        ),
        ({"batch_size": 0}, "data.batch_size is 0; expected at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1; expected 0 or more"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        DatasetsConfig(registry="r.yaml", datasets="a", **options)


def test_a_killed_process_is_said(open_job):
    loader = open_job(num_workers=1)
    loader.take()
    os.kill(loader.workers.pool.process_ids[0], signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process ended unexpectedly, .*; lower data.num_workers"):
        for _ in range(10):
            loader.take()


JOB = """
import sys
from functools import partial
from mindvlm.models.vary.processor import VaryProcessor, VaryProcessorConfig
from mindvlm.models.vary.tokenizer import COMPACT_SPECIAL_TOKENS
from mindvlm.training.datasets.config import DatasetsConfig
from tests.training.datasets.opened_loader import open_loader
if __name__ == "__main__":
    processor = VaryProcessorConfig(vocab_file=sys.argv[2], special_tokens=list(COMPACT_SPECIAL_TOKENS), system="")
    data = DatasetsConfig(registry=sys.argv[1], datasets="talk", num_workers=2)
    loader = open_loader(data, partial(VaryProcessor, processor), seed=1)
    loader.take()
    try:
        print(*loader.workers.pool.process_ids, flush=True)
        while True:
            loader.take()
    except KeyboardInterrupt:
        loader.close()
        print("closed", flush=True)
    assert "mindspore" not in sys.modules
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_trainer(registry, make_processor, tmp_path, ending):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, str(script), str(registry), make_processor.args[0].vocab_file]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    workers = list(map(int, job.stdout.readline().split()))
    assert len(workers) == 2 and all(map(is_running, workers))
    if ending is signal.SIGINT:
        os.killpg(job.pid, ending)
        assert job.communicate(timeout=30) == ("closed\n", "")
    else:
        job.kill()
        job.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
