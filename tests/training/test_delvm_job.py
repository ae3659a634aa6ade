"""The training of DeLVM's decoder: packs in rows, segments, resume, and what is refused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from PIL import Image

from mindvlm import load
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.errors import UserError
from mindvlm.models.delvm import family as delvm
from mindvlm.models.delvm.config import parse_config
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.packing import PackedTokens
from mindvlm.models.delvm.token_files import TokenFile
from mindvlm.models.delvm.training import rows_of
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.tools.make_data import main as make_data
from mindvlm.training.building import read_model
from mindvlm.training.initial_weights import initial_values
from mindvlm.training.job_file import read_job
from mindvlm.training.step_runner import Outcome
from mindvlm.training.trainer import Trainer
from tests.training.delvm_job import MODEL, VOCAB_SIZE, write_codes, write_job
from tests.training.small_job import losses, read_tensors


def packs_of(folder, lengths, pack_length=96, segment_length=32, **options):
    write_codes(folder, lengths)
    packed = PackedTokens(
        TokenFile(folder / "train.bin", VOCAB_SIZE), pack_length, segment_length, min_length=1, **options
    )
    return [packed[number] for number in range(len(packed))]


@pytest.fixture(scope="module")
def model():
    config = parse_config(MODEL, "model.yaml").model
    model = DelvmModel(config)
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        parameter.set_data(Tensor(rng.normal(0, 0.1, parameter.shape), ms.float32))
    return model, Tensor(decoder_frequencies(config.language_model))


def loss_and_gradients(model, frequencies, arrays):
    """The summed loss, the number of labels and all gradients of a pass."""
    codes, labels, *rest = (Tensor(array) for array in arrays.values())
    parameters = ms.ParameterTuple(model.trainable_params())
    (loss, number), gradients = ops.value_and_grad(model, None, parameters, has_aux=True)(
        codes, labels, frequencies, *rest
    )
    return float(loss), float(number), [gradient.asnumpy() for gradient in gradients]


@pytest.mark.parametrize("lengths", [[40, 9, 80, 32, 7, 24, 65, 31], [64, 32, 96], [20] * 10])
def test_rows_give_the_loss_and_the_gradients_of_single_segments(tmp_path, model, lengths):
    packs = packs_of(tmp_path, lengths)[:2]
    arrays = rows_of(packs, 32)
    assert len(arrays) == (2 if max(lengths) % 32 == 0 and len(lengths) == 3 else 4)
    loss, number, gradients = loss_and_gradients(*model, arrays)
    expected = [0.0, 0.0, [0.0] * len(gradients)]
    for pack in packs:
        for start, end in pairwise(pack.cu_seqlens):
            single = {"codes": pack.input_ids[None, start:end], "labels": pack.labels[None, start:end]}
            found = loss_and_gradients(*model, single)
            expected = [
                expected[0] + found[0],
                expected[1] + found[1],
                [a + b for a, b in zip(expected[2], found[2], strict=True)],
            ]
    assert number == expected[1] == sum((pack.labels >= 0).sum() for pack in packs)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for one, other in zip(gradients, expected[2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1e-2, np.abs(other).max()))


def test_no_segment_is_divided_and_the_number_of_rows_has_few_values(tmp_path):
    packs = packs_of(tmp_path, np.random.default_rng(0).integers(5, 200, 400).tolist(), 512, 32)
    counts = set()
    for pack in packs:
        arrays = rows_of([pack], 32)
        counts.add(len(arrays["codes"]))
        if len(arrays) == 2:
            continue
        used = arrays["segment_ids"] >= 0
        assert used.sum() == 512 and (arrays["labels"][~used] == -100).all()
        # positions rise by one within a segment and start at 0
        starts = np.diff(arrays["segment_ids"], axis=1, prepend=-2) != 0
        assert (arrays["positions"][starts & used] == 0).all()
        follows = (~starts & used)[:, 1:]
        assert (np.diff(arrays["positions"], axis=1)[follows] == 1).all()
        assert sorted(arrays["codes"][used]) == sorted(pack.input_ids)
    assert counts <= {16, 20, 24, 28, 32}


def write_scenes_job(folder) -> Path:
    """Writes a job in graph mode on the codes of drawn scenes, whose sentences are as long as segments."""
    path = write_job(folder, mode="graph", data__codes="scenes", data__pack_length=128, data__segment_length=64)
    options = ["--num_images", "6", "--size", "32", "--tasks", "rain", "edges", "--pairs_per_line", "2"]
    assert (
        make_data(["delvm-scenes", "--output", str(folder / "scenes"), "--vqgan", str(folder / "vqgan"), *options]) == 0
    )
    return path


@pytest.mark.parametrize("write", [write_job, pytest.param(write_scenes_job, marks=pytest.mark.ci)])
def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(tmp_path, write):
    path = write(tmp_path)
    Trainer(read_job(path)).train()
    whole = losses(tmp_path / "run")
    trainer = Trainer(read_job(path, {"output_dir": str(tmp_path / "other"), "save_every": 2}))
    steps = iter(range(4))

    def stop_after_four(*args, original=trainer.train_step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        original()

    trainer.train_step = stop_after_four
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = Trainer(read_job(path, {"output_dir": str(tmp_path / "other"), "save_every": 2}))
    assert resumed.step == 4
    resumed.train()
    assert losses(tmp_path / "other") == whole and len(whole) == 6
    first, second = (read_tensors(tmp_path / name / "step-6" / "weights.safetensors") for name in ("run", "other"))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_a_run_does_not_resume_with_other_codes(tmp_path):
    path = write_job(tmp_path, schedule__total_steps=3)
    Trainer(read_job(path)).train()
    write_codes(tmp_path / "codes", [32, 64, 50, 17, 96, 31, 20, 64, 45, 128] * 2, seed=1)
    with pytest.raises(UserError, match="index of train.bin"):
        Trainer(read_job(path))


@pytest.mark.parametrize("averages", [False, True])
def test_recomputation_gives_the_same_numbers(tmp_path, averages):
    for recompute in (False, True):
        changes = dict(recompute=recompute, averages_passes=averages, output_dir=str(tmp_path / str(recompute)))
        Trainer(read_job(write_job(tmp_path, schedule__total_steps=2, schedule__warmup_steps=0, **changes))).train()
    np.testing.assert_allclose(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=1e-6)


@pytest.mark.parametrize(("counts", "expected"), [("steps", [0.5, 1.0, 1.0]), ("updates", [0.5, 0.5, 1.0])])
def test_the_rate_advances_with_steps_or_with_updates(tmp_path, counts, expected):
    changes = dict(schedule__counts=counts, schedule__total_steps=3, optimizer__learning_rate=1.0, save_every=2)
    path = write_job(tmp_path, **changes)
    rates = []

    def trainer():
        made = Trainer(read_job(path))

        def run(rate, passes):
            rates.append(rate)
            return Outcome(1.0, 1.0, is_finite=len(rates) > 1, is_overflow=len(rates) == 1)

        made.runner.run = run
        return made

    first = trainer()
    first.metrics = None
    first.data.start(0, None)
    first.train_step()
    first.train_step()
    # the position is part of the checkpoint
    trainer().train()
    assert rates == expected


def test_new_weights_have_the_scales_of_the_original():
    def scale(name, shape=(500, 200)):
        values = initial_values(f"language_model.{name}", shape, 0, norm_weights=frozenset(), rules=delvm.INITIAL_RULES)
        return float(values.std())

    expected = {"embed_tokens.projection.weight": 0.0052, "lm_head.weight": 0.0052}
    for layer, depth in ((0, 2), (11, 24)):
        place = f"layers.{layer}."
        expected |= {f"{place}self_attn.{name}_proj.weight": 0.006 for name in "qkv"}
        expected |= {f"{place}mlp.gate_proj.weight": 0.006, f"{place}mlp.down_proj.weight": 0.0015}
        scaled = ("self_attn.o_proj", "mlp.up_proj", "mlp.fc2")
        expected |= {f"{place}{name}.weight": 0.006 / depth**0.5 for name in scaled} | {f"{place}mlp.fc1.weight": 0.006}
    for name, value in expected.items():
        assert scale(name) == pytest.approx(value, rel=0.02), name
    assert scale("layers.3.self_attn.q_proj.bias", (9,)) == 0


def test_a_checkpoint_is_a_model_folder_and_converts_to_both_forms(tmp_path):
    path = write_job(tmp_path, schedule__total_steps=1, schedule__warmup_steps=0)
    Trainer(read_job(path)).train()
    trained = tmp_path / "run/step-1"
    convert(ConversionRequest(sources=(trained,), target=tmp_path / "hf", to="hf"))
    convert(ConversionRequest(sources=(trained,), target=tmp_path / "shards", to="internlm"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    found = []
    for folder, vqgan in ((trained, None), (tmp_path / "shards", None), (tmp_path / "hf", str(tmp_path / "vqgan"))):
        overrides = {"vqgan": vqgan} if vqgan else {}
        model = load(folder, device="cpu", mode="pynative", cache=False, **overrides)
        found.append(np.asarray(model.complete([picture], [(picture, picture)])[0]))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__pack_length": 100}, "data.pack_length is 100; expected a multiple of data.segment_length, 32"),
        ({"data__batch_size": 0}, "data.batch_size is 0; expected at least 1"),
        ({"data__segment_length": 96}, "data.segment_length is 96 but model.max_length is 64"),
        ({"data__pack_length": 3200}, "codes: no file fills a pack of 3200 codes, the largest has 1094 in sentences"),
        ({"data__batch_size": 40}, "the data fill 11 packs, but a batch has 40"),
        ({"data__codes": "nowhere"}, "nowhere: no such folder"),
        ({"data__codes": "run"}, "run: holds no files of codes, NAME.bin"),
        ({"data__code": "codes"}, "unknown config key 'data.code'; did you mean 'codes'"),
        ({"data": {"registry": "x.yaml", "datasets": "x"}}, "unknown config key 'data.datasets'"),
        ({"data": None, "rendered_text": {}}, "rendered_text has no form for the family 'delvm'"),
        ({"init": {"weights": ["vqgan"]}}, "init.weights have no values for .*language_model"),
        ({"own_sections": {}}, "unknown config key 'own_sections'"),
        ({"model_config": None}, "config key 'model_config' is None; expected text"),
        ({"model_config": ["model.yaml"]}, "config key 'model_config' is .*; expected text"),
        ({"lora": {}}, "lora: no file format holds adapters of the family 'delvm'; remove the section"),
        ({"train": ["^vqgan"]}, "train: '.vqgan' matches only parameters that cannot train"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, changes, message):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=message) as error:
        Trainer(read_job(write_job(tmp_path, **changes)))
    assert "\n" not in str(error.value)


def test_a_random_vqgan_is_a_warning(tmp_path, caplog):
    Trainer(read_job(write_job(tmp_path)))
    assert "never train" not in caplog.text
    Trainer(read_job(write_job(tmp_path, init={}, output_dir=str(tmp_path / "random"))))
    assert "such as vqgan." in caplog.text and "have random values and never train; add the weights" in caplog.text


def test_codes_of_another_vqgan_are_refused(tmp_path):
    path = write_job(tmp_path)
    file = tmp_path / "codes/train.bin"
    text = file.read_text().replace("39", "40")
    file.write_text(text)
    with pytest.raises(UserError, match="has the code 40; .*encode the pictures with the VQGAN of this model"):
        Trainer(read_job(path)).train()


def test_a_family_that_generates_pictures_without_a_way_to_train_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(delvm, "FAMILY", replace(delvm.FAMILY, training=None))
    path = write_job(tmp_path, data={"registry": "x.yaml", "datasets": "x"})
    with pytest.raises(UserError, match="generates pictures; only models that answer can train"):
        read_model(read_job(path).config)
