"""SMR as the trainer reads it: records of `mindvlm-make-data slime-*`, and the published files with their quirks."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindvlm.core.config import read_yaml
from mindvlm.core.errors import UserError
from mindvlm.models.slime.processor import SlimeProcessor, SlimeProcessorConfig
from mindvlm.models.slime.public_data import PUBLIC_DATA
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.tools import make_data
from mindvlm.training.datasets.config import DatasetsConfig, sample_options
from mindvlm.training.datasets.inspection import inspect_data
from mindvlm.training.datasets.registry import read_registry
from mindvlm.training.datasets.samples import SampleMaker, Skipped
from tests.golden_files import golden_path
from tests.models.slime.test_public_data import EXPECTED, write_download

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "slime"
TEMPLATES = {"v1": ("tokenizer_v1", "</s>"), "llama3": ("tokenizer_l3", "<|eot_id|>")}


def open_data(root: Path, names: str, template: str, *, registry: str = "registry.yaml"):
    tokenizer = golden_path(f"slime/templates/{TEMPLATES[template][0]}")
    processor_config = SlimeProcessorConfig(tokenizer=str(tokenizer), template=template)
    config = DatasetsConfig(registry=str(root / registry), datasets=names, max_length=4096)
    options = sample_options(config, partial(SlimeProcessor, processor_config), seed=0, shuffle=False)
    return SampleMaker(options)


@pytest.fixture(scope="module")
def made_root(tmp_path_factory):
    """A folder with the records of all sources."""
    folder = tmp_path_factory.mktemp("smr")
    for name in PUBLIC_DATA:
        download = write_download(folder / "downloads" / name, name)
        command = [f"slime-{name}", "--source", str(download), "--output", str(folder / "root")]
        assert make_data.main(command) == 0
    shutil.rmtree(folder / "downloads")
    return folder / "root"


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_of_all_sources_are_learned(made_root, template):
    maker = open_data(made_root, "+".join(PUBLIC_DATA), template)
    processor, end = maker.processor, TEMPLATES[template][1]
    expected = [(image, *texts) for records in EXPECTED.values() for _, image, *texts in records]
    assert maker.options.mixture.epoch_size == len(expected)
    for number, (image, question, answer) in enumerate(expected):
        sample = maker.make(number)
        is_learned = sample.labels != IGNORED_LABEL
        learned = processor.tokenizer.decode_bytes(sample.labels[is_learned]).decode()
        shown = processor.tokenizer.decode_bytes(sample.input_ids[~is_learned & (sample.input_ids >= 0)]).decode()
        assert learned.strip() == f"{answer}{end}"
        assert question.removeprefix("<image>\n") in shown
        assert len(sample.pictures) == bool(image)
        if image:
            (seen,), read = sample.pictures, processor.picture(str(made_root / image))
            for one, other in zip(seen.views, read.views, strict=True):
                ((branch, array),) = vars(other).items()
                np.testing.assert_array_equal(getattr(one, branch), array)


@pytest.mark.parametrize("template", TEMPLATES)
def test_inspection_finds_nothing_wrong(made_root, template):
    maker = open_data(made_root, "+".join(PUBLIC_DATA), template)
    said = inspect_data(maker.options, maker.processor, stops=True)
    for name, records in EXPECTED.items():
        count = len(records)
        assert (
            f"data set {name!r}: {count} of {count} records looked at: {count} can be used, {count} have labels" in said
        )


def write_published(root: Path) -> None:
    """Writes SMR.json and ShareGPT4V's file as published, and the images that the first one names, with gaps."""

    def record(id: str, image: object = None) -> dict:
        named = {} if image is None else {"image": image}
        mark = "<image>\n" if image else ""
        turns = [{"from": "human", "value": f"{mark}Question {id}?"}, {"from": "gpt", "value": f"answer {id}"}]
        return {"id": id, **named, "conversations": turns}

    places = {
        "scienceqa": "scienceqa/12.jpg",
        "arxivqa": "arxivqa/images/2211.02201_2.jpg",
        "ai2d": "ai2d/images/1.png",
    }
    smr = [record(name, place) for name, place in places.items()]
    smr += [record("text"), record("null", ""), record("tqa", "GeoQA3/train/question_images/earth_1.png")]
    smr += [record("absolute", "/mnt/data/playground/data/DVQA/images/bar_train_00000001.png")]
    smr += [record("prefix", "playground/data/tabmwp/1.png"), record("url", "https://host/scienceqa/1.jpg")]
    (root / "data").mkdir(parents=True)
    (root / "data" / "SMR.json").write_text(json.dumps(smr))
    (root / "data" / "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json").write_text(
        json.dumps([record("coco", "coco/train2017/1.jpg"), record("share")])
    )
    for place in (*places.values(), "coco/train2017/1.jpg"):
        (root / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / "data" / place)
    shutil.copy(CONFIGS / "datasets.yaml", root)


def test_the_published_files_are_read_and_missing_images_named(tmp_path):
    write_published(tmp_path)
    maker = open_data(tmp_path, "sharegpt4v_mix665k+smr", "v1", registry="datasets.yaml")
    assert maker.options.mixture.epoch_size == 11
    samples = [maker.make(number) for number in range(7)]
    assert [len(sample.pictures) for sample in samples] == [1, 0, 1, 1, 1, 0, 0]
    said = "\n".join(inspect_data(maker.options, maker.processor, stops=True))
    assert "data set 'sharegpt4v_mix665k': 2 of 2 records looked at: 2 can be used, 2 have labels" in said
    assert "data set 'smr': 9 of 9 records looked at: 5 can be used, 5 have labels" in said
    missing = tmp_path.resolve() / "data" / "GeoQA3/train/question_images/earth_1.png"
    assert "data set 'smr': 4 of 9 records cannot be used; the first is record 5 (line 1): " in said
    assert f"{missing}: no such file" in said
    # in a run each of them is skipped with its reason
    for number, part in (
        (7, str(missing)),
        (8, "image /mnt/data/playground/data/DVQA/images/bar_train_00000001.png: no such file"),
        (9, f"{tmp_path.resolve()}/data/playground/data/tabmwp/1.png: no such file"),
        (10, "https://host/scienceqa/1.jpg: a URL; download the picture first"),
    ):
        skipped = maker.make(number)
        assert isinstance(skipped, Skipped) and skipped.dataset == "smr" and part in skipped.reason


def test_a_data_set_without_its_images_is_refused(tmp_path):
    write_published(tmp_path)
    shutil.rmtree(tmp_path / "data" / "scienceqa")
    maker = open_data(tmp_path, "smr", "v1", registry="datasets.yaml")
    with pytest.raises(
        UserError, match=r"data set 'smr': 5 of 9 records cannot be used; the first is record 0 .*12.jpg"
    ):
        inspect_data(maker.options, maker.processor, stops=True)


def test_the_registry_lists_the_published_files_and_all_sources():
    registry = read_registry(CONFIGS / "datasets.yaml")
    assert registry.keys() == {"llava_pretrain", "sharegpt4v_mix665k", "smr", *PUBLIC_DATA}
    for name in PUBLIC_DATA:
        assert registry[name].annotations == str(CONFIGS / "data" / f"{name}.json")
        assert registry[name].images == str(CONFIGS / "data")
    for job in CONFIGS.glob("train_*.yaml"):
        names = read_yaml(job).get("data", {}).get("datasets", "")
        assert set(filter(None, names.split("+"))) <= registry.keys(), job
