from hypothesis import given
from hypothesis import strategies as st

from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()


@given(st.text())
def test_text_arrives_in_whole_characters(text):
    decoder = TOKENIZER.text_decoder()
    text = TOKENIZER.normalize(text.replace("\ufffd", ""))
    arrived = ""
    for token_id in TOKENIZER.encode(text):
        arrived += decoder.push(token_id)
        assert text.startswith(arrived)
    assert arrived == text
    assert decoder.flush() == ""


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_all_pieces_are_the_text_of_all_ids(ids, skip_special):
    decoder = TOKENIZER.text_decoder(skip_special=skip_special)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == TOKENIZER.decode(ids, skip_special=skip_special)


def test_a_cut_character_waits_and_is_replaced_at_the_end():
    decoder = TOKENIZER.text_decoder()
    first, *_ = TOKENIZER.encode("é")
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("a")) == "a"
