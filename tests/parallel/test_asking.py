"""Models that several processes share answer as in one process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mindvlm.api import load
from mindvlm.core.errors import UserError
from mindvlm.parallel import collectives, mesh
from mindvlm.parallel.host import HostGather
from mindvlm.tools import predict_llm
from tests.parallel import asking_job
from tests.parallel.launch import start
from tests.tiny_slime import ADDED_TOKENS, make_like_70b, write_tiny_slime
from tests.tiny_tinyllava import TOWER, write_tiny_tinyllava
from tests.tiny_vary import CONFIG, VOCAB_SIZE, picture, write_tiny_vary
from tests.weights.lora.adapters import write_adapter

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools" / "predict_llm.py"
JOB = Path(__file__).with_name("asking_job.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three models, with what one process computes for each."""
    folder = tmp_path_factory.mktemp("models")
    make_like_70b(write_tiny_slime(folder / "slime"))
    sizes = {"q_proj": (256, 256), "o_proj": (256, 256)}
    factors = {f"{name}.lora_A": (2, num_in) for name, (_, num_in) in sizes.items()}
    factors |= {f"{name}.lora_B": (num_out, 2) for name, (num_out, _) in sizes.items()}
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.1.self_attn.{name}.weight": torch.randn(shape, generator=random) * 0.3
        for name, shape in factors.items()
    }
    write_adapter(folder / "slime" / "adapter", tensors)
    tower = {**TOWER, "num_attention_heads": 4}
    model = write_tiny_tinyllava(folder / "tinyllava", vocab_size=332, num_key_value_heads=4, vision_config=tower)
    heads = {"model__vision_tower__num_attention_heads": 4, "model__vision_vocabulary__num_heads": 4}
    (model / "added_tokens.json").write_text(ADDED_TOKENS)
    tokens = [*CONFIG["processor"]["special_tokens"], "<a>", "<b>"]
    decoder = {"vocab_size": VOCAB_SIZE + 2, "num_attention_heads": 4, "head_dim": 8}
    decoder = {f"model__language_model__{key}": value for key, value in decoder.items()}
    write_tiny_vary(folder / "vary", **heads, **decoder, processor__special_tokens=tokens)
    asking_job.main(folder, "pynative", ["slime", "tinyllava", "vary"])
    return folder


def read(folder: Path, name: str, num_processes: int, rank: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}-{num_processes}-{rank}.npz") as arrays:
        return dict(arrays)


def run(folder: Path, tmp_path: Path, num_processes: int, mode: str, *names: str) -> None:
    job = start(JOB, str(folder), mode, *names, num_processes=num_processes, log_dir=tmp_path)
    output, _ = job.communicate(timeout=500)
    assert job.returncode == 0, output[-3000:]


@pytest.mark.ci
@pytest.mark.parametrize(
    "num_processes, mode, names",
    [
        (2, "pynative", ["slime", "tinyllava", "vary"]),
        (4, "pynative", ["slime", "tinyllava", "vary"]),
        (2, "graph", ["slime"]),
    ],
)
def test_processes_answer_as_one(num_processes, mode, names, folder, tmp_path):
    run(folder, tmp_path, num_processes, mode, *names)
    for name in names:
        whole = read(folder, name, 1, 0)
        for rank in range(num_processes):
            part = read(folder, name, num_processes, rank)
            for key in [key for key in whole if key.startswith("ids")]:
                np.testing.assert_array_equal(part[key], whole[key], err_msg=f"{name}, rank {rank}, {key}")
            error = np.linalg.norm(part["logits"] - whole["logits"]) / np.linalg.norm(whole["logits"])
            assert error <= 1e-5, f"{name}, rank {rank}"
            assert part["cache"] * num_processes == whole["cache"]
            assert whole["weights"] / num_processes < part["weights"] < whole["weights"]


