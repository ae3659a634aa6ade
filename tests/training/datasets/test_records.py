from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.models.registry import record_formats
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.images.image_span import ImageSpan
from mindvlm.processing.samples.chat_samples import build_sample
from mindvlm.processing.text.chat_template import get_template
from mindvlm.training.datasets.records import read_conversation
from mindvlm.training.datasets.samples import fit_sample
from tests.golden_files import golden_json, golden_path
from tests.processing.text.small_vocabulary import small_tokenizer
from tests.training.datasets.conftest import conversation

FORMATS = record_formats()
TOKENIZER = small_tokenizer()
SPAN = ImageSpan(4)
count_images = partial(SPAN.count, tokenizer=TOKENIZER)


def turns(*speakers_and_values) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in speakers_and_values]


def test_a_caption_becomes_a_conversation():
    record = {"image": "a b.png", "question": "OCR: ", "caption": "one<lb>two"}
    read = read_conversation(record, FORMATS["vary_tiny_600k"])
    assert read["image"] == ["a b.png"]
    assert read["conversations"] == turns(("human", "<image>\nOCR: "), ("gpt", "one\ntwo"))


def test_a_bare_list_and_a_leading_answer_are_accepted():
    read = read_conversation(turns(("gpt", "Hello"), ("human", "1+1?"), ("gpt", 2)), FORMATS["vary"])
    assert read == {"image": [], "conversations": turns(("human", "1+1?"), ("gpt", 2))}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (5, "expected {'image': name, 'conversations'"),
        ({}, "with at least one turn"),
        ({"conversations": []}, "with at least one turn"),
        (turns(("human", "a"), ("human", "b")), "turn 1: spoken by 'human', expected 'gpt'; turns must alternate"),
        (turns(("gpt", "a"), ("gpt", "b")), "turn 1: spoken by 'gpt', expected 'human'"),
        (turns(("human", "a"), ("robot", "b")), "turn 1: expected .*found {'from': 'robot'"),
        (turns(("human", "a"), ("gpt", None)), "turn 1: expected"),
        (["human", "gpt"], "turn 0: expected .*found 'human'"),
        (turns(("human", "a")), "no answer of 'gpt'"),
        (turns(("gpt", "a")), "no answer of 'gpt'"),
        (conversation("<image>\nRead.", "x"), "0 pictures for 1 <image> marker in the questions; name a picture"),
        (conversation("Read.", "x", image="a.png"), "1 picture for 0 <image> markers .*; mark its place with <image>"),
        (conversation("<image> <image>", "x", image="a.png"), "1 picture for 2"),
        ({**conversation("<image>", "x"), "image": 5}, "'image' is 5; expected the name of a picture"),
        ({**conversation("<image>", "x"), "image": [""]}, "'image' is"),
    ],
)
def test_bad_records_are_explained(record, message):
    with pytest.raises(UserError, match=message):
        read_conversation(record, FORMATS["vary"])


@pytest.mark.parametrize(
    ("values", "images", "question"),
    [
        (("What? <image> <image>", "x"), ["a.png"], "<image>\nWhat?"),
        (("What? <image>", "x"), ["a.png"], "What? <image>"),
        (("What?", "x"), [], "What?"),
    ],
)
def test_llava_marks_its_only_picture_as_it_likes(values, images, question):
    read = read_conversation(conversation(*values, image="a.png"), FORMATS["llava"])
    assert (read["image"], read["conversations"][0]["value"]) == (images, question)
    with pytest.raises(UserError, match="2 pictures for 1"):
        read_conversation({**conversation("<image>", "x"), "image": ["a.png", "b.png"]}, FORMATS["llava"])


def test_a_caption_needs_its_text():
    with pytest.raises(UserError, match="is the format of the registry right"):
        read_conversation(conversation("a", "b"), FORMATS["vary_tiny_600k"])


def make_sample(record, *, max_length):
    return build_sample(
        record,
        tokenizer=TOKENIZER,
        template=get_template("mpt_eval", TEMPLATES),
        image_span=SPAN,
        max_length=max_length,
    )


def fitted(values, max_length, image=None, long_answers="cut"):
    return fit_sample(
        read_conversation(conversation(*values, image=image), FORMATS["vary"]),
        make_sample,
        max_length=max_length,
        count_images=count_images,
        long_answers=long_answers,
    )


def whole_sample(values, image=None):
    return fitted(values, 10_000, image)


texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)


