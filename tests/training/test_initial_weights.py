"""Sources of the initial weights."""

import json

import numpy as np
import pytest
from mindspore import Tensor, ops

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.core.progress import progress_to
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.models.vary.names import HF
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.nn.norm import norm_weights
from mindvlm.nn.resize_tables import keep_shape
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.training.config import InitConfig
from mindvlm.training.initial_weights import fill_weights, initial_values, summarize
from mindvlm.training.trainer import Trainer
from mindvlm.weights.rules.planning import make_plan
from tests import tiny_tinyllava, tiny_vary
from tests.models.vary.vary_names import transformers_sam_name
from tests.processing.text.small_bpe import small_vocabulary
from tests.tiny_vary import tiny_config, tiny_opt_config, tiny_weights, write_tiny_opt, write_tiny_vary
from tests.training.small_job import losses, small_job


@pytest.fixture
def fill(tmp_path):
    """Fills a small model from checkpoints; returns its values, and what was said."""

    def run(weights, *, random=(), kind="toy"):
        path = (write_tiny_opt if kind == "tiny" else write_tiny_vary)(tmp_path / "model")
        family, config, said = get_family("vary"), read_config(path), []
        model = family.build(config.model)
        init = InitConfig(weights=[str(one) for one in weights], random=list(random))
        with progress_to(said.append):
            fill_weights(model, init, seed=5, fit=family.fit(config), rules=family.initial_rules, specs={})
        run.initial = {"norm_weights": norm_weights(model), "rules": family.initial_rules}
        return {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}, said

    (tmp_path / "model").mkdir()
    (tmp_path / "qwen").mkdir()
    return run


def save(path, tensors):
    write_checkpoint(path, MemorySource(tensors))
    return path


def test_without_checkpoints_everything_is_random_by_name(fill):
    values, said = fill([])
    assert said == []
    for name, value in values.items():
        np.testing.assert_array_equal(value, initial_values(name, value.shape, 5, **fill.initial))


def test_later_checkpoints_lie_over_earlier_ones_and_the_rest_is_random(fill, tmp_path):
    weights = tiny_weights(tiny_config(), seed=1)
    projectors = {name for name in weights if name.startswith("mm_projector")}
    base = save(tmp_path / "base.safetensors", {n: v for n, v in weights.items() if n not in projectors})
    tower = {n: v + 1 for n, v in weights.items() if n.startswith("vision_vocabulary")}
    layer = save(tmp_path / "layer.safetensors", tower)
    values, said = fill([base, layer], random=[r"^mm_projector"])
    for name, value in values.items():
        expected = tower.get(name, weights[name])
        if name in projectors:
            expected = initial_values(name, value.shape, 5, **fill.initial)
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert len(said) == 3 and str(layer) in said[1]
    assert said[2].startswith("initialized at random: 4 tensors (mm_projector")


def test_nan_in_a_checkpoint_is_found_before_the_first_step(fill, tmp_path):
    weights = tiny_weights(tiny_config(), seed=1)
    weights["language_model.norm.weight"][-1] = np.nan
    path = save(tmp_path / "ruined.safetensors", weights)
    with pytest.raises(UserError, match=f"{path}: tensor language_model.norm.weight holds NaN; .*earlier checkpoint"):
        fill([path])


def test_the_vocabulary_starts_from_either_published_sam(fill, tmp_path):
    weights = tiny_weights(tiny_config(), seed=1)
    vocabulary = {n.replace("vision_vocabulary", "image_encoder"): v for n, v in weights.items() if "vocabulary." in n}
    raw = {name: value for name, value in vocabulary.items() if ".net_" not in name}
    base = save(tmp_path / "base.safetensors", tiny_weights(tiny_config(), seed=2))
    sam = save(tmp_path / "sam_vit_b.safetensors", raw)
    same = save(tmp_path / "model.safetensors", {transformers_sam_name(name): value for name, value in raw.items()})
    expected, _ = fill([base, sam])
    values, said = fill([base, same])
    assert f"weights from {same}: {len(raw)} tensors" in said[1]
    for name, value in values.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_names_of_published_files_are_understood(fill, tmp_path):
    weights = tiny_weights(tiny_config(), seed=2)
    foreign = make_plan(HF.reverse(), {i.name: i for i in MemorySource(weights).infos.values()}).view(
        MemorySource(weights)
    )
    write_checkpoint(tmp_path / "published.safetensors", foreign)
    assert "transformer.wte.weight" in foreign.infos
    values, _ = fill([tmp_path / "published.safetensors"])
    for name, value in values.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_a_longer_context_starts_from_interpolated_positions(fill, tmp_path):
    config = tiny_opt_config(model__max_length=160)
    config["model"]["language_model"]["max_position_embeddings"] = 160
    weights = tiny_weights(config, seed=3)
    path = save(tmp_path / "short.safetensors", weights)
    values, _ = fill([path], kind="tiny")
    name = "language_model.embed_positions.weight"
    assert weights[name].shape[0] == 162 and values[name].shape[0] == 322
    np.testing.assert_array_equal(values[name][:2], weights[name][:2])


