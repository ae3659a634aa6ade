"""The training of a VQGAN: pictures in an order, resume, evaluation, and what is refused."""

from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from PIL import Image

from mindvlm import load
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext
from mindvlm.models.delvm.config import parse_config
from mindvlm.models.delvm.picture_codes import PictureEncoder
from mindvlm.models.delvm.picture_data import PictureData, PicturesConfig
from mindvlm.models.delvm.scenes import draw_pair
from mindvlm.models.delvm.training import make_trained
from mindvlm.training.datasets.loader import Share
from mindvlm.training.job_file import lay_over, read_job, set_dotted
from mindvlm.training.trainer import Trainer
from tests.tiny_delvm import VQGAN
from tests.training.delvm_job import MODEL
from tests.training.small_job import losses, read_tensors

SIZES = {**{key: value for key, value in VQGAN.items() if not key.startswith("_")}, "num_groups": 16}


def write_pictures(folder: Path, count: int = 11) -> Path:
    for number in range(count):
        place = folder / ("a" if number % 2 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        draw_pair("rain", number, seed=0, size=16)[number % 2].save(place / f"{number}.png")
    return folder


def write_job(folder: Path, **changes) -> Path:
    """Writes model, pictures and job; a change is named by its key, with "__" between sections."""
    write_pictures(folder / "pictures")
    (folder / "model.yaml").write_text(yaml.safe_dump({"family": "delvm", "name": "tiny", "model": {"vqgan": SIZES}}))
    job = {
        "model_config": "model.yaml",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "mode": "pynative",
        "data": {"pictures": "pictures", "batch_size": 2, "flip": True, "min_crop": 0.7},
        "evaluation": {"pictures": "pictures", "num_pictures": 5, "batch_size": 2},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"total_steps": 6, "warmup_steps": 1},
        "log_every": 1,
        "save_every": 3,
        "evaluate_every": 6,
    }
    for key, value in changes.items():
        set_dotted(job, key.replace("__", "."), value)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(lay_over({}, job)))
    return path


def pictures_of(folder: Path, share: Share | None = None, *, step: int = 0, **options) -> PictureData:
    config = PicturesConfig(pictures=str(folder), **{"batch_size": 2, **options})
    model = parse_config({"family": "delvm", "name": "tiny", "model": {"vqgan": SIZES}}, folder / "model.yaml")
    data = PictureData(config, model, seed=5, share=share or Share())
    data.start(step, None)
    return data


def test_an_epoch_has_every_picture_and_any_step_can_be_the_first(tmp_path):
    write_pictures(tmp_path, 12)
    data = pictures_of(tmp_path, flip=True, min_crop=0.5)
    steps = [data.take() for _ in range(12)]
    for epoch in (steps[:6], steps[6:]):
        assert len({origin for (one,) in epoch for origin in one.origins}) == 12
    assert [one.origins for (one,) in steps[:6]] != [one.origins for (one,) in steps[6:]]
    later = pictures_of(tmp_path, step=7, flip=True, min_crop=0.5)
    for (one,), (other,) in zip(steps[7:], [later.take() for _ in range(5)], strict=True):
        assert one.origins == other.origins and (one.arrays["pixels"] == other.arrays["pixels"]).all()
    # both replicas together read what one process reads
    shares = [Share(shard=shard, num_shards=2, num_passes=3) for shard in range(2)]
    replicas = [pictures_of(tmp_path, share, batch_size=1) for share in shares]
    origins = [origin for replica in replicas for one in replica.take() for origin in one.origins]
    assert origins == [origin for (one,) in steps[:3] for origin in one.origins]
    for one in (data, later, *replicas):
        one.close()


def test_an_unreadable_picture_is_counted_and_replaced(tmp_path, caplog):
    write_pictures(tmp_path, 4)
    broken = tmp_path / "b/c/0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = pictures_of(tmp_path, batch_size=4)
    (one,) = data.take()
    assert data.num_skipped == 1 and str(broken) in caplog.text and np.isfinite(one.arrays["pixels"]).all()
    data.close()


