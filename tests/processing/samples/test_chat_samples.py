import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.images.image_span import ImageSpan
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL, build_sample
from mindvlm.processing.text.chat_template import get_template
from mindvlm.processing.text.tokenizer import Tokenizer
from tests.golden_files import golden_json, golden_path
from tests.golden_readers.original_samples import collate, original_sample
from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()
SPAN = ImageSpan(4)


def record_of(*values, image=None) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns} | ({"image": image} if image else {})


def build(record, *, make=build_sample, **options):
    options = {
        "tokenizer": TOKENIZER,
        "template": get_template("mpt", TEMPLATES),
        "image_span": SPAN,
        "max_length": 999,
    } | options
    return make(record, **options)


def learned_text(sample) -> str:
    return TOKENIZER.decode(sample.labels[sample.labels != IGNORED_LABEL])


def test_answers_and_their_closing_mark_are_learned():
    sample = build(record_of("<image>\nWhat?", "the page", "And?", "more", image="page.png"))
    assert learned_text(sample) == "the page<|im_end|>more<|im_end|>"
    assert sample.images == ("page.png",)
    assert sample.warning == "" and sample.num_learned == int((sample.labels != IGNORED_LABEL).sum())
    kept = sample.labels != IGNORED_LABEL
    assert (sample.labels[kept] == sample.input_ids[kept]).all()


def test_the_marker_becomes_start_placeholders_end():
    ids = build(record_of("<image>\nWhat?", "x", image="page.png")).input_ids.tolist()
    start = ids.index(TOKENIZER.special_id("<img>"))
    assert ids[start + 1 : start + 5] == [TOKENIZER.special_id("<imgpad>")] * 4
    assert ids[start + 5] == TOKENIZER.special_id("</img>")


ordinary = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=20)


@given(st.lists(ordinary, min_size=2, max_size=6).filter(lambda values: len(values) % 2 == 0), st.integers(20, 200))
def test_both_label_rules_agree_on_ordinary_text(values, max_length):
    ours = build(record_of(*values), max_length=max_length)
    original = build(record_of(*values), max_length=max_length, make=original_sample)
    assert ours.input_ids.tolist() == original.input_ids.tolist()
    assert ours.labels.tolist() == original.labels.tolist()


def test_special_forms_in_an_answer_are_learned_as_text():
    sample = build(record_of("say it", "stop<|im_end|>here"))
    assert learned_text(sample) == "stop<|im_end|>here<|im_end|>"
    assert sample.input_ids.tolist().count(TOKENIZER.special_id("<|im_end|>")) == 3
    original = build(record_of("say it", "stop<|im_end|>here"), make=original_sample)
    assert original.num_learned == 0 and original.warning.startswith("WARNING: tokenization mismatch")


def test_an_empty_answer_teaches_to_stop():
    assert learned_text(build(record_of("nothing?", ""))) == "<|im_end|>"
    assert build(record_of("nothing?", ""), make=original_sample).num_learned == 0


def test_a_bare_list_and_a_leading_answer_are_accepted():
    turns = [{"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": 42}]
    assert learned_text(build(turns)) == "42<|im_end|>"


def test_a_marker_in_text_without_image_is_text():
    sample = build(record_of("what is the <image> tag?", "html"))
    assert TOKENIZER.special_id("<img>") not in sample.input_ids
    assert "<image>" in TOKENIZER.decode(sample.input_ids)


def test_nothing_learned_is_said():
    assert "the sample is not learned" in build(record_of("unanswered")).warning


