"""Conversations reuse the KV cache of earlier turns and give the same answers as a full prompt."""

import numpy as np
import pytest
from mindspore import ops

from mindvlm.core.errors import UserError
from mindvlm.generation.answer import Answer
from mindvlm.generation.images import ImageFeatures
from mindvlm.generation.request import Slot
from mindvlm.sessions.conversation import Conversation, ids_of_text
from tests.processing.text.small_vocabulary import small_tokenizer
from tests.tiny_vary import IMAGE_TOKEN_LEN, picture, tiny_model

BOUND = 1e-5


@pytest.fixture(scope="module", params=["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def spy(model, monkeypatch):
    """Records all prefilled ids with their logits, and all encoded images."""

    class Spy:
        appended: list = []
        logits: list = []
        num_encoded = 0

    spy = Spy()
    spy.appended, spy.logits = [], []
    run_prefill, encode = model.engine.run_prefill, model.engine.encode_images

    def spying_prefill(prompts, features):
        run_prefill(prompts, features)
        for prompt in prompts:
            spy.appended.append(prompt.ids)
            spy.logits.append(model.engine.next_logits[prompt.row].asnumpy())

    def spying_encode(*pixels):
        spy.num_encoded += 1
        return encode(*pixels)

    model.encoder.cache.clear()
    monkeypatch.setattr(model.engine, "run_prefill", spying_prefill)
    monkeypatch.setattr(model.engine, "encode_images", spying_encode)
    return spy


def assert_uncached(model, ids, logits, images=()):
    features = model.encode_images(list(images))
    expected = model.engine.logits(np.array([ids], np.int32), features)[0, -1].asnumpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < BOUND, f"relative error {error:.2e}"


def test_the_second_turn_prefills_only_what_is_new(model, spy):
    talk = Conversation(model)
    first = talk.ask("read", picture(), max_new_tokens=4)
    second = talk.ask("go on", max_new_tokens=4)
    follow_up = model.processor.follow_up("go on", answer_is_closed=False).input_ids
    assert spy.num_encoded == 1
    # the last id of an answer has no key and value in the cache yet
    assert spy.appended[1] == first.ids[-1:] + follow_up
    ids = spy.appended[0] + first.ids + follow_up
    assert second.num_prompt_tokens == len(ids)
    assert_uncached(model, ids, spy.logits[1], [picture()])
    assert second.history == talk.turns == [("<image>\nread", str(first)), ("go on", str(second))]


def test_a_picture_in_a_later_turn(model, spy):
    talk = Conversation(model)
    first = talk.ask("read", picture(0), max_new_tokens=3)
    talk.ask("and this?", picture(1), max_new_tokens=3)
    assert spy.num_encoded == 2 and len(spy.appended) == 2
    ids = spy.appended[0] + first.ids[:-1] + spy.appended[1]
    assert_uncached(model, ids, spy.logits[1], [picture(0), picture(1)])


def test_a_turn_that_ended_by_itself(model, spy, monkeypatch):
    free = model.chat("read", max_new_tokens=3)
    end = model.processor.tokenizer.special_id("<|im_end|>")
    talk = Conversation(model)
    monkeypatch.setattr(Slot, "take", closing_take(Slot.take, end))
    first = talk.ask("read", max_new_tokens=3)
    assert (first.stop_reason, first.ids) == ("stop_token", [*free.ids[:2], end])
    assert talk.answer_is_closed
    monkeypatch.undo()
    before = len(model.processor.prompt("read").input_ids)
    second_ids = model.processor.follow_up("go on", answer_is_closed=True).input_ids
    talk.ask("go on", max_new_tokens=1)
    assert talk.ids[before : before + 3 + len(second_ids)] == first.ids + second_ids
    assert talk.turns[0] == ("read", str(first))


def closing_take(take, end: int):
    """Replaces the third token of every answer by the closing mark, as a trained model would generate it."""

    def closing(slot, token, max_length):
        take(slot, end if len(slot.new_ids) == 2 else token, max_length)

    return closing


def test_an_answer_with_nan_leaves_the_conversation_unchanged(model, spy, monkeypatch):
    talk = Conversation(model)
    first = talk.ask("read", picture(0), max_new_tokens=3)
    encode = model.engine.encode_images
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "encode_images", lambda *pixels: encode(*pixels) * float("nan"))
        with pytest.raises(UserError, match="contain NaN"):
            talk.ask("and this?", picture(71))
    assert talk.turns == first.history
    second = talk.ask("go on", max_new_tokens=3)
    full = model.processor.prompt("go on", num_images=1, history=first.history).input_ids
    assert spy.appended[-1] == full and second.stop_reason == "max_new_tokens"
    assert_uncached(model, full, spy.logits[-1], [picture(0)])


def test_other_use_in_between_builds_the_cache_again(model, spy):
    talk = Conversation(model)
    first = talk.ask("read", picture(), max_new_tokens=3)
    model.chat("something else", max_new_tokens=2)
    talk.ask("go on", max_new_tokens=3)
    full = model.processor.prompt("go on", num_images=1, history=[("<image>\nread", str(first))]).input_ids
    assert spy.appended[-1] == full
    assert spy.num_encoded == 1
    assert_uncached(model, full, spy.logits[-1], [picture()])


def test_two_conversations_take_turns(model, spy):
    one, other = Conversation(model), Conversation(model)
    one.ask("first", max_new_tokens=2)
    other.ask("second", max_new_tokens=2)
    one.ask("third", max_new_tokens=2)
    full = model.processor.prompt("third", history=one.turns[:1]).input_ids
    assert spy.appended[-1] == full
    assert [query for query, _ in other.turns] == ["second"]


@pytest.mark.parametrize("how", ["close", "leave", "exception"])
def test_an_interrupted_answer_stays_as_far_as_it_came(model, spy, monkeypatch, how):
    talk = Conversation(model)
    talk.ask("hello", max_new_tokens=3)
    stream = talk.ask("read", stream=True, max_new_tokens=8)
    shown = next(stream)
    if how == "close":
        stream.close()
    elif how == "exception":
        interrupt(stream, monkeypatch)
    second = talk.ask("go on", max_new_tokens=2)
    partial = stream.answer
    assert partial.stop_reason == "interrupted" and partial.startswith(shown)
    assert [query for query, _ in second.history] == ["hello", "read", "go on"]
    assert second.history[1][1] == partial
    assert len(spy.appended) == 3
    ids = talk.ids[: second.num_prompt_tokens]
    assert ids[-len(spy.appended[-1]) :] == spy.appended[-1]
    assert_uncached(model, ids, spy.logits[-1])


def interrupt(stream, monkeypatch) -> None:
    """Simulates Ctrl-C between two tokens."""

    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream.engine, "step", fail)
        for _ in stream:
            pass