def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(tmp_path):
    path = write_job(tmp_path)
    Trainer(read_job(path)).train()
    whole = losses(tmp_path / "run")
    assert len(whole) == 6 and whole[-1][1] < whole[0][1] / 2
    trainer = Trainer(read_job(path, {"output_dir": str(tmp_path / "other")}))
    steps = iter(range(4))

    def stop_after_four(*args, original=trainer.train_step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        original()

    trainer.train_step = stop_after_four
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    Trainer(read_job(path, {"output_dir": str(tmp_path / "other")})).train()
    assert losses(tmp_path / "other") == whole
    first, second = (read_tensors(tmp_path / name / "step-6/weights.safetensors") for name in ("run", "other"))
    assert all((first[name] == second[name]).all() for name in first)

    # the folder of a checkpoint is a VQGAN, and evaluation says how well it reproduces pictures
    encoder = PictureEncoder(tmp_path / "run/step-6")
    assert encoder(sorted((tmp_path / "pictures").rglob("*.png"))[:2]).shape == (2, 16)
    records = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"val_mse"' in records and '"val_codes"' in records and '"loss_usage"' in records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__pictures": "nowhere"}, "nowhere: is no folder; give a folder of pictures"),
        ({"data__pictures": "empty"}, "empty: holds no pictures .*; give another folder"),
        ({"data__batch_size": 12}, "holds 11 pictures but a step takes 12; lower data.batch_size"),
        ({"data__size": 16}, "data.size is 16 but model.vqgan.resolution 8"),
        ({"data__min_crop": 0}, "data.min_crop is 0.0; expected a number above 0, up to 1"),
        ({"data": {"codes": "pictures"}, "evaluation": None}, "a VQGAN alone, which trains on data.pictures; set"),
        ({"evaluation__pictures": "empty"}, "empty: holds no pictures"),
        ({"vqgan_loss": {"reconstruction": "l3"}}, "vqgan_loss.reconstruction"),
        ({"vqgan_loss": {"usage_weight": float("nan")}}, "vqgan_loss.usage_weight is nan; expected at least 0"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        Trainer(read_job(write_job(tmp_path, **changes)))


def test_a_decoder_does_not_train_on_pictures(tmp_path):
    path = write_job(tmp_path)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    with pytest.raises(UserError, match="a decoder, which trains on data.codes"):
        Trainer(replace(read_job(path)))


def test_half_precision_is_refused():
    config = parse_config({"family": "delvm", "name": "x", "model": {"vqgan": SIZES}}, "m.yaml")
    with pytest.raises(UserError, match="dtype is float16, but a VQGAN trains in float32"):
        make_trained(None, config, {}, BuildContext(dtype=ms.float16))


def test_groups_of_a_norm_divide_the_channels():
    with pytest.raises(UserError, match="hidden_channels is 32; expected a multiple of num_groups, 5"):
        parse_config({"family": "delvm", "name": "x", "model": {"vqgan": {**SIZES, "num_groups": 5}}}, "m.yaml")


def test_a_vqgan_alone_generates_nothing(tmp_path):
    write_job(tmp_path)
    with pytest.raises(UserError, match="describes no language_model, without which nothing is generated"):
        load(tmp_path / "model.yaml", checkpoint="x.safetensors")


def test_pictures_of_any_mode_are_read(tmp_path):
    for number, mode in enumerate(("L", "RGBA", "CMYK", "P")):
        Image.new(mode, (20 + number, 31)).save(tmp_path / f"{number}.{'tif' if mode == 'CMYK' else 'png'}")
    data = pictures_of(tmp_path, batch_size=4, flip=True, min_crop=0.4)
    (one,) = data.take()
    assert one.arrays["pixels"].shape == (4, 3, 8, 8) and data.num_skipped == 0
    data.close()
