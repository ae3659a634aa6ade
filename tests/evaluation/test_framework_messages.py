"""Messages of evaluation frameworks, read as questions to a model."""

import pytest

from mindvlm.core.errors import UserError
from mindvlm.evaluation.frameworks.messages import read_messages
from tests.tiny_vary import tiny_model


@pytest.fixture(scope="module")
def processor():
    return tiny_model("pynative").processor


def user(*parts):
    return "user", [("text", part) if isinstance(part, str) else ("image", part) for part in parts]


ANSWER = ("assistant", [("text", "a cat")])


def test_pictures_before_the_text_stand_where_the_model_wants_them(processor):
    assert read_messages([user(1, 2, "Which?")], processor) == (processor.mark_images("Which?", 2), [1, 2], [])


def test_pictures_between_texts_stay_in_place(processor):
    query, pictures, _ = read_messages([user("Is ", 1, " like ", 2, "?")], processor)
    assert (query, pictures) == ("Is <image> like <image>?", [1, 2])


def test_markers_in_the_text_are_the_places_of_the_pictures(processor):
    query, pictures, _ = read_messages([user("Is <image> like <image>?", 1, 2)], processor)
    assert (query, pictures) == ("Is <image> like <image>?", [1, 2])
    with pytest.raises(UserError, match="1 image for 2 <image> markers"):
        read_messages([user(1, "Is <image> like <image>?")], processor)


def test_earlier_turns_are_the_history(processor):
    query, pictures, history = read_messages([user(1, "What?"), ANSWER, user("And "), user(2, "?")], processor)
    assert history == [(processor.mark_images("What?", 1), "a cat")]
    assert (query, pictures) == ("And \n<image>?", [1, 2])


def test_a_system_message_precedes_the_first_text(processor):
    messages = [("system", [("text", "Be brief.")]), user(1, "What?")]
    assert read_messages(messages, processor)[0] == processor.mark_images("Be brief.\nWhat?", 1)


def test_the_model_answers_what_was_read():
    model = tiny_model("pynative")
    query, pictures, history = read_messages([user("hi"), ANSWER, user("and?")], model.processor)
    answer = model.chat(query, pictures, history, max_new_tokens=2)
    assert answer.history[0] == ("hi", "a cat")


@pytest.mark.parametrize(
    "messages, error",
    [
        ([user("hi"), ANSWER], "does not end with a message of 'user'"),
        ([], "does not end with a message of 'user'"),
        ([ANSWER], "begins with a message of 'assistant'"),
        ([("user", [("video", "a.mp4")])], "contains 'video'"),
    ],
)
def test_other_messages_are_refused(processor, messages, error):
    with pytest.raises(UserError, match=error):
        read_messages(messages, processor)