def test_the_image_moves_to_the_front():
    sample = build(record_of("read <image>", "x", image="page.png"), image_in_front=True)
    text = TOKENIZER.decode(sample.input_ids)
    assert "</img><|im_end|><|im_start|>user\n: read<|im_end|>" in text
    assert learned_text(sample) == "x<|im_end|>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "non-empty list 'conversations'"),
        ([], "non-empty list 'conversations'"),
        ([{"from": "human"}], "turn 0"),
        ([{"from": "bot", "value": "x"}], "turn 0"),
        ([{"from": "human", "value": "x"}, {"from": "human", "value": "x"}], "must alternate"),
        ([{"from": "gpt", "value": "x"}], "no turn of 'human'"),
        (record_of("no marker", "x", image="a.png"), "1 image, but 0 <image> markers"),
        (record_of("<image><image>", "x", image="a.png"), "1 image, but 2 <image> markers"),
    ],
)
def test_malformed_records_are_named(record, message):
    with pytest.raises(UserError, match=message):
        build(record)


def test_a_cut_image_is_refused():
    record = record_of("<image>\nWhat?", "x", image="a.png")
    end = build(record).input_ids.tolist().index(TOKENIZER.special_id("</img>"))
    assert build(record, max_length=end + 1).num_learned == 0
    with pytest.raises(UserError, match=f"max_length {end} cuts an image of the sample, which needs {end + 1} tokens"):
        build(record, max_length=end)


def test_samples_are_padded_on_the_right():
    samples = [build(record_of("a", "long answer")), build(record_of("a", "b"))]
    pad_id = TOKENIZER.special_id("<|endoftext|>")
    batch = collate(samples, pad_id=pad_id)
    length = len(samples[1].input_ids)
    assert batch["input_ids"].shape == (2, len(samples[0].input_ids))
    assert (batch["input_ids"][1, length:] == pad_id).all() and (batch["labels"][1, length:] == IGNORED_LABEL).all()
    assert batch["attention_mask"].sum(axis=1).tolist() == [len(sample.input_ids) for sample in samples]
    assert all(array.dtype == np.int32 for array in batch.values())


def test_a_pad_id_may_be_text():
    end_id = TOKENIZER.special_id("<|im_end|>")
    samples = [build(record_of("a", "long answer")), build(record_of("a", "b"))]
    lengths = [len(sample.input_ids) for sample in samples]
    assert collate(samples, pad_id=end_id)["attention_mask"].sum(axis=1).tolist() < lengths
    batch = collate(samples, pad_id=end_id, pads_are_text=True)
    assert batch["attention_mask"].sum(axis=1).tolist() == lengths


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return open_tokenizer(str(golden_path("vary/qwen.tiktoken")), expected_vocab_size=151860)


def build_case(case, tokenizer, make):
    return make(
        case["record"],
        tokenizer=tokenizer,
        template=get_template("mpt", TEMPLATES),
        image_span=ImageSpan(256),
        max_length=case["model_max_length"],
        image_in_front=case["sep_image_conv_front"],
    )


def test_labels_are_those_of_the_original(qwen):
    for case in golden_json("vary/prompts/labels.json"):
        sample = build_case(case, qwen, original_sample)
        assert sample.input_ids.tolist() == case["input_ids"], case["name"]
        assert sample.labels.tolist() == case["labels"], case["name"]
        assert (sample.warning, sample.num_learned) == (case["warning"], case["n_kept"]), case["name"]
        assert bool(sample.images) == case["has_image"], case["name"]


def test_our_labels_equal_the_original_ones_where_those_are_not_dropped(qwen):
    differing = {"image_record_without_image_token", "single_turn_image__truncated_in_image", "box_and_ref_tokens"}
    compared = 0
    for case in golden_json("vary/prompts/labels.json"):
        if case["warning"] or case["name"] in differing:
            continue
        sample = build_case(case, qwen, build_sample)
        assert sample.labels.tolist() == case["labels"], case["name"]
        compared += 1
    assert compared > 5


def test_batches_are_those_of_the_original(qwen):
    batch = golden_json("vary/prompts/collated_batch.json")
    cases = {case["name"]: case for case in golden_json("vary/prompts/labels.json")}
    samples = [build_case(cases[name], qwen, original_sample) for name in batch["records"]]
    for name, array in collate(samples, pad_id=151643).items():
        assert array.tolist() == batch[name], name
