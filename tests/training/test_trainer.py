from pathlib import Path

import numpy as np
import pytest
import yaml

from mindvlm.api import read_config
from mindvlm.checkpoint import open_checkpoint
from mindvlm.errors import UserError
from mindvlm.training.config import read_train_config
from mindvlm.training.curriculum import STAGES
from mindvlm.training.data import RenderedTextBatches
from mindvlm.training.rendered_text import sample
from mindvlm.training.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "vary"


@pytest.fixture(scope="module")
def batches():
    config = read_train_config(CONFIGS / "train_nano.yaml")
    return RenderedTextBatches(
        read_config(config.model_config).processor,
        queries=config.data.queries,
        main_query_share=0.5,
        batch_size=8,
        max_answer_tokens=config.data.max_answer_tokens,
        seed=3,
    )


@pytest.fixture
def job(tmp_path):
    """Writes the YAML of a job that is over in seconds; returns a function of its total steps."""
    model = yaml.safe_load((CONFIGS / "vary_nano.yaml").read_text())
    model["processor"]["vocab_file"] = str(CONFIGS / model["processor"]["vocab_file"])
    model["model"]["language_model"].update(num_hidden_layers=1, intermediate_size=32)
    model["model"]["vision_tower"].update(num_hidden_layers=1, intermediate_size=32)
    model["model"]["vision_vocabulary"].update(depth=1, global_attn_indexes=[0], mlp_ratio=1)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))

    def write(total_steps, **changes):
        data = {
            "model_config": "model.yaml",
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "data": {"batch_size": 2, "num_evaluation_images": 2, "curriculum_threshold": 100.0},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
            "schedule": {"total_steps": total_steps, "warmup_steps": 1},
            "log_every": 1,
            "evaluate_every": 100,
            "save_every": 100,
            **changes,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        return read_train_config(path)

    return write


def test_a_batch_is_a_function_of_its_number(batches):
    first, again, other = batches.make(5, STAGES[-1]), batches.make(5, STAGES[-1]), batches.make(6, STAGES[-1])
    assert first.texts == again.texts and np.array_equal(first.high_pixels, again.high_pixels)
    assert np.array_equal(first.input_ids, again.input_ids) and first.texts != other.texts


def test_a_batch_learns_the_answer_and_its_end_only(batches):
    batch = batches.make(1, STAGES[-1])
    tokenizer = batches.processor.tokenizer
    assert len(set(batch.prompt_lengths)) > 1, "questions of different length take part"
    for ids, labels, length, text in zip(batch.input_ids, batch.labels, batch.prompt_lengths, batch.texts, strict=True):
        learned = labels[labels != -100]
        assert tokenizer.decode(learned) == text + "<|im_end|>"
        assert len(learned) == len(text) + 1, "one token a character"
        assert (labels[:length] == -100).all() and np.array_equal(ids[length : length + len(learned)], learned)


def test_pixels_are_those_of_the_processor(batches):
    one = batches.make(2, STAGES[-1])
    pixels = batches.processor.pixels(sample(3, 2 * 8 + 4).image)
    np.testing.assert_array_equal(one.high_pixels[4], pixels.high)
    np.testing.assert_array_equal(one.clip_pixels[4], pixels.clip)


def test_a_resumed_run_ends_as_the_uninterrupted_one(job, tmp_path):
    lines = []
    Trainer(job(4), say=lines.append).train()
    whole = read_tensors(tmp_path / "run" / "state.safetensors")
    assert any("cer" in line for line in lines) and sum("loss" in line for line in lines) == 4
    Trainer(job(2, output_dir=str(tmp_path / "parts")), say=lines.append).train()
    resumed = Trainer(job(4, output_dir=str(tmp_path / "parts")), say=lines.append)
    assert resumed.step == 2 and any("resumed at step 2" in line for line in lines)
    resumed.train()
    parts = read_tensors(tmp_path / "parts" / "state.safetensors")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
    assert not list((tmp_path / "run").glob(".*")), "no half-written files"


def test_state_of_another_model_is_refused(job, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(job(1), say=lambda line: None)
    trainer.save()
    model = tmp_path / "model.yaml"
    data = yaml.safe_load(model.read_text())
    data["model"]["language_model"]["num_hidden_layers"] = 2
    model.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="state of another model"):
        Trainer(job(1), say=lambda line: None)


def test_unknown_keys_are_named(job):
    with pytest.raises(UserError, match="learning_rte.*learning_rate"):
        job(1, optimizer={"learning_rte": 1.0, "learning_rate": 1.0})


def read_tensors(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).data.copy() for name in checkpoint.infos}
