"""Templates whose system message promises marks around images, and those that begin with an example."""

import dataclasses

import pytest
import yaml

import mindvlm
from mindvlm.models.run_config import read_config
from mindvlm.models.tinyllava.processor import TinyLlavaProcessor, TinyLlavaProcessorConfig, siglip_branch
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.sessions.conversation import Conversation
from tests.golden_files import golden_json
from tests.processing.text.small_pieces import write_piece_files
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture

TAGGED_TEMPLATES = ["v0_mmtag", "v1_mmtag"]


@pytest.fixture
def make(tmp_path):
    """A processor with Llama's tokenizer and one placeholder for a picture."""
    tokenizer = str(write_piece_files(tmp_path / "llama"))

    def make_processor(template: str, **options) -> TinyLlavaProcessor:
        options = {"num_image_tokens": 1, "image": siglip_branch(6)} | options
        return TinyLlavaProcessor(TinyLlavaProcessorConfig(tokenizer=tokenizer, template=template, **options))

    return make_processor


def record_of(*values, image="a.png") -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns} | ({"image": image} if image else {})


def text_of(processor, ids) -> str:
    """The text of ids, [P] for a picture."""
    parts, ids = [[]], [int(one) for one in ids]
    for one in ids:
        if one == PLACEHOLDER_ID:
            parts.append([])
        else:
            parts[-1].append(one)
    return "[P]".join(processor.tokenizer.decode(part) for part in parts)


@pytest.mark.parametrize("name", TAGGED_TEMPLATES)
@pytest.mark.parametrize("case", ["image_tuple_open", "image_tuple_two_turns"])
def test_questions_are_asked_as_recorded(make, name, case):
    (entry,) = [one for one in golden_json("tinyllava/templates/prompts.json") if one["template"] == name]
    (recorded,) = [one for one in entry["cases"] if one["case"] == case]
    (_, first), *others, (_, last) = recorded["messages"]
    turns = [first["text"], *(text for _, text in others)]
    assert last is None
    processor = make(name)
    history = list(zip(turns[:-1:2], turns[1::2], strict=True))
    assert processor.prompt(turns[-1], num_images=1, history=history).text == recorded["prompt"]
    # a picture without a place of its own
    bare = [turns[0].replace("<image>", "").strip(), *turns[1:]]
    history = [(processor.mark_images(bare[0], 1), bare[1])] if history else []
    assert processor.prompt(bare[-1], num_images=1, history=history).text == recorded["prompt"]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("query", ["and this?", "<image> and <image>?", "<image>\nthis?"])
def test_a_follow_up_continues_the_conversation(make, query, marks):
    processor = make("v1_mmtag", use_im_start_end=marks)
    num_new = max(1, query.count("<image>"))
    first = processor.prompt("What?", num_images=1)
    following = processor.follow_up(query, num_images=num_new, answer_is_closed=False)
    whole = processor.prompt(query, num_images=1 + num_new, history=[(processor.mark_images("What?", 1), "a cup")])
    assert first.input_ids + processor.tokenizer.encode("a cup") + following.input_ids == whole.input_ids
    shown = "<Image><im_start><image><im_end></Image>" if marks else "<Image><image></Image>"
    assert whole.text.count(shown) == 1 + num_new and len(whole.placeholder_starts) == 1 + num_new


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("original_parse", [False, True])
def test_training_has_the_marks_in_the_question(make, original_parse, marks):
    processor = make("v1_mmtag", use_im_start_end=marks, original_parse=original_parse)
    sample = processor.training_sample(record_of("What? <image>", "the cup"), max_length=999)
    # this tokenizer writes a space behind a text that control tokens follow
    shown = "<Image> <im_start>[P]<im_end> </Image>" if marks else "<Image>[P]</Image>"
    assert f"USER: {shown}\nWhat?" in text_of(processor, sample.input_ids)


def test_training_marks_several_pictures_where_they_are(make):
    processor = make("v1_mmtag")
    record = record_of("<image> or <image>?", "that", "<image>\nthis?", "yes", image=["a.png", "b.png", "c.png"])
    text = text_of(processor, processor.training_sample(record, max_length=999).input_ids)
    assert "USER: <Image>[P]</Image> or <Image>[P]</Image>? ASSISTANT: that</s>" in text
    assert "USER: <Image>[P]</Image>\nthis? ASSISTANT: yes</s>" in text


def test_training_without_a_picture_has_no_marks(make):
    processor = make("v1_mmtag")
    for record in (record_of("What?", "the cup", image=None), record_of("What?", "the cup")["conversations"]):
        text = text_of(processor, processor.training_sample(record, max_length=999).input_ids)
        assert text.endswith("USER: What? ASSISTANT: the cup</s>")


@pytest.mark.parametrize("name", ["default", "v0"])
def test_examples_are_for_asking_only(make, name):
    processor = make(name)
    sample = processor.training_sample(record_of("<image>\nWhat?", "the cup", "And?", "a"), max_length=999)
    assert processor.tokenizer.decode([one for one in sample.labels.tolist() if one >= 0]) == "the cup### a###"
    expected = f"{processor.template.system}###Human: [P]\nWhat?###Assistant: the cup###Human: And?###Assistant: a###"
    assert text_of(processor, sample.input_ids).removeprefix("<s> ") == expected
    assert processor.prompt("What?").text.index("Renewable energy sources are") < 700


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that asks with v1_mmtag."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"max_position_embeddings": 768, "tokenizer_model_max_length": 768}
    data = dataclasses.asdict(read_config(write_tiny_tinyllava(folder, **sizes)))
    data["processor"]["template"] = "v1_mmtag"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return mindvlm.load(folder / "tiny.yaml", mode="pynative", cache=False)


def test_conversations_batches_and_streams_show_the_same(model, monkeypatch):
    appended, run_prefill = [], model.engine.run_prefill

    def spying_prefill(prompts, features):
        appended.extend(prompt.ids for prompt in prompts)
        run_prefill(prompts, features)

    monkeypatch.setattr(model.engine, "run_prefill", spying_prefill)
    talk = Conversation(model)
    first = talk.ask("What?", picture(0), max_new_tokens=3)
    talk.ask("and this?", picture(1), max_new_tokens=3)
    begin, added = appended
    asked = model.processor.prompt("What?", num_images=1)
    follow_up = model.processor.follow_up("and this?", num_images=1, answer_is_closed=False)
    assert begin == asked.input_ids and "Received.</s>USER: What? ASSISTANT:" in asked.text
    assert added[-len(follow_up.input_ids) :] == follow_up.input_ids and "Received.</s>USER: and" in follow_up.text
    assert [query for query, _ in talk.turns] == ["<image>\nWhat?", "<image>\nand this?"]
    batch = model.generate(["What?", "go on"], [picture(0), None], max_new_tokens=3)
    assert appended[2] == begin and str(batch[0]) == str(first) and batch[0].history == first.history
    assert "".join(model.chat("What?", picture(0), stream=True, max_new_tokens=3)) == str(first)
    model.chat("and this?", [picture(0), picture(1)], history=first.history, max_new_tokens=3)
    assert appended[-1][: len(begin)] == begin
