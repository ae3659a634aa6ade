"""The logits check of SliME: right conversions pass, planted errors fail where they enter."""

import json

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.convert_weight import main
from mindvlm.convert.parity.slime import MODELS
from mindvlm.convert.parity.slime.inputs import NUM_CROPS, parity_config
from mindvlm.convert.parity.stages import STEP_LOGITS
from mindvlm.convert.random_weights import RandomSource
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import HF, STATISTICS, infos_of
from mindvlm.weights.recognise import native_view
from mindvlm.weights.rules.planning import make_plan
from tests.convert.parity.parity_bench import NUM_TOKENS, Bench, in_this_process, request, swapped
from tests.models.tinyllava.test_names import read_all
from tests.tiny_slime import CONFIG, TOWER

STAGES = list(MODELS["slime"])
LANGUAGE = ["merged_embeddings", "layers", "logits", STEP_LOGITS]
LAYER, TOWER_LAYER = "language_model.layers.1.", "vision_tower.encoder.layers."
GLOBAL, LOCAL = "mm_projector.attn.", "sampler."


def config_of(**changes) -> dict:
    """A tiny model with square projections, so that more can be exchanged, and two heads per resampler."""
    tower = {**TOWER, "hidden_size": 256}
    return {**CONFIG, "mm_hidden_size": 256, "num_key_value_heads": 4, "vision_config": tower, **changes}


def source_tensors(config: dict) -> dict[str, np.ndarray]:
    """Random tensors under the published names."""
    infos = make_plan(HF.reverse(), infos_of(from_hf_config(config))).infos
    shapes = {name: info.shape for name, info in infos.items()}
    tensors = read_all(RandomSource(shapes | {f"model.mm_projector.{name}": (1,) for name in STATISTICS}, 0))
    # a gate that mixes
    return tensors | {name: value / 8 for name, value in tensors.items() if name.endswith(("w_gate", "w_noise"))}


def native_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return read_all(native_view(MemorySource(tensors), get_family("slime").models))


def bench_of(folder, config: dict, tensors: dict[str, np.ndarray], **options) -> Bench:
    return Bench(folder, config, tensors, family="slime", model="slime", **options)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return bench_of(tmp_path_factory.mktemp("slime"), config_of(), source_tensors(config_of()), compiled=True)


@pytest.fixture(scope="module")
def native() -> dict[str, np.ndarray]:
    return native_tensors(source_tensors(config_of()))


def test_right_conversions_pass(bench, native):
    report = bench.report(native)
    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == STAGES
    assert report.num_equal == len(report.tokens) == NUM_TOKENS
    shapes = {stage.key: stage.shape for stage in report.stages}
    assert shapes["router_scores"] == (NUM_CROPS * 4,) and shapes["connector"] == (16 + 1 + NUM_CROPS * 4, 32)


