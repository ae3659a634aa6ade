"""LLaVA's JSON through the data layer: records to batches with a TinyLLaVA processor."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from mindvlm.models.tinyllava.processor import TinyLlavaProcessor, TinyLlavaProcessorConfig, siglip_branch
from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.samples import SampleMaker
from tests.processing.text.small_pieces import write_piece_files
from tests.training.datasets.opened_loader import open_loader

RECORDS = [
    {"id": "0", "image": "a.png", "conversations": [("human", "<image>\nWhat?"), ("gpt", "the red cup")]},
    {"id": "1", "conversations": [("human", "How many?"), ("gpt", "7")]},
    {"id": "2", "image": "b.png", "conversations": [("gpt", "hi"), ("human", "Is <image> red?"), ("gpt", "yes")]},
    {"id": "3", "conversations": [("human", "a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "the red cup")]},
]


@pytest.fixture
def config(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{name}.png")
    records = [
        {**one, "conversations": [{"from": speaker, "value": value} for speaker, value in one["conversations"]]}
        for one in RECORDS
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    (tmp_path / "registry.yaml").write_text("mix: {images: ., annotations: llava.json, format: llava}\n")
    return DatasetsConfig(registry=str(tmp_path / "registry.yaml"), datasets="mix", batch_size=4, num_workers=0)


@pytest.fixture
def make_processor(tmp_path):
    def make(**options):
        tokenizer = str(write_piece_files(tmp_path / "llama"))
        settings = {"template": "v1", "num_image_tokens": 4, "image": siglip_branch(6)} | options
        return partial(TinyLlavaProcessor, TinyLlavaProcessorConfig(tokenizer=tokenizer, **settings))

    return make


def test_pictures_take_the_places_of_their_placeholders(config, make_processor):
    make = make_processor()
    maker = SampleMaker(sample_options(config, make, seed=0, shuffle=False))
    samples = [maker.make(number) for number in range(3)]
    batch = make_collator(config, make())(samples)
    assert batch.pixels["image"].shape == (4, 3, 6, 6)
    assert batch.input_ids.min() >= 0, "a placeholder has no embedding"
    rows, columns = np.nonzero(batch.sources >= batch.input_ids.size)
    assert rows.tolist() == [0] * 4 + [2] * 4
    assert batch.sources[rows, columns].tolist() == [batch.input_ids.size + row for row in range(8)]
    assert (batch.labels[rows, columns] == -100).all()
    learned = batch.labels[2][batch.labels[2] != -100]
    assert make().tokenizer.decode_bytes(learned) == b" yes</s>"


def test_both_ways_to_samples_give_the_same_batches(config, make_processor):
    ours, original = (
        open_loader(config, make_processor(original_parse=original), seed=4).take() for original in (False, True)
    )
    for name in ("input_ids", "labels", "sources"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(original, name))


def test_long_samples_are_cut_by_the_rule_of_the_processor(config, make_processor):
    make = make_processor(original_parse=True)
    whole = SampleMaker(sample_options(config, make, seed=0, shuffle=False)).make(3)
    config.max_length = len(whole.input_ids) - 2
    cut = SampleMaker(sample_options(config, make, seed=0, shuffle=False)).make(3)
    assert (cut.labels == whole.labels[:-2]).all()
    # without that rule a sample ends with an answer
    ours = SampleMaker(sample_options(config, make_processor(), seed=0, shuffle=False)).make(3)
    assert len(ours.input_ids) < config.max_length and ours.labels[-1] == 2


def test_captions_need_no_marker(config, make_processor, tmp_path):
    record = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": "x"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps([record]))
    (tmp_path / "registry.yaml").write_text("mix: {images: ., annotations: captions.json}\n")
    maker = SampleMaker(sample_options(config, make_processor(template="plain"), seed=0))
    sample = maker.make(0)
    assert len(sample.pictures) == 1 and (sample.input_ids == -200).sum() == 4