def test_a_vary_toy_starts_from_a_qwen_with_more_rows(fill, tmp_path):
    """As Qwen-1.8B, whose 151936 rows become 151860."""
    weights = tiny_weights(tiny_config(), seed=4)
    language = {name: value for name, value in weights.items() if name.startswith("language_model.")}
    tables = ["language_model.embed_tokens.weight", "language_model.lm_head.weight"]
    for name in tables:
        more = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
        language[name] = np.concatenate([language[name], more])
    source = MemorySource(language)
    write_checkpoint(tmp_path / "qwen" / "model.safetensors", make_plan(HF.reverse(), source.infos).view(source))
    config = {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": len(language[tables[0]])}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config))
    rest = save(tmp_path / "rest.safetensors", {n: v for n, v in weights.items() if n not in language})
    values, said = fill([tmp_path / "qwen", rest])
    for name, value in values.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert len(said) == 3 and said[2].startswith("adapted: 2 tensors (language_model.embed_tokens.weight")


def test_what_no_checkpoint_has_must_be_named(fill, tmp_path):
    weights = tiny_weights(tiny_config())
    some = {name: value for name, value in weights.items() if not name.startswith("vision_tower")}
    path = save(tmp_path / "some.safetensors", some)
    with pytest.raises(UserError, match=r"no values for \d+ tensors \(.*vision_tower.*init.random") as error:
        fill([path])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'mm_projector' matches no parameter"):
        fill([path], random=["vision_tower", "mm_projector"])


VOCAB_SIZES = {"toy": tiny_vary.VOCAB_SIZE, "tiny": len(small_vocabulary()) + 3, "tinyllava": tiny_tinyllava.VOCAB_SIZE}
DIALECTS = {
    "qwen1": {},
    "opt": {
        "norm": "layer_norm", "position": "learned", "max_position_embeddings": 64, "mlp": "plain",
        "hidden_act": "relu", "o_bias": True,
    },
    "llama": {"qkv_bias": False, "num_key_value_heads": 2},
    "phi": {
        "norm": "layer_norm", "partial_rotary_factor": 0.5, "residual": "parallel", "mlp": "plain",
        "hidden_act": "gelu_new", "o_bias": True, "head_bias": True,
    },
    "stablelm": {"norm": "layer_norm", "partial_rotary_factor": 0.25},
    "internlm": {"o_bias": True},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},
}  # fmt: skip


@pytest.mark.parametrize("hidden_size", [32, 256])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_random_decoder_starts_at_the_logarithm_of_its_vocabulary(dialect, is_tied, hidden_size):
    """The first rows are a picture's features, the rest is text in which tokens repeat."""
    vocab_size, length = 600, 40
    config = DecoderConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4,
        head_dim=hidden_size // 4, intermediate_size=2 * hidden_size, tie_word_embeddings=is_tied, **DIALECTS[dialect],
    )  # fmt: skip
    model = CausalLM(config).set_train()
    fill_weights(model, InitConfig(), seed=3, fit=keep_shape, rules=(), specs={})
    rng = np.random.default_rng(0)
    ids = rng.choice(rng.integers(0, vocab_size, 25), (4, length)).astype(np.int32)
    features = 0.7 * rng.standard_normal((4, 8, hidden_size)).astype(np.float32)
    embeds = ops.concat((Tensor(features), model.embed_tokens(Tensor(ids[:, 8:]))), 1)
    ids[:, :8] = IGNORED_LABEL
    states = model(embeds, Tensor(decoder_frequencies(config)))
    loss, num_labels = (value.asnumpy() for value in model.lm_head.loss_sum(states, Tensor(ids)))
    assert loss / num_labels == pytest.approx(np.log(vocab_size), rel=0.1)


@pytest.mark.parametrize("kind", ["toy", "tiny", "tinyllava"])
def test_the_first_loss_of_every_family(tmp_path, kind):
    changes = {"data__max_length": 192, "data__lengths": [192]}
    Trainer(small_job(tmp_path, kind=kind, schedule={"total_steps": 1}, **changes)).train()
    ((_, loss, _),) = losses(tmp_path / "run")
    assert loss == pytest.approx(np.log(VOCAB_SIZES[kind]), rel=0.1)


def test_names_are_folded():
    names = [f"layers.{i}.mlp.{part}" for i in range(3) for part in "ab"] + ["norm"]
    assert summarize(names) == "7 tensors (3 layers.*.mlp.a, 3 layers.*.mlp.b, norm)"