@pytest.mark.parametrize(
    ("first", "second", "title"),
    [
        ("mm_projector.w_gate", "mm_projector.w_noise", "gate"),
        (GLOBAL + "query", GLOBAL + "pos_embed", "global resampler"),
        (GLOBAL + "ln_q.weight", GLOBAL + "ln_kv.weight", "global resampler"),
        (GLOBAL + "ln_q.bias", GLOBAL + "ln_kv.bias", "global resampler"),
        (GLOBAL + "ln_kv.weight", GLOBAL + "ln_post.weight", "global resampler"),
        (GLOBAL + "attn.q_proj.weight", GLOBAL + "attn.k_proj.weight", "global resampler"),
        (GLOBAL + "attn.k_proj.weight", GLOBAL + "attn.v_proj.weight", "global resampler"),
        (GLOBAL + "attn.q_proj.bias", GLOBAL + "attn.v_proj.bias", "global resampler"),
        (GLOBAL + "ln_q.weight", LOCAL + "ln_q.weight", "global resampler"),
        ("mm_projector.projection.0.bias", "mm_projector.projection.2.bias", "global rows"),
        (LOCAL + "query", LOCAL + "pos_embed", "local compression"),
        (LOCAL + "ln_q.weight", LOCAL + "ln_kv.weight", "local compression"),
        (LOCAL + "ln_q.bias", LOCAL + "ln_kv.bias", "local compression"),
        (LOCAL + "attn.q_proj.weight", LOCAL + "attn.out_proj.weight", "local compression"),
        (TOWER_LAYER + "0.self_attn.q_proj.bias", TOWER_LAYER + "0.self_attn.v_proj.bias", "vision features"),
        (TOWER_LAYER + "1.layer_norm1.weight", TOWER_LAYER + "1.layer_norm2.weight", "vision last layer"),
        (TOWER_LAYER + "1.layer_norm2.bias", "vision_tower.post_layernorm.bias", "vision last layer"),
        ("language_model.embed_tokens.weight", "language_model.lm_head.weight", "image rows"),
        (LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", "decoder layers"),
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight", "decoder layers"),
        (LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight", "decoder layers"),
        (LAYER + "input_layernorm.weight", "language_model.norm.weight", "decoder layers"),
    ],
)  # fmt: skip
def test_planted_swaps_fail_where_they_enter(bench, native, first, second, title):
    report = bench.report(swapped(native, first, second))
    assert report.failed_stages[0].title == title, report.table()
    assert "is wrong, the stages before it are right" in report.failure()


def test_every_tensor_counts(bench, native):
    """A bias of keys shifts all scores of a query alike, and the noise has no effect on an answer."""
    without_effect = []
    for name, value in native.items():
        noise = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)
        if bench.report(native | {name: value + 0.1 * noise}).passed:
            without_effect.append(name)
    biases = [f"{TOWER_LAYER}{layer}.self_attn." for layer in range(2)] + [f"{GLOBAL}attn.", f"{LOCAL}attn."]
    assert sorted(without_effect) == sorted([f"{name}k_proj.bias" for name in biases] + ["mm_projector.w_noise"])


@pytest.mark.parametrize(
    "changes",
    [{"use_global_only": True, "mm_learnable_gated": 0}, {"use_local_only": True, "mm_learnable_gated": 1}],
    ids=["global", "local"],
)
def test_one_view_and_one_expert(tmp_path, changes):
    config = config_of(**changes)
    tensors = source_tensors(config)
    report = bench_of(tmp_path, config, tensors).report(native_tensors(tensors))
    assert report.passed, report.table()
    skipped = ["router_scores"] if "use_global_only" in changes else []
    assert [stage.key for stage in report.stages] == [key for key in STAGES if key not in skipped]


@pytest.mark.parametrize(
    ("prefixes", "keys"),
    [
        (("vision_tower.",), ["tower_features", "tower_last_hidden", "tower_pooled"]),
        (("mm_projector.",), ["global_resampled", "gates", "global_rows"]),
        (("mm_projector.", "sampler."), STAGES[3:8]),
        (("language_model.",), LANGUAGE),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_parts_are_compared_as_far_as_they_go(tmp_path, native, prefixes, keys):
    part = {name: value for name, value in native.items() if name.startswith(prefixes)}
    report = bench_of(tmp_path, config_of(), part).report(part)
    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == keys


def test_a_config_of_another_model_is_refused():
    with pytest.raises(UserError, match="does not describe a SliME; put that of the whole model there"):
        parity_config(request("", "", {"model_type": "llama", "hidden_size": 32}, family="slime", model="slime"), ())


def test_absent_positions_are_computed_on_both_sides(tmp_path, native):
    trained = {name: value for name, value in native.items() if not name.endswith("pos_embed")}
    part = {name: value for name, value in trained.items() if name.startswith(("mm_projector.", LOCAL))}
    report = bench_of(tmp_path, config_of(), part).report(part)
    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == STAGES[3:8]


def test_the_command_proves_a_folder(tmp_path, capsys):
    """Both sides, from the command line; bfloat16, and a tower that another folder describes."""
    config = config_of()
    source = tmp_path / "SliME"
    (source / "vision_tower").mkdir(parents=True)
    write_checkpoint(source / "model.safetensors", MemorySource(source_tensors(config)))
    (source / "vision_tower" / "config.json").write_text(json.dumps(config.pop("vision_config")))
    (source / "config.json").write_text(json.dumps(config))
    target = tmp_path / "slime.safetensors"
    arguments = ["--torch_ckpt_path", str(source), "--mindspore_ckpt_path", str(target), "--dtype", "bfloat16"]

    with in_this_process():
        status = main([*arguments, "--verify", "logits"])

    output = capsys.readouterr()
    assert status == 0, output.err
    assert "router scores" in output.out and "greedy ids: 32 of 32 equal" in output.out
    assert "loading the source into the reference, torch" in output.err and target.exists()
