"""The end of answers, whose text never contains a part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.generation.answer import AnswerText
from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()
END, TURN_END = TOKENIZER.special_id("<|endoftext|>"), TOKENIZER.special_id("<|im_end|>")


def make(*stop_strings: str, **options) -> AnswerText:
    return AnswerText((TURN_END, END), stop_strings, TOKENIZER.text_decoder(), **options)


def feed(stop: AnswerText, ids) -> tuple[list[str], str | None]:
    """Pieces as they are shown, and why it ended."""
    pieces = []
    for token in ids:
        reason = stop.reason_after(token)
        pieces.append(stop.take())
        if reason:
            return pieces, reason
    stop.end()
    pieces.append(stop.take())
    return pieces, None


def byte_ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("token", [END, TURN_END])
def test_stop_ids_end_the_row_and_are_not_text(token):
    stop = make()
    pieces, reason = feed(stop, [*byte_ids("ab"), token, *byte_ids("c")])
    assert ("".join(pieces), reason, stop.text) == ("ab", "stop_token", "ab")


def test_a_stop_string_that_comes_over_several_tokens():
    stop = make("###")
    pieces, reason = feed(stop, byte_ids("a#b##c### d"))
    assert (reason, stop.text, "".join(pieces)) == ("stop_string", "a#b##c", "a#b##c")
    assert all("##" not in piece or piece == "##c" for piece in pieces)


def test_a_stop_string_within_one_token():
    stop = make("se")
    pieces, reason = feed(stop, [*byte_ids("x"), *TOKENIZER.encode("user"), *byte_ids("y")])
    assert (stop.text, "".join(pieces), reason) == ("xu", "xu", "stop_string")


def test_the_earliest_of_several_stop_strings():
    stop = make("cd", "b")
    assert feed(stop, byte_ids("abcd"))[1] == "stop_string"
    assert stop.text == "a"
    both_in_one_token = make("se", "us")
    assert feed(both_in_one_token, TOKENIZER.encode("user")) == ([""], "stop_string")


def test_text_that_only_began_like_a_stop_string_is_shown_at_the_end():
    pieces, reason = feed(make("abc"), byte_ids("xab"))
    assert (pieces, reason) == (["x", "", "", "ab"], None)


def test_a_stop_token_shows_what_was_held_back():
    stop = make("abc")
    assert feed(stop, [*byte_ids("ab"), END])[0] == ["", "", "ab"]


def test_whole_characters_only():
    pieces, _ = feed(make(), byte_ids("é中😀x"))
    assert [piece for piece in pieces if piece] == ["é", "中", "😀", "x"]


def test_a_cut_character_is_replaced_at_the_end():
    pieces, _ = feed(make(), [*byte_ids("a"), *"中".encode()[:2]])
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_behind_a_cut_character():
    stop = make("#")
    feed(stop, ["中".encode()[0], *byte_ids("#x")])
    assert stop.text == "\N{REPLACEMENT CHARACTER}"


def test_blanks_around_an_answer_are_not_shown():
    """ASSISTANT: is followed by a token that begins with a space; what ends an answer may be a line break."""
    stop = make()
    pieces, _ = feed(stop, byte_ids(" \n a  b \n"))
    assert pieces == ["", "", "", "a", "", "", "  b", "", "", ""]
    assert (stop.answer, stop.text) == ("a  b", " \n a  b \n")


def test_blanks_before_a_stop_string_are_not_shown():
    stop = make("###")
    pieces, reason = feed(stop, byte_ids(" a\n###"))
    assert (reason, "".join(pieces), stop.answer) == ("stop_string", "a", "a")


def test_a_stop_string_that_is_complete_only_at_the_end():
    """The decoder holds the last bytes until a stop token comes."""
    stop = make("\N{REPLACEMENT CHARACTER}")
    pieces, reason = feed(stop, [*byte_ids("a"), "中".encode()[0], END])
    assert (reason, "".join(pieces), stop.text) == ("stop_token", "a", "a")


def test_a_loop_ends_the_answer():
    ids = [*byte_ids("so "), *byte_ids("ab") * 100]
    stop = make(max_repeated_tokens=40)
    pieces, reason = feed(stop, ids)
    assert (reason, "".join(pieces), stop.ended) == ("repetition", "so " + "ab" * 20, True)
    assert feed(make(), ids)[1] is None


LETTERS = st.text("ab中é \n", max_size=14)


@settings(max_examples=300)
@given(text=LETTERS, stops=st.lists(st.text("ab中é ", min_size=1, max_size=4), max_size=3), data=st.data())
def test_what_is_shown_is_the_text_before_the_first_stop_string(text, stops, data):
    ids = data.draw(st.sampled_from([byte_ids(text), TOKENIZER.encode(text)]))
    stop = make(*stops)
    shown = ""
    reason = None
    for token in ids:
        reason = stop.reason_after(token)
        shown += stop.take()
        assert not any(mark in shown for mark in stops)
        if reason:
            break
    if not reason:
        stop.end()
        shown += stop.take()
    assert shown == stop.answer == stop.text.strip()
    if reason:
        assert text.startswith(stop.text) and any(text[len(stop.text) :].startswith(mark) for mark in stops)
    else:
        assert stop.text == text and not any(mark in text for mark in stops)
