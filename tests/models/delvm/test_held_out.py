"""The evaluation of held-out codes while the decoder trains."""

import json

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.token_files import TokenFile
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.training.delvm_job import MODEL, VOCAB_SIZE, write_codes, write_job

EVALUATION = {"codes": "held_out", "min_length": 16, "batch_size": 2}


@pytest.fixture
def folder(tmp_path):
    write_codes(tmp_path / "held_out/rain", [32, 20, 10, 24], seed=1)
    write_codes(tmp_path / "held_out/blur", [80], seed=2)
    return tmp_path


def figures_of(logits_of, lines, batch_size):
    """Loss, accuracy and perplexity from logits of single rows, without the code under test."""
    rows = []
    for codes in lines:
        logits, labels = logits_of(codes).astype(np.float64)[:-1], codes[1:]
        losses = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels])[labels != 0]
        rows.append((losses.sum(), (logits.argmax(-1) == labels)[labels != 0].sum(), len(losses)))
    rows = np.array(rows, float)
    batches = [rows[start : start + batch_size].sum(0) for start in range(0, len(rows), batch_size)]
    total = rows.sum(0)
    return np.mean([batch[0] / batch[2] for batch in batches]), total[1] / total[2], np.exp(total[0] / total[2])


def test_figures_of_a_run(folder):
    job = read_job(write_job(folder, evaluation=EVALUATION, evaluate_every=3, best="val_loss"))
    trainer = Trainer(job)
    trainer.train()
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in measured] == [3, 6]
    scorer = trainer.evaluator.scorer
    lines = {
        task: [line for line in TokenFile(folder / f"held_out/{task}/train.bin", VOCAB_SIZE) if len(line) >= 16]
        for task in ("blur", "rain")
    }
    cut = {task: [line[: MODEL["model"]["max_length"]] for line in found] for task, found in lines.items()}
    for task, chosen in {"/rain": cut["rain"], "/blur": cut["blur"], "": [*cut["blur"], *cut["rain"]]}.items():
        expected = figures_of(lambda codes: scorer.compute(codes[None].astype(np.int32))[0], chosen, 2)
        for key, value in zip(("loss", "accuracy", "perplexity"), expected, strict=True):
            assert measured[-1][f"val_{key}{task}"] == pytest.approx(value, rel=1e-5), (key, task)
    assert trainer.model.training
    best = json.loads((folder / "run/best.json").read_text())
    assert best["val_loss"] == min(record["val_loss"] for record in measured)


def test_few_lines_of_each_task(folder):
    trainer = Trainer(read_job(write_job(folder, evaluation=EVALUATION | {"num_lines": 1})))
    assert {task: len(lines) for task, lines in trainer.evaluator.tasks.items()} == {"blur": 1, "rain": 1}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codes": "nowhere"}, "nowhere: no such folder"),
        ({"min_length": 100}, "holds no sentence of 100 codes or more"),
        ({"batch_size": 0}, "evaluation.batch_size is 0; expected at least 1"),
        ({"code": "x"}, "unknown config key 'evaluation.code'; did you mean 'codes'"),
        ({"registry": "x.yaml"}, "unknown config key 'evaluation.registry'"),
    ],
)
def test_an_evaluation_that_cannot_be(folder, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(read_job(write_job(folder, evaluation=EVALUATION | changes)))
