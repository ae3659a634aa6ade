import json

import numpy as np
import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.augment import AugmentConfig
from mindvlm.training.datasets.config import DatasetsConfig, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker, Skipped
from tests.training.datasets.conftest import conversation


def maker(registry, make_processor, datasets="pages", **config):
    data = DatasetsConfig(registry=str(registry), datasets=datasets, **config)
    return SampleMaker(sample_options(data, make_processor, seed=1, shuffle=False))


def pixels(samples, number):
    return samples.make(number).pictures[0].views[0].high


def test_a_sample_is_its_record(registry, make_processor):
    pages = maker(registry, make_processor)
    sample = pages.make(3)
    assert isinstance(sample, Sample) and (sample.dataset, sample.record) == ("pages", 3)
    processor = make_processor()
    assert processor.tokenizer.decode(sample.labels[sample.labels != -100]) == "page 3<|im_end|>"
    expected = processor.pixels(registry.parent / "页 images" / "页 3.png")
    ((view,),) = [picture.views for picture in sample.pictures]
    np.testing.assert_array_equal(view.high, expected.high)
    np.testing.assert_array_equal(view.clip, expected.clip)
    assert pages.conversation(3)["conversations"][1]["value"] == "page 3"


def test_text_alone_has_no_pixels(registry, make_processor):
    sample = maker(registry, make_processor, "talk").make(0)
    assert sample.pictures == ()


def test_long_samples_end_with_an_answer(registry, make_processor):
    whole = maker(registry, make_processor, "talk").make(0)
    cut = maker(registry, make_processor, "talk", max_length=len(whole.input_ids) - 1).make(0)
    text = make_processor().tokenizer.decode(cut.labels[cut.labels != -100])
    assert text == "yes<|im_end|>" and isinstance(cut, Sample)
    skipped = maker(registry, make_processor, "talk", max_length=20, long_answers="skip").make(0)
    assert isinstance(skipped, Skipped) and "raise data.max_length of 20" in skipped.reason


def test_pictures_of_dropped_turns_are_not_loaded(registry, make_processor):
    record = conversation("<image>", "first", "<image>", "second")
    record["image"] = ["页 1.png", "页 8.png"]
    (registry.parent / "two.json").write_text(json.dumps([record]))
    registry.write_text("two: {images: 页 images, annotations: two.json}\n", encoding="utf-8")
    whole = maker(registry, make_processor, "two").make(0)
    assert isinstance(whole, Skipped) and "页 8.png" in whole.reason
    first = maker(registry, make_processor, "two", max_length=40).make(0)
    assert isinstance(first, Sample) and len(first.pictures) == 1


def test_skips_say_where_and_why(registry, make_processor):
    lines = ['{"conversations": [{"from": "gpt"}]}', "{", json.dumps(conversation("<image>", "x", image="页 1.png"))]
    (registry.parent / "bad.jsonl").write_text('{"first": 1}\n' + "\n".join(lines))
    registry.write_text("bad: {annotations: bad.jsonl}\n")
    bad = maker(registry, make_processor, "bad")
    assert str(bad.make(1)).startswith("data set 'bad', record 1 (line 2): turn 0: expected {'from'")
    assert str(bad.make(2)).startswith("data set 'bad', record 2 (line 3): not JSON (")
    assert "gives the data set no images folder" in str(bad.make(3))


def test_augmentation_depends_on_the_number_alone(registry, make_processor):
    plain = maker(registry, make_processor)
    config = {"augment": AugmentConfig(gaussian_noise=1.0)}
    first, again = (maker(registry, make_processor, **config) for _ in range(2))
    first.make(1)
    np.testing.assert_array_equal(pixels(first, 2), pixels(again, 2))
    assert (pixels(first, 2) != pixels(plain, 2)).any()
    noise = [pixels(first, number) - pixels(plain, number) for number in (0, 40)]
    assert (noise[0] != noise[1]).any(), "another epoch, other noise"


def test_a_picture_that_is_too_large_is_skipped(registry, make_processor, monkeypatch):
    pages = maker(registry, make_processor)
    Image.new("RGB", (300, 300)).save(registry.parent / "页 images" / "页 5.png")
    monkeypatch.setattr(pages.processor, "max_pixels", 80_000)
    assert "the limit is 80000" in pages.make(5).reason


def test_an_unknown_dataset_is_named(registry, make_processor):
    with pytest.raises(UserError, match="did you mean 'pages'"):
        maker(registry, make_processor, "page")