@pytest.mark.ci
def test_the_command_answers_once(folder, tmp_path, capsys):
    picture(1, (90, 60)).save(tmp_path / "page.png")
    options = ["--config_path", str(folder / "tinyllava" / "model"), "--mode", "pynative"]
    options += ["--image_dir", str(tmp_path / "page.png"), "--query", "Is it large?", "--max_new_tokens", "6"]
    assert predict_llm.main(options) == 0
    answer = capsys.readouterr().out

    job = start(COMMAND, *options, "--tensor_parallel", "2", num_processes=2, log_dir=tmp_path)
    console, _ = job.communicate(timeout=300)
    assert job.returncode == 0, console[-3000:]
    assert console.count(answer) == 1
    assert console.count("6 new (max_new_tokens)") == 1


@pytest.mark.parametrize(
    "wanted, running, message",
    [
        (4, 1, "tensor_parallel is 4 but only 1 process is running; set it to 1, or start msrun with --worker_num=4"),
        (1, 2, "tensor_parallel is 1 but 2 processes are running; set it to 2, or start without msrun"),
        (0, 1, "tensor_parallel is 0 but only 1 process is running; set it to 1, or"),
    ],
)
def test_another_number_of_processes_is_refused(wanted, running, message, monkeypatch):
    monkeypatch.setattr(mesh, "world_size", lambda: running)
    with pytest.raises(UserError, match=message):
        mesh.init_tensor_parallel(wanted)


def test_every_rank_takes_the_choices_of_the_first(monkeypatch):
    monkeypatch.setattr(collectives.SumOver, "__init__", lambda self, group: collectives.nn.Cell.__init__(self))
    host = HostGather(mesh.Mesh(tp=2, rank=1))
    monkeypatch.setattr(host, "over_tp", lambda array: [array + 4, array])
    chosen = host.first(np.array([3], np.int32))
    assert chosen.dtype == np.int32 and chosen.tolist() == [7]


def test_tokens_are_those_of_the_first_rank(tmp_path):
    model = load(write_tiny_vary(tmp_path))
    model.model.from_first_rank = lambda ids: np.full_like(ids, 7)
    assert model.chat("Say one.", max_new_tokens=3).ids == [7, 7, 7]


def test_rows_are_chosen_by_the_scores_of_the_first_rank(tmp_path):
    model = load(write_tiny_slime(tmp_path), mode="pynative")
    whole = model.prepared(model.prompter("Say one.", 1), model.pictures(picture(1, (90, 60))))[1].counts
    # all but one row are improbable
    model.model.from_first_rank = lambda scores: np.where(np.arange(len(scores)) == 2, 1e3, 0).astype(np.float32)
    kept = model.prepared(model.prompter("Say one.", 1), model.pictures(picture(1, (90, 60))))[1].counts
    assert kept == [model.model.num_fixed_rows + 1] and whole != kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, num_layers, num_processes", [("7b", 2, 1), ("8b", 1, 1), ("13b", 2, 2), ("70b", 1, 2), ("70b", 1, 4)]
)
def test_a_few_layers_of_published_widths(name, num_layers, num_processes, tmp_path):
    """Needs 14 GB of memory for 70B."""
    script = Path(__file__).with_name("real_widths_job.py")
    arguments = [name, str(num_layers), str(tmp_path / "one.npz")]
    subprocess.run(
        [sys.executable, str(script), *arguments], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    with np.load(tmp_path / "one.npz") as arrays:
        one = dict(arrays)
    assert np.isfinite(one["logits"]).all() and len(one["ids"]) == 8
    if num_processes == 1:
        return
    job = start(
        script, name, str(num_layers), str(tmp_path / "several.npz"), num_processes=num_processes, log_dir=tmp_path
    )
    output, _ = job.communicate(timeout=1800)
    assert job.returncode == 0, output[-3000:]
    with np.load(tmp_path / "several.npz") as arrays:
        np.testing.assert_array_equal(arrays["ids"], one["ids"])
        np.testing.assert_array_equal(arrays["rows"], one["rows"])
        error = np.linalg.norm(arrays["logits"] - one["logits"]) / np.linalg.norm(one["logits"])
        assert error <= 1e-5
        # every process holds its share of the decoder; the adapters are whole in each
        assert arrays["memory"][:, 0].max() < 0.1 * one["memory"][0, 0] + one["memory"][0, 0] / num_processes
