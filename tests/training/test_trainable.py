"""Which parameters train: patterns, their order, what is refused, the table; and that the rest stays as it is."""

import numpy as np
import pytest

from mindvlm.checkpoint import open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.training.trainable import choose_trainable, require_something_trains, trainable_table
from mindvlm.training.trainer import Trainer
from tests.tiny_vary import write_tiny_vary
from tests.training.small_job import losses, small_job


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")

    def make(**changes):
        config = read_config(write_tiny_vary(folder, **changes))
        return get_family("vary").build(config.model)

    return make


def trained(model) -> set[str]:
    return {name for name, parameter in model.parameters_and_names() if parameter.requires_grad}


def parts(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_freeze_is_first_and_train_is_last(make_model):
    model = make_model(model__freeze_vision_tower=False)
    everything = trained(model)
    assert len(parts(everything)) == 5
    choose_trainable(model, freeze=["^vision_", r"mlp\."], train={})
    assert parts(trained(model)) == {"language_model", "mm_projector", "mm_projector_vary"}
    assert not any(".mlp." in name for name in trained(model))
    choose_trainable(model, freeze=["."], train={"train": [r"^mm_projector\.", r"model\.layers\.1\.mlp"]})
    assert len(trained(model)) == 5 and parts(trained(model)) == {"language_model", "mm_projector"}


def test_train_finds_what_the_model_froze(make_model):
    model = make_model(model__freeze_vision_tower=True)
    assert "vision_vocabulary" not in parts(trained(model)) and model.freeze_vision_tower
    choose_trainable(model, freeze=[], train={"train": ["vision_vocabulary"]})
    model.stop_at_frozen_parts()
    assert "vision_vocabulary" in parts(trained(model)) and not model.freeze_vision_tower
    assert model.language_model.lm_head.token_loss.matrix_trains
    choose_trainable(model, freeze=["^vision_", "lm_head"], train={})
    model.stop_at_frozen_parts()
    assert model.freeze_vision_tower
    assert not model.language_model.lm_head.token_loss.matrix_trains


def test_patterns_that_choose_nothing(make_model):
    model = make_model()
    with pytest.raises(UserError, match=r"freeze: 'up_prj' matches no name; some names are .*up_proj") as error:
        choose_trainable(model, freeze=["up_prj"], train={})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"train: 'zzz\+' matches no name; some names are [a-z_]+\."):
        choose_trainable(model, freeze=[], train={"train": ["zzz+"]})
    with pytest.raises(UserError, match="train: 'mm_' matches only parameters that train anyway.*freeze: "):
        choose_trainable(model, freeze=[], train={"train": ["mm_"]})
    choose_trainable(model, freeze=["."], train={})
    with pytest.raises(UserError, match="every parameter is frozen"):
        require_something_trains(model)


def test_the_table_folds_layers_and_counts(make_model):
    model = make_model()
    choose_trainable(model, freeze=["."], train={"train": [r"layers\.1\.mlp\.up_proj"]})
    lines = trainable_table(model, {})
    name = "language_model.layers.*.mlp.up_proj.weight"
    rows = [line.split() for line in lines if line.startswith(name)]
    assert rows == [[name, "1", "1,536", "frozen"], [name, "1", "1,536", "trained"]]
    counts = [parameter.size for _, parameter in model.parameters_and_names()]
    share = f"{100 * 1536 / sum(counts):.3g}"
    assert lines[-1] == f"1,536 of {sum(counts):,} parameters train ({share} %), 1 of {len(counts)} tensors"
    assert lines[0].split() == ["parameters", "tensors", "numbers"]


def test_frozen_parameters_stay_and_have_no_state(tmp_path, said):
    job = small_job(tmp_path, freeze=["."], train=["^mm_projector", r"mlp\.down_proj"], schedule__total_steps=2)
    trainer = Trainer(job)
    before = {name: p.asnumpy().copy() for name, p in trainer.model.parameters_and_names()}
    names = trained(trainer.model)
    assert len(names) == 6 and any("parameters train (" in line for line in said)
    trainer.train()
    for name, parameter in trainer.model.parameters_and_names():
        assert np.array_equal(parameter.asnumpy(), before[name]) == (name not in names), name
    with open_checkpoint(tmp_path / "run" / "step-2" / "optimizer.safetensors") as optimizer:
        assert set(optimizer.infos) == {f"moment{k}.{name}" for name in names for k in (1, 2)} | {"num_updates"}
    with open_checkpoint(tmp_path / "run" / "step-2" / "weights.safetensors") as weights:
        assert set(weights.infos) == set(before)


def test_towers_learn_where_train_says_so(tmp_path):
    """The model's own freezing also stops gradients at the towers."""
    job = small_job(tmp_path, freeze=["language_model"], train=[r"vision_tower.*layers\.0\.mlp"])
    trainer = Trainer(job)
    name = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    before = dict(trainer.model.parameters_and_names())[name].asnumpy().copy()
    trainer.train()
    assert not np.array_equal(dict(trainer.model.parameters_and_names())[name].asnumpy(), before)


def test_another_choice_is_another_job(tmp_path):
    Trainer(small_job(tmp_path, schedule__total_steps=2)).train()
    assert len(losses(tmp_path / "run")) == 2
    with pytest.raises(UserError, match=r"freeze \(was \[\], is \['language_model'\]\)"):
        Trainer(small_job(tmp_path, schedule__total_steps=2, freeze=["language_model"]))
