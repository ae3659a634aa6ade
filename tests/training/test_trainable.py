"""Which parameters train: patterns, their order, what is refused, the table; and that the rest stays as it is."""

import re

import numpy as np
import pytest
import yaml

from mindvlm.checkpoint import open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.nn.lora import LoraConfig, adapted_linears
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.training.job_file import read_job
from mindvlm.training.lora import add_lora
from mindvlm.training.trainable import choose_trainable, require_something_trains, trainable_table
from mindvlm.training.trainer import Trainer
from tests.tiny_vary import write_tiny_vary
from tests.training.small_job import losses, small_job, write_job


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


def test_what_no_output_depends_on_is_frozen_and_the_table_says_so(make_model):
    """CLIP's features are those before its last layer."""
    model = make_model(model__freeze_vision_tower=False)
    choose_trainable(model, freeze=[], train={})
    unused = re.compile(r"^vision_tower\.(encoder\.layers\.1|post_layernorm)\.")
    names = {name for name, _ in model.parameters_and_names()}
    assert trained(model) == {name for name in names if not unused.match(name)} != names
    model = make_model(model__freeze_vision_tower=True)
    choose_trainable(model, freeze=["^language_model"], train={"train": [r"^vision_tower\."]})
    assert "vision_tower.encoder.layers.0.mlp.fc1.bias" in trained(model)
    assert not any(map(unused.match, trained(model)))
    rows = [re.split(r"  +", line) for line in trainable_table(model, {})]
    states = {(row[0], row[3]) for row in rows if "fc1.bias" in row[0] or "post_layernorm.bias" in row[0]}
    name, why = "vision_tower.encoder.layers.*.mlp.fc1.bias", "frozen: no output depends on it"
    assert states == {(name, "trained"), (name, why), ("vision_tower.post_layernorm.bias", why)}
    with pytest.raises(
        UserError, match=r"train: 'post_layernorm' matches only .* cannot train, .*\(no output depends on it\)"
    ):
        choose_trainable(model, freeze=[], train={"train": ["post_layernorm"]})


def test_a_class_token_that_is_dropped_before_the_first_layer(make_model):
    for layer, is_unused in ((0, True), (1, False)):
        model = make_model(model__vision_select_layer=layer, model__freeze_vision_tower=True)
        choose_trainable(model, freeze=[], train={"train": [r"^vision_tower\.embeddings"]})
        assert ("vision_tower.embeddings.class_embedding" in trained(model)) == (not is_unused)


def test_what_no_output_depends_on_gets_no_adapter(make_model):
    model, config = make_model(), LoraConfig(targets=[r"^vision_tower\..*fc1"])
    choose_trainable(model, freeze=[], train={}, freezes_all=True)
    add_lora(model, config, seed=0, divided=ParallelModel(), mesh=Mesh())
    assert list(adapted_linears(model)) == ["vision_tower.encoder.layers.0.mlp.fc1"]
    config = LoraConfig(targets=[r"^vision_tower\.encoder\.layers\.1\."])
    with pytest.raises(UserError, match=r"layers that cannot train, such as vision_tower.*\(no output .*\); remove it"):
        add_lora(model, config, seed=0, divided=ParallelModel(), mesh=Mesh())


@pytest.mark.parametrize("kind", ["toy", "tinyllava"])
def test_weight_decay_leaves_what_no_output_depends_on(tmp_path, kind):
    changes = {"data__max_length": 192, "data__lengths": [192], "optimizer__weight_decay": 0.5}
    job = small_job(tmp_path, kind=kind, train=[r"^vision_tower\."], schedule={"total_steps": 2}, **changes)
    trainer = Trainer(job)
    before = {name: p.asnumpy().copy() for name, p in trainer.model.parameters_and_names()}
    unused = {parameter.name for parameter in trainer.model.unused_parameters}
    trainer.train()
    tower = {name: p for name, p in trainer.model.parameters_and_names() if name.startswith("vision_tower.")}
    assert unused and {name for name, p in tower.items() if np.array_equal(p.asnumpy(), before[name])} == unused


@pytest.mark.parametrize(
    ("kind", "changes", "tensor"),
    [
        ("tiny", {"tie_word_embeddings": False}, "language_model.lm_head.weight"),
        ("toy", {"o_bias": True}, "o_proj.bias"),
    ],
)
def test_a_model_whose_checkpoints_could_not_be_loaded(tmp_path, kind, changes, tensor):
    path = write_job(tmp_path, kind=kind)
    model = tmp_path / yaml.safe_load(path.read_text())["model_config"]
    config = yaml.safe_load(model.read_text())
    config["model"]["language_model"].update(changes)
    model.write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError, match="checkpoints of this model could not be loaded, .*tie_word_embeddings"
    ) as error:
        Trainer(read_job(path))
    assert tensor in str(error.value) and model.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_model": {"tie_word_embeddings": True}}, "could not be loaded, .*tie_word_embeddings is true"),
        ({"language_model": {"qkv_bias": True}}, "model.language_model.qkv_bias is true, .* set it to false"),
        (
            {"language_model": {"o_bias": True}},
            "could not be loaded, .*o_proj.bias|model.language_model.o_bias is true",
        ),
        ({"language_model": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, .* set it to 1.0"),
        ({"language_model": {"mlp": "plain"}}, "model.language_model.mlp is 'plain', .*|could not be loaded"),
        ({"language_model": {"use_logn_attn": True}}, "use_logn_attn is true, .* set it to false"),
    ],
)
def test_a_model_that_no_config_json_describes(tmp_path, changes, message):
    sizes = {"data__max_length": 192, "data__lengths": [192]}
    job = small_job(tmp_path, kind="tinyllava", model_changes={"model": changes}, **sizes)
    with pytest.raises(UserError, match=message) as error:
        Trainer(job)
    assert "\n" not in str(error.value)


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
