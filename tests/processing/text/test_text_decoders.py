import io

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.processing.text.text_decoders import (
    CleaningDecoder,
    FusedDecoder,
    PieceDecoder,
    SkippingDecoder,
    SpacedDecoder,
    Utf8Decoder,
    clean_spaces,
)

PIECES = {0: "<s>", 1: "\u2581", 2: "\u2581a", 3: "b", 4: "<0xC3>", 5: "<0xA9>", 6: "</s>"}
BYTES = {4: 0xC3, 5: 0xA9}


class Letters:
    """Every id is a character."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


def decode(decoder, ids) -> str:
    return "".join(map(decoder.push, ids)) + decoder.flush()


@given(st.lists(st.sampled_from([*" '.?nmtvx", " n't", "'ve", " n ' t"]), max_size=12).map("".join))
def test_cleaning_piece_by_piece_is_cleaning_the_whole(text):
    assert decode(CleaningDecoder(Letters()), map(ord, text)) == clean_spaces(text)


def test_settled_text_does_not_wait():
    decoder = CleaningDecoder(Letters())
    assert "".join(decoder.push(ord(letter)) for letter in "stop here") == "stop here"
    assert decoder.push(ord(" ")) == "" and decoder.push(ord("'")) == "" and decoder.push(ord("x")) == " 'x"


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([97, 1000, 98], "a [] b"),
        ([1000, 97], "[] a"),
        ([1000, 1000], "[] []"),
        ([97, 98], "ab"),
        ([], ""),
    ],
)
def test_added_tokens_stand_apart(ids, text):
    decoder = SpacedDecoder(Letters(), {1000: "[]"})
    assert decode(decoder, ids) == text
    assert decode(decoder, ids) == text, "a decoder can be used again"


def test_skipped_ids_leave_nothing():
    assert decode(SkippingDecoder(SpacedDecoder(Letters(), {1000: "[]"}), {1000}), [97, 1000, 98]) == "ab"


@pytest.mark.parametrize(
    ("legacy", "control", "ids", "text"),
    [
        (False, (), [1, 2, 3], " ab"),
        (True, (), [1, 2, 3], "ab"),
        (False, (), [2, 3, 2], "ab a"),
        (False, (), [4, 5], "é"),
        (False, (), [4, 3, 5], "\ufffdb\ufffd"),
        (False, (0, 6), [0, 2, 6], "<s> a</s>"),
        (True, (0, 6), [0, 2, 6], "<s> a</s>"),
        (True, (0, 6), [3, 6, 3], " b</s>b"),
    ],
)
def test_pieces(legacy, control, ids, text):
    decoder = PieceDecoder(PIECES, BYTES, control, known=PIECES.values(), legacy=legacy)
    assert decode(decoder, ids) == text == decode(decoder, ids)


@pytest.fixture(scope="module")
def spaced_model() -> sentencepiece.SentencePieceProcessor:
    """Pieces of two and of four spaces, and none of one or three; a dummy prefix is not added, as by legacy=False."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["if x:    return y", "while z:    z += 1"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@given(data=st.data())
def test_pieces_are_joined_as_sentencepiece_joins_them(spaced_model, data):
    """The original takes the mark off the first piece and gives SentencePiece what is left, known to it or not."""
    pieces = {i: spaced_model.id_to_piece(i) for i in range(3, spaced_model.get_piece_size())}
    runs = [i for i, piece in pieces.items() if piece.startswith("\u2581\u2581")]
    assert runs
    byte_values = {i: int(piece[3:5], 16) for i, piece in pieces.items() if spaced_model.is_byte(i)}
    ids = data.draw(st.lists(st.sampled_from([*runs * 20, *pieces]), max_size=6))
    texts = [pieces[i] for i in ids]
    if texts:
        texts[0] = texts[0].removeprefix("\u2581")
    decoder = PieceDecoder(pieces, byte_values, (), known=pieces.values(), legacy=False)
    assert decode(decoder, ids) == spaced_model.decode_pieces(texts)


@pytest.mark.parametrize(
    ("ids", "text"),
    [([1, 2, 3], " ab"), ([2, 3], "ab"), ([0, 2], "<s> a"), ([4, 5], "é"), ([4, 5, 4], "\ufffd\ufffd\ufffd")],
)
def test_fused_pieces(ids, text):
    decoder = FusedDecoder(PIECES, BYTES)
    assert decode(decoder, ids) == text == decode(decoder, ids)


def test_each_byte_or_each_broken_character_has_its_mark():
    broken = [0xE4, 0xBD]
    assert decode(Utf8Decoder(lambda byte: bytes([byte])), broken) == "\ufffd"
    assert decode(Utf8Decoder(lambda byte: bytes([byte]), errors="mindvlm_byte"), broken) == "\ufffd\ufffd"