@given(
    st.lists(texts, min_size=2, max_size=8).filter(lambda v: len(v) % 2 == 0), st.integers(0, 3), st.integers(1, 200)
)
def test_the_longest_whole_turns_are_kept_and_no_picture_is_cut(values, asked, max_length):
    asked = min(asked, len(values) // 2 - 1) * 2
    values[asked] = "<image>" + values[asked]
    sample = whole_sample(values, image="a.png")
    lengths = [
        len(whole_sample(values[:n], "a.png" if n > asked else None).input_ids) for n in range(2, len(values) + 1, 2)
    ]
    try:
        kept = fitted(values, max_length, "a.png", "skip")
    except UserError as error:
        assert lengths[0] > max_length and f"needs {lengths[0]} tokens" in str(error)
        return
    assert len(kept.input_ids) == max(length for length in lengths if length <= max_length)
    np.testing.assert_array_equal(kept.input_ids, sample.input_ids[: len(kept.input_ids)])
    spans = [int((kept.input_ids == TOKENIZER.special_id(token)).sum()) for token in ("<img>", "</img>")]
    assert spans == [len(kept.images)] * 2
    assert TOKENIZER.decode(kept.labels[-1:]) == "<|im_end|>"


def test_a_first_answer_that_is_too_long_is_cut_without_its_end():
    # the picture of the second question would be cut
    values = ["<image>Read.", "a long answer", "<image>more?", "no"]
    record = {**conversation(*values), "image": ["a.png", "b.png"]}
    first = int(np.argmax(make_sample(record, max_length=999).labels != -100))

    def fit(max_length):
        return fit_sample(record, make_sample, max_length=max_length, count_images=count_images)

    kept = fit(first + 3)
    assert len(kept.input_ids) == first + 3 and (kept.labels[first:] == kept.input_ids[first:]).all()
    assert TOKENIZER.special_id("<|im_end|>") not in kept.labels and kept.images == ("a.png",)
    with pytest.raises(UserError, match="needs .* tokens up to the end of its first answer; raise data.max_length of"):
        fit(first)


def test_pictures_without_marker_can_stand_in_front():
    record = conversation("Read.", "x", image="a.png")
    read = read_conversation(record, FORMATS["vary"], images_in_front=True)
    assert read["conversations"][0]["value"] == "<image>Read."
    assert read_conversation(read, FORMATS["vary"], images_in_front=True) == read
    assert record["conversations"][0]["value"] == "Read."


def test_captions_are_those_of_the_original():
    tokenizer = open_tokenizer(str(golden_path("vary/opt_prompts/vocab.json")))

    def make_caption(record, *, max_length):
        template = get_template("opt", TEMPLATES)
        return build_sample(
            record, tokenizer=tokenizer, template=template, image_span=ImageSpan(256), max_length=max_length
        )

    cases = [case for case in golden_json("vary/opt_prompts/cases.json")["labels"] if "image" in case["record"]]
    for case in cases:
        kept = fit_sample(
            read_conversation(case["record"], FORMATS["vary"], images_in_front=True),
            make_caption,
            max_length=case["model_max_length"],
            count_images=partial(ImageSpan(256).count, tokenizer=tokenizer),
        )
        assert kept.input_ids.tolist() == case["input_ids"], case["name"]
        assert kept.labels.tolist() == case["labels"], case["name"]
    assert len(cases) >= 3


def test_labels_are_those_of_the_original():
    """All recorded samples that the original keeps and that our rules accept."""
    tokenizer = open_tokenizer(str(golden_path("vary/qwen.tiktoken")), expected_vocab_size=151860)
    # the original shows no picture without a marker; it arms special tokens in texts; the other two are cut in a turn
    differing = {"image_record_without_image_token", "box_and_ref_tokens", "single_turn_image__truncated_in_image"}
    differing.add("three_turns_mixed__truncated_in_answer")

    def make_qwen_sample(record, *, max_length):
        template = get_template("mpt", TEMPLATES)
        return build_sample(
            record, tokenizer=tokenizer, template=template, image_span=ImageSpan(256), max_length=max_length
        )

    compared = 0
    for case in golden_json("vary/prompts/labels.json"):
        if case["warning"] or case["name"] in differing:
            continue
        kept = fit_sample(
            read_conversation(case["record"], FORMATS["vary"]),
            make_qwen_sample,
            max_length=case["model_max_length"],
            count_images=partial(ImageSpan(256).count, tokenizer=tokenizer),
        )
        length = len(kept.input_ids)
        assert kept.input_ids.tolist() == case["input_ids"][:length], case["name"]
        assert kept.labels.tolist() == case["labels"][:length], case["name"]
        assert all(label == -100 for label in case["labels"][length:]), case["name"]
        compared += 1
    assert compared >= 13


ONE_PICTURE = ["a.png"]
ASKED = turns(("human", "<image>\nRead."), ("gpt", "x"))


def said(*roles_and_contents) -> list[dict]:
    return [{"role": role, "content": content} for role, content in roles_and_contents]


@pytest.mark.parametrize("format", ["vary", "llava"])
@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": ASKED},
        {"images": ["a.png"], "conversations": ASKED},
        {"image": "a.png", "images": ["a.png"], "messages": said(("user", "<image>\nRead."), ("assistant", "x"))},
        {"image_path": "a.png", "conversation": said(("User", "<Image>\nRead."), ("Assistant", "x"))},
        {"image": {"path": "a.png", "bytes": None}, "messages": said(("human", "<IMAGE>\nRead."), ("gpt", "x"))},
        {"image": "a.png", "conversations": turns(("user", "<image-placeholder>\nRead."), ("assistant", "x"))},
        {"image": "a.png", "conversations": turns(("human", "<image_1>\nRead."), ("gpt", "x"))},
        {"image": "a.png", "conversations": turns(("human", "<|image|>\nRead."), ("gpt", "x"))},
        {"image": "a.png", "conversations": turns(("human", "[IMG]\nRead."), ("gpt", "x"))},
        {"image": "a.png", "conversations": turns(("human", "<image/>\nRead."), ("gpt", "x"))},
        {
            "image": "a.png",
            "conversations": turns(("human", "<|vision_start|><|image_pad|><|vision_end|>\nRead."), ("gpt", "x")),
        },
        {
            "images": [{"bytes": None, "path": "a.png"}],
            "messages": said(
                (
                    "user",
                    [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": "Read.", "type": "text"}],
                ),
                ("assistant", [{"index": None, "text": "x", "type": "text"}]),
            ),
        },
        {"image": "a.png", "video": None, "conversations": ASKED},
        {
            "images": ["a.png"],
            "messages": said(
                ("user", [{"type": "image"}, {"type": "text", "text": "Read."}]),
                ("assistant", [{"type": "text", "text": "x"}]),
            ),
        },
        {"messages": said(("user", [{"type": "image", "image": "a.png"}, "Read."]), ("assistant", "x"))},
        {
            "messages": said(
                ("user", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Read."}]),
                ("assistant", "x"),
            )
        },
    ],
)
def test_the_usual_spellings_are_the_same_record(record, format):
    assert read_conversation(record, FORMATS[format]) == {"image": ONE_PICTURE, "conversations": ASKED}


@pytest.mark.parametrize("format", ["vary", "llava"])
def test_a_picture_marked_in_two_turns_is_shown_in_the_first(format):
    record = conversation("hi", "x", "<image>\nRead.", "y", "And in\n<image>", "z", image="a.png")
    read = read_conversation(record, FORMATS[format])
    assert [turn["value"] for turn in read["conversations"][::2]] == ["hi", "<image>\nRead.", "And in"]
    assert read["image"] == ONE_PICTURE


@pytest.mark.parametrize("format", ["vary", "llava"])
@pytest.mark.parametrize("image", [{}, {"image": ""}, {"images": []}, {"image": None}])
def test_a_mark_in_a_text_without_picture_is_text(format, image):
    record = conversation("What does <image> mean in HTML?", "a picture: <image>") | image
    read = read_conversation(record, FORMATS[format])
    assert (read["image"], read["conversations"]) == ([], record["conversations"])


def test_llava_takes_every_mark_without_picture_as_text():
    record = conversation("<image>\nRead.", "x")
    assert read_conversation(record, FORMATS["llava"]) == {"image": [], **record}
    record = conversation("<Image>\nRead.", "x")
    with pytest.raises(UserError, match="0 pictures for 1 <image> marker .*; name a picture for each"):
        read_conversation(record, FORMATS["vary"])


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": turns(("system", "Be brief."), ("human", "1+1?"), ("gpt", "2"))},
        {"messages": said(("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"))},
        {"system": "Be brief.", "conversations": turns(("human", "1+1?"), ("gpt", "2"))},
        {"system": "Be brief.", "messages": said(("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"))},
        turns(("system", "Be brief."), ("gpt", "Hello"), ("human", "1+1?"), ("gpt", "2")),
    ],
)
def test_the_system_message_of_a_record_replaces_that_of_the_template(record):
    read = read_conversation(record, FORMATS["vary"])
    assert read == {"image": [], "conversations": turns(("human", "1+1?"), ("gpt", "2")), "system": "Be brief."}
    text = TOKENIZER.decode(make_sample(read, max_length=999).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n1+1?")
    cut = fit_sample(read, make_sample, max_length=len(text.encode()), count_images=count_images)
    assert "Be brief." in TOKENIZER.decode(cut.input_ids)


@pytest.mark.parametrize(
    "more", [{"image_id": "7"}, {"photo": {"width": 4, "format": "png"}}, {"pictures": []}, {"tags": ["a", {"b": 1}]}]
)
def test_keys_that_name_no_picture(more):
    record = {**conversation("What is in a.png?", "logo.png"), **more}
    assert read_conversation(record, FORMATS["llava"])["image"] == []
    answered = {"question": "What file?", "caption": "logo.png", **more}
    assert read_conversation(answered, FORMATS["vary_tiny_600k"])["conversations"][1]["value"] == "logo.png"


@pytest.mark.parametrize(
    "mark", ["<img></img>", "<image></image>", "<im_start><image><im_end>", "<|image_start|><|image|><|image_end|>"]
)
def test_enclosed_marks_leave_no_letters(mark):
    read = read_conversation(conversation(f"{mark} What?", "x", image="a"), FORMATS["llava"])
    assert read["conversations"][0]["value"] == "<image> What?"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**conversation("<video>\nWhat?", "x"), "video": "a.mp4"}, "'video' is 'a.mp4'; training uses pictures only"),
        (conversation("What?\n<video>", "x"), "shows <video>; training uses pictures only"),
        (
            {**conversation("Read.", "x"), "photo": "b.JPG"},
            "'photo' is the picture 'b.JPG', but .* from 'image'; rename",
        ),
        (
            {**conversation("Read.", "x"), "image_url": "https://a.org/7"},
            "'image_url' is the picture 'https://a.org/7'",
        ),
        ({**conversation("Read.", "x"), "file": ["b.png"]}, "'file' is the picture 'b.png'"),
        ({**conversation("Read.", "x"), "file": "b.HEIC"}, "'file' is the picture 'b.HEIC'"),
        ({**conversation("Read.", "x"), "media": "https://a.org/b.avif?size=1"}, "'media' is the picture 'https"),
        ({**conversation("Read.", "x"), "media": "data:image/png;base64,AA=="}, "'media' is the picture 'data"),
        ({**conversation("Read.", "x"), "pictures": [{"path": "b"}]}, "'pictures' is the picture 'b'"),
        ({**conversation("Read.", "x"), "photo": {"bytes": None, "path": "b"}}, "'photo' is the picture 'b'"),
        ({**conversation("Read.", "x"), "extra": {"files": ["b.txt", "b.jp2"]}}, "'files' is the picture 'b.jp2'"),
        ({**conversation("Read.", "x"), "meta": {"photo": "b"}}, "'photo' is the picture 'b'"),
        (
            {"messages": [{"role": "user", "content": "a", "images": ["b"]}, {"role": "assistant", "content": "c"}]},
            "'images' of a turn is the picture 'b', .* of the record; move it there",
        ),
        ({**conversation("<image>", "x"), "image": "a", "images": ["b"]}, "different pictures under 'image' and"),
        (conversation("Picture 1: <img>a.png</img>", "x"), "name a picture for each"),
        ({**conversation("<image>", "x"), "images": ["a", "b"]}, "2 pictures for 1 <image> marker .*; mark its place"),
        ({**conversation("<image_2> <image_1>", "x"), "images": ["a", "b"]}, r"are in the order \[2, 1\]"),
        (turns(("human", "a"), ("system", "b"), ("gpt", "c")), "turn 1: a system message, which can only be the first"),
        ({"system": "a", "conversations": turns(("system", "b"), *[("human", "c")] * 2)}, "two different system"),
        (said(("user", "a"), ("tool", "b")), "turn 1: expected .*found {'role': 'tool'"),
        (said(("user", [{"type": "video"}]), ("assistant", "b")), "turn 0: part {'type': 'video'}; expected"),
        ({"query": "a", "response": "b"}, r"or 'messages' of .*; found \['query', 'response'\]"),
        ({**conversation("a", "b"), "system": 5}, "'system' is 5; expected a text"),
    ],
)
def test_what_cannot_be_used_is_named(record, message):
    for format in ("vary", "vary" if "<img>" in str(record) else "llava"):
        with pytest.raises(UserError, match=message):
            read_conversation(record, FORMATS[format])


@pytest.mark.parametrize(
    "extra",
    [
        *({key: "none"} for key in ("image_source", "has_image", "image_size", "image_caption", "photographer")),
        {"metadata": {"file": "a.png", "picture_type": "none"}, "video": False, "audio": [None]},
        {"source": "coco/a.png", "source_file": "a.jpg", "url": "https://a.org/a.png", "image_id": "a.png"},
        {"prompt": "describe a.jpg", "text": "run convert a.jpg b.png", "license": "see a.svg", "tags": ["b.png"]},
    ],
)
def test_provenance_names_no_picture(extra):
    assert read_conversation({**conversation("Read.", "x"), **extra}, FORMATS["llava"])["image"] == []
