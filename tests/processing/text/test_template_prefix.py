"""Prompts of a tokenizer.json with the tokens that its post_processor puts in front, compared with the library."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from mindvlm.processing.text.tokenizer_files import open_tokenizer
from tests.golden_files import golden_path
from tests.processing.text.small_bpe import small_vocabulary

TEXTS = ("", "the user's page", " a  b\n", "été 你好", "</s>a", "a</s>b </s>\u2581c")
texts = st.lists(st.sampled_from(("</s>", "a", "the", " ", "\u00e9", "\n", "USER")), max_size=8).map("".join)


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 2)])


@pytest.mark.parametrize(
    ("processor", "prefix"),
    [
        (None, []),
        (processors.ByteLevel(), []),
        (template("<s> $A"), [0]),
        (template("</s> <s> $A"), [2, 0]),
        (template("$A </s>"), []),
        (processors.Sequence([processors.ByteLevel(), template("<s> $A")]), [0]),
    ],
)
def test_byte_level(tmp_path, processor, prefix):
    library = tokenizers.Tokenizer(models.BPE(small_vocabulary(), []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<s>", "</s>"])
    if processor:
        library.post_processor = processor
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.prefix_ids == prefix
    for text in TEXTS:
        expected = library.encode(text).ids
        ids = tokenizer.prefix_ids + tokenizer.encode(text, allow_special=True)
        assert ids == expected[: len(ids)] and expected[len(ids) :] in ([], [2])


@pytest.mark.parametrize(("says", "prefix"), [(True, [0]), (False, []), (None, [2])])
def test_add_bos_token_overrides_the_template(tmp_path, says, prefix):
    library = tokenizers.Tokenizer(models.BPE(small_vocabulary(), []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = template("</s> $A")
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": says}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(tmp_path).prefix_ids == prefix


RECORDED = {
    "Llama-3": ("slime/templates/tokenizer_l3/tokenizer.json", "<|end_of_text|>", "<|begin_of_text|>"),
    "Llama-2": ("slime/templates/tokenizer_v1/tokenizer.json", "</s>", "<s>"),
    "Llama-2 non-legacy": ("slime/templates/tokenizer_v1/tokenizer_nonlegacy.json", "</s>", "<s>"),
}


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request, tmp_path_factory):
    """A recorded tokenizer.json, opened here and by the library."""
    path, end, beginning = RECORDED[request.param]
    folder, file = tmp_path_factory.mktemp("recorded"), golden_path(path)
    (folder / "tokenizer.json").write_bytes(file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": beginning}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_tokenizer(folder), tokenizers.Tokenizer.from_file(str(file)), end


@given(text=texts)
def test_recorded_files_have_the_ids_of_the_library(recorded, text):
    tokenizer, library, end = recorded
    text = text.replace("</s>", end)
    expected = library.encode(text).ids
    assert tokenizer.prefix_ids == library.encode("").ids and len(tokenizer.prefix_ids) == 1
    assert tokenizer.prefix_ids + tokenizer.encode(text, allow_special=True) == expected