def test_ctrl_c_inside_a_step(model, spy, monkeypatch):
    talk = Conversation(model)
    stream = talk.ask("read", stream=True, max_new_tokens=8)
    next(stream)
    run = model.engine.runner.run

    def interrupted(stage, graph, *inputs):
        run(stage, graph, *inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    monkeypatch.setattr(model.engine.runner, "run", run)
    talk.ask("go on", max_new_tokens=2)
    second = talk.ask("and on", max_new_tokens=2)
    assert_uncached(model, talk.ids[: second.num_prompt_tokens], spy.logits[-1])


def test_what_lies_behind_a_stop_string_is_forgotten(model, spy):
    free = model.chat("read", max_new_tokens=8)
    talk = Conversation(model)
    first = talk.ask("read", max_new_tokens=8, stop_strings=[free[2:4]])
    assert first.stop_reason == "stop_string" and first == free[: free.index(free[2:4])]
    second = talk.ask("go on", max_new_tokens=2)
    ids = talk.ids[: second.num_prompt_tokens]
    follow_up = model.processor.follow_up("go on", answer_is_closed=False).input_ids
    begin = len(model.processor.prompt("read").input_ids)
    said = ids[begin : len(ids) - len(follow_up)]
    assert model.processor.tokenizer.decode(said, skip_special=True) == first
    assert_uncached(model, ids, spy.logits[-1])


def test_a_blank_in_front_of_a_cut_answer_stays_in_the_cache(model):
    tokenizer = model.processor.tokenizer
    talk = Conversation(model)
    asked = talk.ask("read", max_new_tokens=1)
    details = vars(asked) | {"generated": " use", "ids": tokenizer.encode(" use#"), "stop_reason": "stop_string"}
    prompt = talk.ids[: asked.num_prompt_tokens]
    talk.take_over(prompt, Answer.of("use", **details))
    assert talk.ids == prompt + tokenizer.encode(" use")


def test_a_placeholder_that_the_model_says_asks_for_no_picture(model, monkeypatch):
    talk = Conversation(model)
    answer = talk.ask("read", max_new_tokens=2)
    answer.ids[-1] = model.engine.placeholder_id
    talk.take_over(talk.ids[: answer.num_prompt_tokens], answer)
    assert talk.ask("go on", max_new_tokens=2).num_new_tokens == 2


def test_a_full_context_leaves_the_conversation_as_it_was(model, spy):
    talk = Conversation(model)
    first = talk.ask("read", picture(), max_new_tokens=3)
    for query in ("x" * 300, "<image>"):
        with pytest.raises(UserError, match="the context holds 320|0 images for 1"):
            talk.ask(query)
    assert talk.turns == first.history
    answer = talk.ask("x" * 200, max_new_tokens=1000)
    assert answer.stop_reason in ("context_full", "stop_token")
    ids = spy.appended[0] + first.ids[:-1] + spy.appended[-1]
    assert_uncached(model, ids, spy.logits[-1], [picture()])


def test_a_bad_option_changes_nothing(model):
    talk = Conversation(model)
    first = talk.ask("read", max_new_tokens=2)
    with pytest.raises(UserError, match="max_new_tokens"):
        talk.ask("go on", max_new_tokens=0)
    assert talk.turns == first.history and not talk.slot.is_released


def test_reset_forgets_everything(model, spy):
    talk = Conversation(model)
    talk.ask("read", picture(), max_new_tokens=2)
    open_answer = talk.ask("go on", stream=True)
    next(open_answer)
    talk.reset()
    open_answer.close()
    assert talk.turns == []
    talk.ask("hello", max_new_tokens=2)
    assert spy.appended[-1] == model.processor.prompt("hello").input_ids


def test_a_new_ntk_factor_builds_the_cache_again(model, spy, monkeypatch):
    talk = Conversation(model)
    talk.ask("read", max_new_tokens=2)
    # the first prompt is within 32, the second beyond
    monkeypatch.setattr(model.engine.config, "training_length", 32)
    talk.ask("a question that is longer", max_new_tokens=1)
    full = model.processor.prompt("a question that is longer", history=talk.turns[:1]).input_ids
    assert len(full) > 32 and spy.appended[-1] == full and talk.slot.alpha == 3


def test_ids_of_a_text_that_was_cut():
    tokenizer = small_tokenizer()
    the, user = tokenizer.encode("the"), tokenizer.encode("user")
    assert len(the) == len(user) == 1
    assert ids_of_text("theus", the + user, tokenizer) == (the, tokenizer.encode("us"))
    assert ids_of_text("the", the + user, tokenizer) == (the, [])
    assert ids_of_text("t", the + user, tokenizer) == ([], tokenizer.encode("t"))
    assert ids_of_text("", the, tokenizer) == ([], [])
    halves = list("中".encode())
    assert ids_of_text("中", halves + the, tokenizer) == (halves, [])
    assert ids_of_text("\N{REPLACEMENT CHARACTER}", halves[:2], tokenizer)[0] == []


def test_features_join_in_order(model):
    none = ImageFeatures()
    first, second = (model.encoder.encode(model.pictures(picture(n))) for n in range(2))
    assert none.followed_by(none).rows is None
    assert first.followed_by(none).rows is first.rows and none.followed_by(second).rows is second.rows
    both = first.followed_by(second)
    np.testing.assert_array_equal(both.rows.asnumpy(), ops.concat((first.rows, second.rows)).asnumpy())
    assert both.counts == [IMAGE_TOKEN_LEN, IMAGE_TOKEN_LEN]
