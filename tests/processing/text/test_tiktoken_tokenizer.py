import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.models.vary.tokenizer import COMPACT_SPECIAL_TOKENS, QWEN_SPECIAL_TOKENS, open_tokenizer
from mindvlm.processing.text.tokenizer import Tokenizer
from tests.golden_files import golden_json, golden_path
from tests.processing.text.small_vocabulary import small_ranks, small_tokenizer, write_rank_file

TOKENIZER = small_tokenizer()
FIRST_SPECIAL_ID = len(small_ranks())
text_with_special_forms = st.lists(st.text() | st.sampled_from(COMPACT_SPECIAL_TOKENS)).map("".join)


@given(st.text())
def test_decode_inverts_encode_up_to_nfc(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


@given(text_with_special_forms)
def test_disarmed_text_never_gives_special_ids(text):
    ids = TOKENIZER.encode(text)
    assert all(token_id < FIRST_SPECIAL_ID for token_id in ids)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


@given(text_with_special_forms)
def test_armed_text_gives_one_id_for_each_special_form(text):
    ids = TOKENIZER.encode(text, allow_special=True)
    num_forms = len([part for part in TOKENIZER.split_at_special(text) if part in TOKENIZER.special_ids])
    assert sum(token_id >= FIRST_SPECIAL_ID for token_id in ids) == num_forms


def test_only_the_named_forms_are_armed():
    ids = TOKENIZER.encode("<img><|im_end|>", allow_special={"<img>"})
    assert ids[0] == TOKENIZER.special_id("<img>")
    assert TOKENIZER.special_id("<|im_end|>") not in ids
    assert TOKENIZER.encode("</s>", allow_special={"</s>"}) == TOKENIZER.encode("</s>")


def test_special_ids_follow_the_ranks_in_order():
    assert list(TOKENIZER.special_ids.values()) == list(range(FIRST_SPECIAL_ID, TOKENIZER.vocab_size))
    assert len(QWEN_SPECIAL_TOKENS) == 217
    assert QWEN_SPECIAL_TOKENS[3] == "<|extra_0|>" and QWEN_SPECIAL_TOKENS[-3:] == ("<img>", "</img>", "<imgpad>")


def test_text_is_composed_before_it_is_split():
    assert TOKENIZER.encode("e\u0301") == TOKENIZER.encode("\u00e9")


def test_a_lone_surrogate_becomes_the_replacement_character():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"


def test_decode_replaces_cut_characters_and_can_skip_special_ids():
    ids = [TOKENIZER.special_id("<img>"), *TOKENIZER.encode("a中")[:-1]]
    assert TOKENIZER.decode(ids) == "<img>a\ufffd"
    assert TOKENIZER.decode(ids, skip_special=True) == "a\ufffd"


def test_ids_outside_the_vocabulary_are_refused():
    for token_id in (-1, TOKENIZER.vocab_size):
        with pytest.raises(UserError, match=f"token id {token_id}"):
            TOKENIZER.decode([token_id])


def test_ids_outside_the_vocabulary_that_a_model_selects_have_no_text():
    decoder, ids = TOKENIZER.text_decoder(), [*TOKENIZER.encode("a"), TOKENIZER.vocab_size, *TOKENIZER.encode("b")]
    assert "".join(map(decoder.push, ids)) + decoder.flush() == "ab"
    assert TOKENIZER.decode_bytes(ids) == b"ab"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_rank_file_is_read_with_either_line_end(tmp_path, newline):
    path = write_rank_file(tmp_path / "ranks", newline=newline)
    tokenizer = open_tokenizer(str(path), special_tokens=COMPACT_SPECIAL_TOKENS)
    assert tokenizer.encode("the user") == TOKENIZER.encode("the user")
    assert len(tokenizer) == FIRST_SPECIAL_ID + len(COMPACT_SPECIAL_TOKENS)


def test_another_number_of_ranks_than_expected_is_refused(tmp_path):
    path = write_rank_file(tmp_path / "ranks")
    with pytest.raises(UserError, match="264 tokens, expected 151643"):
        open_tokenizer(str(path), expected_vocab_size=151860)


def damaged(content: bytes):
    return pytest.param(content, id=repr(content[:20]))


@pytest.mark.parametrize(
    "content",
    [
        damaged(b""),
        damaged(b"hello world, not a rank file\n"),
        damaged(b"!!!! 0\n"),
        damaged(b"YQ== one\n"),
        damaged(b"YQ== 1\n"),
        damaged(b"YQ== 0\nYQ== 1\n"),
        damaged(b"YQ== 0\nYg== 1\n"),
        damaged(bytes(range(256)) * 10),
    ],
)
def test_a_damaged_rank_file_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken.tiktoken") as error:
        open_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_rank_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.tiktoken: no such file"):
        open_tokenizer(str(tmp_path / "absent.tiktoken"))


def test_repeated_special_tokens_are_refused():
    with pytest.raises(UserError, match="special_tokens"):
        small_tokenizer(["<img>", "<img>"])


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return open_tokenizer(str(golden_path("vary/qwen.tiktoken")), expected_vocab_size=151860)


def test_strings_are_encoded_as_the_original_does(qwen):
    for case in golden_json("vary/prompts/strings.json"):
        assert qwen.encode(case["text"], allow_special=True) == case["ids"], case["text"]


@pytest.mark.parametrize("name", ["strings", "decode"])
def test_ids_are_decoded_as_the_original_does(qwen, name):
    for case in golden_json(f"vary/prompts/{name}.json"):
        assert qwen.decode(case["ids"]) == case["decoded"]
        assert qwen.decode(case["ids"], skip_special=True) == case["decoded_skip_special"]


def test_known_ids_of_qwen(qwen):
    assert qwen.encode("a   b") == [64, 256, 293]
    assert qwen.encode("写出这幅图中所有文字。") == [112672, 43288, 99708, 28029, 15946, 55338, 87335, 1773]
    assert [qwen.special_id(token) for token in ("<|endoftext|>", "<img>", "</img>", "<imgpad>")] == [
        151643,
        151857,
        151858,
        151859,
    ]
