"""Messages and errors before the first step."""

import json
import logging
import re
from dataclasses import replace

import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.processor import TinyLlavaProcessor, TinyLlavaProcessorConfig, siglip_branch
from mindvlm.models.tinyllava.templates import TEMPLATES
from mindvlm.training.data import AnnotatedData
from mindvlm.training.datasets import inspection
from mindvlm.training.datasets.config import DatasetsConfig
from mindvlm.training.datasets.loader import Share
from tests.processing.text.small_pieces import write_piece_files
from tests.training.datasets.conftest import conversation

PICTURE = conversation("<image>\nWhat?", "the red cup", image="a.png")
TEXT = conversation("How many?", "7")


@pytest.fixture
def look(tmp_path, caplog):
    """Opens data of these records for a TinyLLaVA; returns what was logged."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    tokenizer = str(write_piece_files(tmp_path / "llama"))

    def open_data(records, *, format="llava", inspection="stop", **options) -> str:
        (tmp_path / "a.json").write_text(json.dumps(records))
        (tmp_path / "registry.yaml").write_text(f"mix: {{images: ., annotations: a.json, format: {format}}}\n")
        config = DatasetsConfig(
            registry=str(tmp_path / "registry.yaml"), datasets="mix", num_workers=0, inspection=inspection
        )
        settings = {"template": "v1", "num_image_tokens": 4, "image": siglip_branch(6)} | options
        processor_config = TinyLlavaProcessorConfig(tokenizer=tokenizer, **settings)
        data = AnnotatedData(config, TinyLlavaProcessor, processor_config, seed=0, share=Share(), skip_list=None)
        with caplog.at_level(logging.INFO, "mindvlm"):
            caplog.clear()
            data.start(0, None)
        data.close()
        return caplog.text

    return open_data


def test_the_first_sample_and_the_shares_are_said(look):
    said = look([PICTURE, TEXT])
    assert r"USER: <image>x4 \nWhat? ASSISTANT:[[ the red cup</s>]]" in said
    assert "data set 'mix': 2 of 2 records looked at: 2 can be used, 2 have labels" in said


@pytest.mark.parametrize(
    ("records", "options", "expected"),
    [
        (
            [conversation("What?", "x", image="a.png"), PICTURE, PICTURE],
            {},
            "1 of 3 records lose their picture: no question marks its place; the first is record 0 \\(line 1\\)",
        ),
        (
            [conversation("What is <image>?", "x"), TEXT, TEXT],
            {},
            "1 of 3 records have an image mark in a sentence but name no picture, so the mark is text; .* record 0",
        ),
        (
            [conversation("What?\n<image>", "x"), TEXT, TEXT],
            {},
            "1 of 3 records mark a picture but name none, so the mark is text; the first is record 0",
        ),
        ([PICTURE, {**PICTURE, "video": "v.mp4"}], {}, "1 of 2 records cannot be used; .*: 'video' is 'v.mp4'"),
        (
            [PICTURE, {**PICTURE, "image": "b.png"}],
            {},
            "1 of 2 records cannot be used; .*: image .*b.png: no such file",
        ),
        ([{**PICTURE, "system": "Be brief."}], {"template": "plain"}, "1 of 1 records lose their system message"),
        ([{**PICTURE, "system": "Be brief."}], {"original_parse": True}, "1 of 1 records lose their system message"),
    ],
)
def test_losses_of_few_records_are_said(look, records, options, expected):
    said = look(records, **options)
    assert re.search(expected, said), said


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([conversation("What?", "x", image="a.png")] * 2 + [PICTURE], {}, "2 of 3 records lose their picture"),
        ([conversation("<image>\nWhat?", "x")] * 2 + [TEXT], {}, "2 of 3 records mark a picture but name none"),
        ([{**PICTURE, "image": "b.png"}] * 2 + [TEXT], {}, "2 of 3 records cannot be used; .*b.png: no such file"),
        (
            [PICTURE],
            {"template": "phi"},
            r"template 'phi' closes an answer with '<\|endoftext\|>', which is not one token .* but \d+, "
            r".*; set model_changes.processor.template to one that fits \(v1, vicuna_v1, ",
        ),
        ([PICTURE], {"template": "mpt"}, r"template 'mpt' closes an answer with '<\|im_end\|>'"),
    ],
)
def test_what_would_learn_nothing_stops(look, records, options, message):
    with pytest.raises(UserError, match=f"{message}.*, or train (anyway|on the others) with data.inspection: warn$"):
        look(records, **options)
    assert re.search(message.split("; set")[0], look(records, **options, inspection="warn"))


def test_data_of_which_nothing_can_be_used_has_no_override(look):
    with pytest.raises(UserError, match="1 of 1 records cannot be used; .*; correct the data or the registry$"):
        look([{**PICTURE, "image": "b.png"}])


@pytest.mark.parametrize("text", ["Fix it:\n<html>\n<img>\n</html>", "<svg>\n<image>\n</svg>\nWhat is it?"])
def test_marks_within_code_are_text(look, text):
    assert "3 can be used" in look([conversation(text, "x")] * 3)


@pytest.mark.parametrize("format", ["llava", "vary"])
def test_marks_in_sentences_are_text_in_any_number_of_records(look, format):
    said = look([conversation("In HTML, what does <image> mean?", "x")] * 4, format=format)
    assert "4 of 4 records have an image mark in a sentence" in said and "what does <image> mean?" in said


def test_samples_cut_before_their_answer_are_not_a_fault_of_the_template(look):
    long = conversation("very long question " * 400, "x")
    with pytest.raises(UserError, match="2 of 3 records are cut before their answer, .*; raise data.max_length, or"):
        look([long, TEXT, long], original_parse=True)


def test_an_original_rule_without_labels_stops(look, monkeypatch):
    # the template fits, but its rule finds no answer
    odd = replace(TEMPLATES["v1"], label_rule=replace(TEMPLATES["v1"].label_rule, header="A: "))
    monkeypatch.setitem(TEMPLATES, "v1", odd)
    with pytest.raises(UserError, match="2 of 2 records have no label, .*tokenization mismatch.*choose the template"):
        look([PICTURE, TEXT], original_parse=True)


def test_a_mark_of_ordinary_characters_fits(look):
    look([PICTURE], template="v0")


def test_several_pictures_of_one_question_are_skipped_by_an_original_rule(look):
    record = {**conversation("<image><image>\nWhat?", "x"), "images": ["a.png", "a.png"]}
    look([record])
    with pytest.raises(UserError, match="2 pictures, but the template shows 1"):
        look([record], original_parse=True)


def test_a_sample_of_a_large_data_set_is_spread_over_its_file(look, monkeypatch):
    monkeypatch.setattr(inspection, "NUM_RECORDS", 10)
    said = look([*[TEXT] * 35, *[conversation("What?", "x", image="a.png")] * 8])
    assert "9 of 43 records looked at: 9 can be used" in said
    assert "2 of 9 records lose their picture: no question marks its place; the first is record 35 (line" in said
