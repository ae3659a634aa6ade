"""Training batches of pictures in tiles: the loss and the gradients are those of the rows of the asking path."""

import json
from dataclasses import replace
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.models.own_training import text_inputs
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker
from mindvlm.training.step_runner import model_arguments
from tests.models.tinyllava.test_tiles import ANYRES, MERGES, SQUARE, TALL, WIDE
from tests.tiny_tinyllava import write_tiny_tinyllava

RECORDS = [
    (["wide"], ["<image>\nWhat?", "the red cup", "Is it red?", "yes"]),
    ([], ["How many?", "7"]),
    (["tall", "square"], ["<image> or <image>?", "the cup"]),
    (["square"], ["<image>\nWhat?", "a cup"]),
]


def record(images: list[str], turns: list[str]) -> dict:
    speakers = ("human", "gpt") * len(turns)
    pictures = {"image": [f"{name}.png" for name in images]} if images else {}
    turns = [{"from": speaker, "value": value} for speaker, value in zip(speakers, turns, strict=False)]
    return {**pictures, "conversations": turns}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens model, samples and collator for a way to merge."""

    # gradients do not pass through the host
    monkeypatch.setattr("mindvlm.nn.rows.works_on_host", lambda: False)

    def run(merge: str, *, original: bool = False, records=RECORDS, **data):
        folder = write_tiny_tinyllava(tmp_path, **ANYRES, mm_patch_merge_type=merge)
        model = mindvlm.load(folder, mode="pynative", weights="float32")
        model.config.processor.original_parse = original
        for name, image in (("wide", WIDE), ("tall", TALL), ("square", SQUARE)):
            image.save(tmp_path / f"{name}.png")
        (tmp_path / "data.json").write_text(json.dumps([record(*one) for one in records]))
        (tmp_path / "registry.yaml").write_text("mix: {images: ., annotations: data.json}\n")
        registry = str(tmp_path / "registry.yaml")
        config = DatasetsConfig(registry=registry, datasets="mix", batch_size=4, num_workers=0, **data)
        options = sample_options(config, partial(type(model.processor), model.config.processor), seed=0, shuffle=False)
        maker = SampleMaker(options)
        return model, maker, make_collator(config, maker.processor)

    return run


def loss_and_gradients(model, function) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    parameters = model.model.trainable_params()
    (loss, _), gradients = ms.value_and_grad(function, None, parameters, has_aux=True)()
    names = [parameter.name for parameter in parameters]
    return loss.asnumpy(), {name: one.asnumpy() for name, one in zip(names, gradients, strict=True)}


def asked_loss(model, samples: list[Sample], frequencies: Tensor):
    """The summed loss of samples whose pictures pass the path of questions, one sample at a time."""
    cell, total, count = model.model, 0, 0
    for sample in samples:
        rows = [
            cell.picture_rows(cell.encode_images(Tensor(np.stack([v.image for v in one.views]))), one.layout, ())
            for one in sample.pictures
        ]
        features = ops.concat(rows, 0) if rows else ops.zeros((0, 32), ms.float32)
        sources = splice_sources(sample.input_ids[None], len(features), 1, model.engine.placeholder_id)
        embeds = cell.merge(Tensor(sample.input_ids[None]), features, Tensor(sources))
        loss, number = cell.text_loss(embeds, Tensor(sample.labels[None]), frequencies)
        total, count = total + loss, count + number
    return total, count


@pytest.mark.parametrize(("merge", "original"), [*((merge, False) for merge in MERGES), ("spatial_unpad", True)])
def test_the_loss_and_gradients_are_those_of_the_rows_when_asking(opened, merge, original):
    records = [one for one in RECORDS if len(one[0]) < 2] if original else RECORDS
    model, maker, collate = opened(merge, original=original, records=records)
    samples = [maker.make(number) for number in range(len(records))]
    batch = collate(samples)
    # 3 views of the wide picture, 3 of the tall one and 5 of each square one, in slots by 4
    assert len(batch.pixels["image"]) == (8 if original else 16)
    assert sum(len(one.pictures) for one in samples) == (2 if original else 4) and batch.choices is None
    model.model.set_train()
    decoder = model.config.model.language_model
    frequencies = Tensor(inverse_frequencies(decoder.rotary_dim, decoder.rope_theta))
    inputs = text_inputs(batch.input_ids, batch.labels, batch.sources, tuple(batch.pixels.values()), 0, [])
    arguments = model_arguments(inputs, frequencies, ms.float32)
    loss, gradients = loss_and_gradients(model, lambda: model.model(*arguments))
    expected, of_rows = loss_and_gradients(model, lambda: asked_loss(model, samples, frequencies))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert gradients.keys() == of_rows.keys() and any("mm_projector" in name for name in gradients)
    assert ("image_newline" in gradients) == (merge == "spatial_unpad")
    for name, array in of_rows.items():
        assert array.any(), name
        np.testing.assert_allclose(gradients[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


def test_the_turns_that_fit_depend_on_the_size_of_the_picture(opened):
    turns = ["<image>\nWhat?", "the red cup", "Is it red?", "yes"]
    _, whole, _ = opened("flat", records=[(["wide"], turns), (["square"], turns)])
    longest = len(whole.make(0).input_ids)
    maker = SampleMaker(replace(whole.options, max_length=longest))
    wide, square = (maker.make(number) for number in (0, 1))
    # two views less
    assert len(whole.make(1).input_ids) == longest + 2 * 4
    assert len(wide.input_ids) == longest and len(square.input_ids) < longest


def test_turns_are_dropped_with_their_pictures(opened):
    turns = ["<image>\nWhat?", "the red cup", "And <image>?", "yes"]
    _, whole, _ = opened("flat", records=[(["wide", "square"], turns)])
    maker = SampleMaker(replace(whole.options, max_length=len(whole.make(0).input_ids) - 1))
    (picture,) = maker.make(0).pictures
    assert len(whole.make(0).pictures) == 2 and len(picture.layout) == 3 * 4


def test_a_picture_that_does_not_fit_is_skipped(opened):
    _, maker, _ = opened("flat", max_length=20)
    assert "raise data.max_length of 20" in maker.make(0).reason


def test_each_kind_of_view_has_its_slots(opened):
    _, _, collate = opened("flat", image_slots=[6])
    assert collate.image_slots == (6,)
    with pytest.raises(UserError, match=r"data.image_slots is \[6, 2\], but the model has 1 view kind; give one"):
        opened("flat", image_slots=[6, 2])
