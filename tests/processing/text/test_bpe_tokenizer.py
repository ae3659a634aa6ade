import json

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.models.vary.tokenizer import open_tokenizer, opt_tokenizer
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.vocabulary import byte_characters
from tests.golden_files import golden_json, golden_path
from tests.processing.text.small_bpe import NAMED, small_bpe, small_vocabulary, write_bpe_files

NUM_FILE_TOKENS = len(small_vocabulary())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return small_bpe(tmp_path_factory.mktemp("bpe"))


def test_tokens_of_the_file_keep_their_ids_and_the_others_follow(tokenizer):
    added = {token: NUM_FILE_TOKENS + k for k, token in enumerate(("<imgpad>", "<img>", "</img>"))}
    assert tokenizer.special_ids == {"</s>": 2, "<pad>": 1, **added}
    assert (len(tokenizer), tokenizer.pad_id, tokenizer.prefix_ids) == (NUM_FILE_TOKENS + 3, 1, [2])


def test_bytes_have_the_characters_of_gpt2():
    characters = byte_characters()
    assert len(characters) == len(set(characters.values())) == 256
    assert (characters["A"], characters["Ġ"], characters["Ċ"]) == (65, 32, 10)


@given(st.text(max_size=40))
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == tokenizer.normalize(text)
    decoder = tokenizer.text_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.normalize(text)


def test_surface_forms_are_ordinary_text_unless_armed(tokenizer):
    text = "the</s><img>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, allow_special=True)[-2:] == [2, tokenizer.special_id("<img>")]
    assert tokenizer.encode(text, allow_special=["</s>"])[1] == 2
    assert tokenizer.special_id("<img>") not in tokenizer.encode(text, allow_special=["</s>"])


def test_white_space_beside_an_image_is_dropped(tokenizer):
    armed = tokenizer.encode("a <img> \n the </img>\n\tx </s> y", allow_special=True)
    assert tokenizer.decode(armed) == "a<img>the</img>x </s> y"
    pieces = [Piece("a "), Piece("<img>", control=True), Piece(" \n"), Piece(" the "), Piece("</img>", control=True)]
    pieces += [Piece("\n"), Piece("\tx "), Piece("</s>", control=True), Piece(" y")]
    ids, owners = encode_pieces(pieces, tokenizer)
    assert ids == armed and owners == sorted(owners)
    assert owners[ids.index(tokenizer.encode("the")[0])] == 3


def test_special_tokens_are_left_out_on_demand(tokenizer):
    ids = [*tokenizer.prefix_ids, *tokenizer.encode("the"), 2]
    assert tokenizer.decode(ids) == "</s>the</s>" and tokenizer.decode(ids, skip_special=True) == "the"
    with pytest.raises(UserError, match=f"token id {len(tokenizer)}: "):
        tokenizer.decode([len(tokenizer)])


def test_added_tokens_of_a_saved_tokenizer_keep_their_ids(tmp_path):
    added = {"<img>": NUM_FILE_TOKENS, "<imgpad>": NUM_FILE_TOKENS + 1}
    tokenizer = open_tokenizer(str(write_bpe_files(tmp_path, added_tokens=added)))
    assert tokenizer.special_id("<img>") == NUM_FILE_TOKENS
    assert tokenizer.special_id("</img>") == NUM_FILE_TOKENS + 2 == len(tokenizer) - 1
    assert tokenizer.decode(tokenizer.encode("<img>")) == "<img>" and len(tokenizer.encode("<img>")) > 1


def test_a_tokenizer_json_is_the_same(tmp_path, tokenizer):
    saved = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files(tmp_path))))
    saved.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    saved.add_special_tokens(["</s>", "<pad>"])
    saved.save(str(tmp_path / "tokenizer.json"))
    again = open_tokenizer(str(tmp_path))
    text = "the user's page </s>\n 12 été 你好"
    assert again.special_ids == tokenizer.special_ids
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def files(folder):
    write_bpe_files(folder)
    return folder / "vocab.json", folder / "merges.txt"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=40))
def test_ids_are_those_of_transformers(gpt2, tokenizer, text):
    assert tokenizer.encode(text) == gpt2.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    vocab, merges = files(tmp_path_factory.mktemp("gpt2"))
    return transformers.GPT2Tokenizer.from_pretrained(
        vocab.parent, unk_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "has none of tokenizer.model, tokenizer.json, .*vocab.json"),
        (lambda folder: (folder / "merges.txt").unlink(), "merges.txt: not found; give vocab.json and merges.txt"),
        (lambda folder: (folder / "merges.txt").write_text(""), "merges.txt: 0 bytes"),
        (lambda folder: (folder / "merges.txt").write_text("no such\n"), "vocab.json: .*copy it again"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "vocab.json").write_text("[1]"), "not a JSON mapping"),
        (lambda folder: (folder / "vocab.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 1}'), "do not have the ids 0 to 0"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), "1 of 256 single bytes"),
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'),
            "not a byte-level",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    damage(write_bpe_files(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_refused(tmp_path):
    folder = write_bpe_files(tmp_path)
    assert len(open_tokenizer(str(folder), expected_vocab_size=NUM_FILE_TOKENS + 3)) == NUM_FILE_TOKENS + 3
    with pytest.raises(UserError, match=rf"{NUM_FILE_TOKENS} tokens, expected 50265 \(vocabulary of 50268 less 3"):
        open_tokenizer(str(folder / "vocab.json"), expected_vocab_size=50268)


@pytest.mark.parametrize(
    ("ids", "token", "missing"),
    [({"<imgpad>": 0, "<img>": 1, "</img>": 4}, "</img>", 2), ({"<a>": 3}, "<a>", 0)],
)
def test_a_gap_in_the_added_tokens_is_named(tmp_path, ids, token, missing):
    folder = write_bpe_files(tmp_path)
    first = NUM_FILE_TOKENS
    (folder / "added_tokens.json").write_text(json.dumps({name: first + id_ for name, id_ in ids.items()}))
    message = (
        f"added_tokens.json: gives '{token}' the id {first + ids[token]}, but no token has the id {first + missing}"
    )
    with pytest.raises(UserError, match=message):
        open_tokenizer(str(folder), expected_vocab_size=first + 3)


def test_special_tokens_must_be_distinct(tmp_path):
    file = write_bpe_files(tmp_path) / "vocab.json"
    with pytest.raises(UserError, match="special_tokens"):
        opt_tokenizer(file, ["<img>", "<img>"])
    assert set(NAMED) <= set(json.loads((tmp_path / "vocab.json").read_text()))


def test_ids_are_those_of_the_original():
    tokenizer = open_tokenizer(str(golden_path("vary/opt_prompts/vocab.json")))
    cases = golden_json("vary/opt_prompts/cases.json")
    for case in cases["strings"]:
        assert [2, *tokenizer.encode(case["text"], allow_special=True)] == case["ids"], case["text"]
