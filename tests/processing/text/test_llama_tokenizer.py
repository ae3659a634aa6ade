import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_files import llama_tokenizer, open_tokenizer
from mindvlm.processing.text.tokenizer_settings import TokenizerSettings
from mindvlm.processing.text.vocabulary import piece_vocabulary, read_piece_model
from tests.golden_files import golden_json, golden_path
from tests.processing.text.small_pieces import small_model, write_piece_files

texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581\x00"), max_size=20)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[bool, Tokenizer]:
    """By `legacy`."""
    folder = tmp_path_factory.mktemp("pieces")
    return {legacy: open_tokenizer(write_piece_files(folder / str(legacy), legacy=legacy)) for legacy in (True, False)}


@given(texts)
def test_text_comes_back(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids).decode() == (" " + text if text else "")
    assert tokenizers[False].decode(tokenizers[False].encode(text)) == text


@given(texts.filter(bool))
def test_ids_are_those_of_sentencepiece(tokenizers, text):
    library = sentencepiece.SentencePieceProcessor(model_proto=small_model())
    assert tokenizers[True].encode(text) == tokenizers[False].encode(text) == library.encode(text)


@given(texts, texts)
def test_every_id_belongs_to_the_piece_in_which_it_begins(tokenizers, first, second):
    pieces = [Piece(first), Piece("</s>", control=True), Piece(second)]
    ids, owners = encode_pieces(pieces, tokenizers[False])
    assert owners == sorted(owners)
    behind = [token_id for token_id, owner in zip(ids, owners, strict=True) if owner == 2]
    assert tokenizers[False].decode_bytes(behind).decode() == second


@given(st.lists(st.integers(0, 329), max_size=12), st.booleans(), st.booleans())
def test_all_pieces_of_a_stream_are_the_text(tokenizers, ids, legacy, skip_special):
    tokenizer = tokenizers[legacy]
    decoder = tokenizer.text_decoder(skip_special=skip_special)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids, skip_special=skip_special)


def test_where_text_begins_anew(tokenizers):
    tokenizer = tokenizers[False]
    tokenizer.add_placeholder("<image>")
    start = tokenizer.encode("the cup")
    assert tokenizer.prefix_ids == [1] and tokenizer.special_id("<image>") == -200
    assert tokenizer.encode("<image>the cup", allow_special=True) == [-200, *start]
    assert tokenizer.encode("</s>the cup", allow_special=True) == [2, *tokenizer.encode("the cup", continues=True)]
    assert tokenizer.encode("the cup", continues=True) != start
    legacy = tokenizers[True]
    assert legacy.encode("</s>the cup", allow_special=True) == [2, *legacy.encode("the cup")]


def test_control_tokens_in_text_are_text(tokenizers):
    for token in ("</s>", "<s>", "<unk>", "<image>"):
        ids = tokenizers[False].encode(f"a{token}b")
        assert not {0, 1, 2, -200} & set(ids) and tokenizers[False].decode(ids) == f"a{token}b"


def test_both_files_of_one_vocabulary_agree(tmp_path):
    recorded = golden_path("tinyllava/templates/tokenizers/spm")
    model = open_tokenizer(recorded)
    texts = [entry["text"] for entry in golden_json("tinyllava/templates/encode.json")]
    expected = [entry["ids"]["spm"][1:] for entry in golden_json("tinyllava/templates/encode.json")]
    assert [model.encode(text, allow_special=True) for text in texts] == expected
    config = json.loads((recorded / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    (tmp_path / "tokenizer.json").write_bytes((recorded / "tokenizer.json").read_bytes())
    fast = open_tokenizer(tmp_path)
    assert (model.style, fast.style) == ("continuous", "fast")
    assert fast.encode("a</s>b", allow_special=True) != model.encode("a</s>b", allow_special=True)


def test_more_tokens_get_the_next_ids(tmp_path):
    folder = write_piece_files(tmp_path)
    tokenizer = open_tokenizer(folder, more_special_tokens=["<im_start>", "</s>"])
    assert tokenizer.special_id("<im_start>") == 330 and tokenizer.vocab_size == 331
    assert tokenizer.decode([330, 2], skip_special=True) == ""


def test_bad_files_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not found"):
        read_piece_model(tmp_path / "absent.model")
    vocabulary = piece_vocabulary({0: "<unk>", 1: "a"}, lambda text: [])
    with pytest.raises(UserError, match="lacks the token '<s>'"):
        llama_tokenizer(vocabulary, TokenizerSettings(), "fast")


def test_ids_outside_the_vocabulary_are_refused(tokenizers):
    with pytest.raises(UserError, match="ids 0 to 329"):
        tokenizers[False].decode([330])
