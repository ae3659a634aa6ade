"""Reading held-out records with the live model."""

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.api import load, read_config
from mindvlm.checkpoint import MemorySource
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.nn.parameters import fill_parameters
from mindvlm.processing.text.edit_distance import character_error_rate
from mindvlm.training.evaluate import DatasetsEvaluator
from tests.tiny_vary import tiny_config, tiny_weights
from tests.training.small_job import small_job


@pytest.fixture
def make(tmp_path):
    """Makes an evaluator of the small data set, its model and what it says."""

    def run(**changes):
        job = small_job(tmp_path, evaluation__datasets="words", **changes).config
        model_config = read_config(job.model_config)
        family = get_family("vary")
        model = family.build(model_config.model)
        weights = tiny_weights(tiny_config())
        fill_parameters(model, MemorySource(weights))
        evaluator = DatasetsEvaluator(
            job.evaluation,
            job.data,
            family.processor,
            model_config.processor,
            model,
            max_length=model_config.model.max_length,
            graph_mode=False,
        )
        return evaluator, model

    return run


def test_answers_are_those_of_the_api(make, tmp_path):
    evaluator, model = make(evaluation={"datasets": "words", "num_samples": 4, "batch_size": 3, "max_new_tokens": 2})
    evaluation = evaluator.evaluate()
    assert [one.origin for one in evaluation.readings] == [f"words {n}" for n in range(4)], "in the order of the files"
    assert [one.reference for one in evaluation.readings] == ["one", "two two", "three three three", "four"]
    loaded = load(tmp_path / "tiny.yaml")
    expected = [loaded.chat("Read.", str(tmp_path / "words" / f"{n}.png"), max_new_tokens=2) for n in (0, 1)]
    expected.append(loaded.chat("Say four.", max_new_tokens=2))
    assert [evaluation.readings[n].text for n in (0, 1, 3)] == [str(answer) for answer in expected]
    texts, references = [one.text for one in evaluation.readings], [one.reference for one in evaluation.readings]
    assert evaluation.figures["cer"] == character_error_rate(texts, references)
    assert model.training, "training goes on"


def test_it_reads_with_the_weights_of_the_moment(make):
    evaluator, model = make(evaluation={"datasets": "words", "num_samples": 2, "batch_size": 2, "max_new_tokens": 4})
    before = evaluator.evaluate()
    head = model.language_model.lm_head.weight
    head.set_data(Tensor(np.roll(head.asnumpy(), 1, axis=0)))
    assert [one.text for one in evaluator.evaluate().readings] != [one.text for one in before.readings]


def test_answers_with_nan_are_said(make, said):
    evaluator, model = make(evaluation={"datasets": "words", "num_samples": 4, "batch_size": 4, "max_new_tokens": 2})
    bias = model.mm_projector.bias
    bias.set_data(Tensor(np.full_like(bias.asnumpy(), np.nan)))
    readings = evaluator.evaluate().readings
    assert [bool(one.text) for one in readings] == [False, False, False, True]
    assert len(said) == 1 and said[0].startswith("evaluation: 3 of 4 answers are not complete, the logits of token 1")


def test_samples_without_labels_are_left_out(make, monkeypatch):
    evaluator, _ = make(evaluation={"datasets": "words", "num_samples": 4, "batch_size": 4, "max_new_tokens": 2})
    made = evaluator.maker.make

    def unlabelled(number):
        sample = made(number)
        return sample if number == 0 else replace(sample, labels=np.full_like(sample.labels, -100))

    monkeypatch.setattr(evaluator.maker, "make", unlabelled)
    with pytest.raises(UserError, match=r"3 of 4 samples cannot be used, .*record 1 \(line \d+\): has no label"):
        evaluator.evaluate()


def test_samples_that_cannot_be_used_are_left_out_and_said(make, tmp_path, said):
    evaluator, _ = make(evaluation={"datasets": "words", "num_samples": 4, "batch_size": 4, "max_new_tokens": 2})
    (tmp_path / "words" / "1.png").unlink()
    assert [one.origin for one in evaluator.evaluate().readings] == ["words 0", "words 2", "words 3"]
    assert len(said) == 1 and "1 of 4 samples cannot be used" in said[0]
    for number in (0, 2):
        (tmp_path / "words" / f"{number}.png").unlink()
    with pytest.raises(UserError, match="3 of 4 samples cannot be used"):
        evaluator.evaluate()
