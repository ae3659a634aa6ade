"""Memory and speed on files that are larger than what a conversion may hold."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from mindvlm.checkpoint import CastSource, write_checkpoint
from mindvlm.convert.random_weights import RandomSource
from mindvlm.models.vary.hf_config import vary_toy_config
from tests.hf_shapes import toy_shapes

MEGABYTE = 2**20
# Runs in a process of its own: what it had before the conversion is the interpreter and the libraries.
MEASURED = """
import json, resource, sys
from mindvlm.convert import convert_weight
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
status = convert_weight.main(sys.argv[1:])
print(json.dumps({"status": status, "grown": peak() - before}))
"""


def write_source(path, **sizes):
    """A Vary-toy in bfloat16; `sizes` replaces numbers of its config."""
    shapes = toy_shapes(vary_toy_config() | sizes)
    write_checkpoint(path, CastSource(RandomSource(shapes, 0), "bfloat16"))
    return path


def grown_by(*arguments) -> int:
    """Peak resident bytes that a conversion adds to the process."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["status"] == 0, result.stderr
    return record["grown"]


@pytest.mark.ci
def test_memory_does_not_grow_with_the_file(tmp_path):
    source = write_source(tmp_path / "in.safetensors", num_hidden_layers=2, vocab_size=8000, num_attention_heads=4)
    size = source.stat().st_size
    assert size > 300 * MEGABYTE * 0.9
    arguments = ["--torch_ckpt_path", source, "--dtype", "float16", "--verify", "--report", tmp_path / "report.json"]
    assert grown_by(*arguments, "--mindspore_ckpt_path", tmp_path / "out.ckpt") < 200 * MEGABYTE < size


@pytest.mark.slow
def test_a_file_of_several_gigabytes_takes_the_memory_of_a_small_one(tmp_path):
    source = write_source(tmp_path / "in.safetensors")
    assert source.stat().st_size > 4e9
    arguments = ["--torch_ckpt_path", source, "--report", tmp_path / "report.json", "--verify"]
    shards = tmp_path / "shards"
    back = ["--mindspore_ckpt_path", shards, "--max_shard_size", "1GB", "--to", "hf"]
    assert grown_by(*arguments, *back) < 512 * MEGABYTE
    shutil.rmtree(shards)
    assert grown_by(*arguments, "--mindspore_ckpt_path", tmp_path / "out.ckpt") < 512 * MEGABYTE


@pytest.mark.slow
def test_a_dry_run_takes_seconds_for_any_size(tmp_path):
    source = write_source(tmp_path / "in.safetensors")
    started = time.monotonic()
    assert grown_by("--torch_ckpt_path", source, "--dry_run") < 100 * MEGABYTE
    assert time.monotonic() - started < 10


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_converting_reaches_60_percent_of_the_speed_of_cp(ending, tmp_path):
    source = write_source(tmp_path / "in.safetensors")
    target = tmp_path / f"out.{ending}"
    copying, converting = [], []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(["cp", source, tmp_path / "copy"], check=True)
        subprocess.run(["sync", tmp_path / "copy"], check=True)
        copying.append(time.monotonic() - started)
        (tmp_path / "copy").unlink()
        started = time.monotonic()
        grown_by("--torch_ckpt_path", source, "--mindspore_ckpt_path", target)
        converting.append(time.monotonic() - started)
        target.unlink()
    assert 0.6 * min(converting) <= min(copying), (copying, converting)
