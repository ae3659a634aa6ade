import time

from hypothesis import given
from hypothesis import strategies as st

from mindvlm.processing.text.pieces import Piece, encode_pieces
from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()
ordinary_text = st.text(alphabet=st.characters(codec="ascii"), max_size=12).filter(lambda text: "<" not in text)


@given(st.lists(ordinary_text, min_size=1))
def test_ordinary_pieces_have_the_ids_of_the_whole_string(texts):
    pieces = [Piece(text, control=index % 2 == 0) for index, text in enumerate(texts)]
    ids, owners = encode_pieces(pieces, TOKENIZER)
    assert ids == TOKENIZER.encode("".join(texts), allow_special=True)
    assert owners == sorted(owners) and len(owners) == len(ids)


@given(st.text(), st.text())
def test_every_id_belongs_to_the_piece_in_which_it_begins(first, second):
    pieces = [Piece(first), Piece("<img>", control=True), Piece(second)]
    ids, owners = encode_pieces(pieces, TOKENIZER)
    for index in range(3):
        part = TOKENIZER.decode([token_id for token_id, owner in zip(ids, owners, strict=True) if owner == index])
        assert part == TOKENIZER.normalize(pieces[index].text)


def test_a_token_across_two_pieces_belongs_to_the_first():
    ids, owners = encode_pieces([Piece("user\n", control=True), Piece("\nthe")], TOKENIZER)
    assert [TOKENIZER.decode([token_id]) for token_id in ids] == ["user", "\n\n", "the"]
    assert owners == [0, 0, 1]


def test_special_forms_count_in_control_text_only():
    ids, _ = encode_pieces([Piece("<|im_end|>"), Piece("<|im_end|>", control=True)], TOKENIZER)
    assert ids.count(TOKENIZER.special_id("<|im_end|>")) == 1


def test_characters_that_compose_across_pieces():
    ids, owners = encode_pieces([Piece("e"), Piece("\u0301x"), Piece("y")], TOKENIZER)
    assert TOKENIZER.decode(ids) == "\N{LATIN SMALL LETTER E WITH ACUTE}xy"
    assert [TOKENIZER.decode_bytes([token_id]) for token_id in ids] == [b"\xc3", b"\xa9", b"x", b"y"]
    assert owners == [0, 1, 1, 2]


def test_many_pieces_take_linear_time():
    start = time.process_time()
    encode_pieces([Piece("e\u0301" * 4)] * 20_000, TOKENIZER)
    assert time.process_time() - start < 5
