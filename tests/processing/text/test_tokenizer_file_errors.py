"""Tokenizer files with wrong values: one line that names the file and the key."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer_files import open_tokenizer
from tests.processing.text.small_bpe import small_vocabulary, write_bpe_files
from tests.processing.text.small_pieces import write_piece_files

CONFIG, MAP, ADDED, DEFINITION, VOCABULARY = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
)
BYTE_LEVEL = {
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": small_vocabulary(), "merges": []},
}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
NAMES = {"eos_token": "</s>", "unk_token": "<unk>"}


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        open_tokenizer(folder)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        (CONFIG, {"additional_special_tokens": 5}, "additional_special_tokens is 5; expected a list of tokens"),
        (CONFIG, {"additional_special_tokens": "<i>"}, "additional_special_tokens is '<i>'; expected a list"),
        (MAP, {"additional_special_tokens": [5]}, "additional_special_tokens[0] is 5; expected a token"),
        (CONFIG, {"bos_token": 5}, "bos_token is 5; expected a token"),
        (CONFIG, {"bos_token": {"content": 5}}, "bos_token is {'content': 5}; expected a token"),
        (CONFIG, {"add_bos_token": "false"}, "add_bos_token is 'false'; expected true, false or null"),
        (CONFIG, {"legacy": 0}, "legacy is 0; expected true, false or null"),
        (CONFIG, {"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class is ['LlamaTokenizer']; expected text"),
        (CONFIG, {"added_tokens_decoder": ["a"]}, "added_tokens_decoder is ['a']; expected a mapping"),
        (CONFIG, {"added_tokens_decoder": {"a": {"content": "x"}}}, "added_tokens_decoder names 'a'; expected an id"),
        (CONFIG, {"added_tokens_decoder": {"-5": {"content": "x"}}}, "added_tokens_decoder names '-5'; expected an id"),
        (CONFIG, {"added_tokens_decoder": {"5": "x"}}, "added_tokens_decoder.5 is 'x'; expected"),
        (CONFIG, {"added_tokens_decoder": {"5": {"content": 7}}}, "added_tokens_decoder.5 is {'content': 7}; expected"),
        (ADDED, {"<x>": "y"}, "the id of '<x>' is 'y'; expected a whole number"),
        (ADDED, {"<x>": 1.5}, "the id of '<x>' is 1.5; expected a whole number"),
        (ADDED, {"<x>": -1}, "the id of '<x>' is -1; expected a whole number"),
        (ADDED, {"<x>": 10**30}, "; expected a whole number"),
    ],
)
def test_settings_of_the_wrong_kind(tmp_path, name, contents, expected):
    folder = write_piece_files(tmp_path / "model")
    (folder / name).write_text(json.dumps(contents))
    message = refusal(folder)
    assert message.startswith(f"tokenizer file {folder / name}: ") and expected in message
    assert message.endswith("copy it again")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"added_tokens": [1]}, "added_tokens[0] is 1; expected a mapping with content and id"),
        ({"added_tokens": "x"}, "added_tokens is 'x'; expected a list"),
        ({"added_tokens": [{"content": "<x>"}]}, "the id of '<x>' is None; expected a whole number"),
        ({"added_tokens": [{"content": "<x>", "id": "9"}]}, "the id of '<x>' is '9'; expected a whole number"),
        ({"added_tokens": [{"content": 5, "id": 267}]}, "added_tokens[0] is {"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "vocab is empty"),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, "the id of 'a' is '0'"),
        ({"model": {"type": "Unigram", "byte_fallback": True, "vocab": [["a", 0.0]]}}, "vocab is "),
        ({"model": {"byte_fallback": True}}, "vocab is None"),
        ({"post_processor": 5}, "post_processor is 5; expected null or a processor"),
        (
            {"post_processor": {"type": "TemplateProcessing"}},
            "post_processor is {'type': 'TemplateProcessing'}; expected",
        ),
        ({"post_processor": TEMPLATE | {"special_tokens": {}}}, "post_processor is {"),
        ({"post_processor": TEMPLATE | {"special_tokens": {"<s>": {"ids": [7], "tokens": ["<s>"]}}}}, "the id 7; exp"),
    ],
)
def test_a_definition_of_the_wrong_kind(tmp_path, changes, expected):
    (tmp_path / DEFINITION).write_text(json.dumps({**BYTE_LEVEL, **changes}))
    message = refusal(tmp_path)
    assert message.startswith(f"tokenizer file {tmp_path / DEFINITION}: ") and expected in message


def test_a_vocabulary_of_the_wrong_kind(tmp_path):
    folder = write_bpe_files(tmp_path)
    (folder / VOCABULARY).write_text(json.dumps({"a": [0]}))
    assert "vocab.json: the id of 'a' is [0]; expected a whole number" in refusal(folder)


@pytest.mark.parametrize("write", [write_bpe_files, write_piece_files])
@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        (ADDED, {"<x>": 5}, "gives '<x>' the id 5, which is that of "),
        (ADDED, {"<x>": 340, "<y>": 340}, "gives '<y>' the id 340, which is that of '<x>'; expected one token"),
        (ADDED, {"<x>": 99_999}, "gives '<x>' the id 99999; expected ids that follow the "),
        (CONFIG, {"<x>": 5}, "gives '<x>' the id 5, which is that of "),
    ],
)
def test_ids_of_added_tokens(tmp_path, write, name, tokens, expected):
    folder = write(tmp_path / "model")
    contents = tokens
    if name == CONFIG:
        contents = NAMES | {"added_tokens_decoder": {str(n): {"content": token} for token, n in tokens.items()}}
    (folder / name).write_text(json.dumps(contents))
    assert f"tokenizer file {folder / name}: {expected}" in refusal(folder)


def test_an_added_token_with_two_ids(tmp_path):
    folder = write_piece_files(tmp_path / "model")
    (folder / ADDED).write_text('{"<x>": 330, "<y>": 331, "<x>": 332}')
    assert f"{folder / ADDED}: gives '<x>' the ids 330 and 332; expected one id for a token" in refusal(folder)
    (folder / ADDED).write_text('{"<x>": 330, "<x>": 330}')
    assert open_tokenizer(folder).vocab_size == 331


def test_a_settings_file_that_is_a_git_lfs_pointer_is_named(tmp_path):
    folder = write_piece_files(tmp_path / "model")
    (folder / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n")
    assert refusal(folder).startswith(f"tokenizer file {folder / CONFIG}: a Git LFS pointer")


@pytest.mark.parametrize("write", [write_bpe_files, write_piece_files])
def test_a_git_lfs_pointer_is_named(tmp_path, write):
    folder = write(tmp_path / "model")
    for file in folder.iterdir():
        contents = file.read_bytes()
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n")
        assert f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull`" in refusal(folder)
        file.write_bytes(contents)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    write_bpe_files(tmp_path, added_tokens={"<x>": 300}, tokenizer_config=NAMES, special_tokens_map=NAMES)
    expected = open_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    tokenizer = open_tokenizer(tmp_path)
    text = "the user's <x> a"
    assert tokenizer.encode(text) == expected.encode(text) and tokenizer.special_ids == expected.special_ids
    write_piece_files(tmp_path / "pieces")
    config = tmp_path / "pieces" / CONFIG
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert open_tokenizer(tmp_path / "pieces").vocab_size == 330


@pytest.mark.parametrize("name", [CONFIG, DEFINITION])
def test_nested_too_deep(tmp_path, name):
    folder = write_piece_files(tmp_path / "model")
    if name == DEFINITION:
        (folder / "tokenizer.model").unlink()
    (folder / name).write_text("[" * 100_000)
    assert f"{name}: not JSON" in refusal(folder)


def test_what_is_valid_is_read(tmp_path):
    """null is as good as nothing."""
    names = ("additional_special_tokens", "added_tokens_decoder", "pad_token", "add_bos_token", "tokenizer_class")
    folder = write_piece_files(tmp_path / "model", **dict.fromkeys((*names, "clean_up_tokenization_spaces")))
    assert open_tokenizer(folder).vocab_size == 330
    definition = {**BYTE_LEVEL, "added_tokens": None}
    (tmp_path / DEFINITION).write_text(json.dumps(definition))
    (tmp_path / CONFIG).write_text(json.dumps(NAMES))
    assert open_tokenizer(tmp_path).vocab_size == len(small_vocabulary())


KEYS = (
    *((CONFIG, key) for key in ("bos_token", "eos_token", "additional_special_tokens", "add_bos_token", "legacy")),
    *((CONFIG, key) for key in ("added_tokens_decoder", "tokenizer_class", "clean_up_tokenization_spaces")),
    (MAP, "pad_token"),
    (ADDED, "<x>"),
    *((DEFINITION, key) for key in ("added_tokens", "model", "pre_tokenizer", "normalizer", "post_processor")),
    *((VOCABULARY, key) for key in ("a", "model")),
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 400) | st.floats() | st.text(max_size=4) | st.sampled_from((10**30, ""))
)
TOKENS = st.fixed_dictionaries({}, optional={"content": SCALARS, "id": SCALARS, "special": SCALARS, "vocab": SCALARS})
VALUES = st.recursive(
    SCALARS | TOKENS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("5", "330", "a", "vocab", "content", "type")), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES, kind=st.sampled_from(("pieces", "definition", "vocabulary")))
def test_no_value_is_a_traceback(tmp_path_factory, key, value, kind):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if kind == "pieces":
        write_piece_files(folder)
    elif kind == "vocabulary":
        write_bpe_files(folder, tokenizer_config=NAMES)
    else:
        (folder / DEFINITION).write_text(json.dumps(BYTE_LEVEL))
        (folder / CONFIG).write_text(json.dumps(NAMES))
    file = folder / key[0]
    contents = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**contents, key[1]: value}))
    try:
        open_tokenizer(folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
