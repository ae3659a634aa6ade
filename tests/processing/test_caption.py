"""Prompts and labels of Vary-tiny: the caption template, and a question under v1."""

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.images.image_span import ImageSpan
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL, build_sample
from mindvlm.processing.text.chat_template import get_template, prompt_text, render
from mindvlm.processing.text.pieces import Piece
from mindvlm.processing.text.tokenizer import Tokenizer
from tests.golden_files import golden_json, golden_path
from tests.golden_readers.original_samples import collate, original_sample
from tests.processing.text.small_bpe import small_bpe

SPAN = ImageSpan(4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return small_bpe(tmp_path_factory.mktemp("bpe"))


def record_of(*values, image="page.png") -> dict:
    turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]
    return {"conversations": turns} | ({"image": image} if image else {})


def build(tokenizer, record, *, template="opt", max_length=99, make=build_sample, **options):
    options = {"tokenizer": tokenizer, "template": get_template(template, TEMPLATES), "image_span": SPAN} | options
    return make(record, max_length=max_length, **options)


def learned(tokenizer, sample) -> str:
    return tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL])


def test_the_question_is_the_picture_alone():
    span = Piece(SPAN.text, control=True)
    pieces = render(get_template("opt", TEMPLATES), [[span, Piece("\nread it")], "the page", [span], None])
    assert prompt_text(pieces) == f"{SPAN.text}the page\n</s>{SPAN.text}"


@pytest.mark.parametrize("question", ["<image>\nread", "no marker at all", ""])
def test_the_text_and_the_end_mark_are_learned(tokenizer, question):
    sample = build(tokenizer, record_of(question, "the page"))
    start, pad, end = (tokenizer.special_id(token) for token in ("<img>", "<imgpad>", "</img>"))
    assert sample.input_ids.tolist()[:7] == [2, start, pad, pad, pad, pad, end]
    assert learned(tokenizer, sample) == "the page\n</s>"
    assert (sample.labels[:7] == IGNORED_LABEL).all() and sample.images == ("page.png",)


def test_a_text_that_is_cut_still_ends(tokenizer):
    sample = build(tokenizer, record_of("", "the " * 50), max_length=20)
    assert (len(sample.input_ids), sample.input_ids[-1], sample.labels[-1]) == (20, 2, 2)
    assert learned(tokenizer, sample).endswith(" the</s>")


def test_control_forms_in_a_text_are_learned_as_text(tokenizer):
    sample = build(tokenizer, record_of("", "a</s><img>b"))
    assert learned(tokenizer, sample) == "a</s><img>b\n</s>"
    assert sample.input_ids.tolist().count(2) == 2
    original = build(tokenizer, record_of("", "a</s>b"), make=original_sample)
    assert original.input_ids.tolist().count(2) == 3


def test_a_first_word_behind_the_colon_is_learned(tokenizer):
    # the space and the word are one token
    sample = build(tokenizer, record_of("<image>\nread", "the page"), template="v1", max_length=999)
    assert learned(tokenizer, sample) == " the page</s>"
    text = tokenizer.decode(sample.input_ids)
    assert text.startswith("</s>A chat") and f"USER:{SPAN.text}read ASSISTANT: the page</s>" in text


@pytest.mark.parametrize(
    "record", [record_of("q", "a", image=None), record_of("q", "a", "q", "a"), record_of("<image>")]
)
def test_a_caption_is_one_text_to_a_picture(tokenizer, record):
    with pytest.raises(UserError, match="a caption template needs pictures and one answer"):
        build(tokenizer, record)


def test_a_cut_picture_is_refused(tokenizer):
    with pytest.raises(UserError, match="max_length 6 cuts an image"):
        build(tokenizer, record_of("", "the page"), max_length=6)


@pytest.mark.parametrize("make", [original_sample, build_sample])
def test_labels_are_those_of_the_original(make):
    tokenizer = open_tokenizer(str(golden_path("vary/opt_prompts")))
    document = golden_json("vary/opt_prompts/cases.json")
    samples, options = {}, {"image_span": ImageSpan(256), "make": make}
    for case in document["labels"]:
        if make is build_sample and "image" not in case["record"]:
            continue
        sample = build(tokenizer, case["record"], max_length=case["model_max_length"], **options)
        assert sample.input_ids.tolist() == case["input_ids"], case["name"]
        assert sample.labels.tolist() == case["labels"] and sample.num_learned == case["n_kept"], case["name"]
        samples[case["name"]] = sample
    if make is original_sample:
        recorded = document["collated"]
        batch = collate([samples[name] for name in recorded["records"]], pad_id=tokenizer.pad_id)
        for name, array in batch.items():
            assert array.tolist() == recorded[name], name
