import json

import pytest

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer_files import ARCADE_SPECIAL_TOKENS, find_tokenizer, open_tokenizer
from mindvlm.processing.text.tokenizer_settings import read_settings
from tests.processing.text.small_bpe import small_vocabulary, write_bpe_files
from tests.processing.text.small_pieces import write_piece_files
from tests.processing.text.small_vocabulary import small_ranks, write_rank_file

END = "<|endoftext|>"
SPACES = {"  ": 269, "    ": 268}
PHI_CONFIG = {
    "tokenizer_class": "CodeGenTokenizer",
    "eos_token": END,
    "bos_token": END,
    "unk_token": END,
    "pad_token": None,
    "clean_up_tokenization_spaces": True,
}


@pytest.fixture
def phi(tmp_path):
    """A tokenizer of Phi-2's form: end of text behind the vocabulary, then runs of spaces."""
    folder = write_bpe_files(tmp_path / "phi", added_tokens=SPACES, tokenizer_config=PHI_CONFIG)
    vocabulary = small_vocabulary() | {END: len(small_vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder


def test_each_kind_is_found(tmp_path, phi):
    assert {"the", END} < open_tokenizer(phi).vocabulary.ids.keys()
    pieces = write_piece_files(tmp_path / "llama")
    assert open_tokenizer(pieces).vocabulary.byte_values
    (tmp_path / "arcade").mkdir()
    ranks = write_rank_file(tmp_path / "arcade" / "arcade100k.tiktoken")
    arcade = open_tokenizer(ranks.parent)
    assert set(ARCADE_SPECIAL_TOKENS) == arcade.special_ids.keys() and find_tokenizer(ranks) == ranks


def test_arcade_leaves_an_id_out(tmp_path):
    arcade = open_tokenizer(write_rank_file(tmp_path / "arcade100k.tiktoken"))
    num_ranks = len(small_ranks())
    assert arcade.special_id(END) == num_ranks + 1 and arcade.vocab_size == num_ranks + 1 + len(ARCADE_SPECIAL_TOKENS)
    assert len(ARCADE_SPECIAL_TOKENS) == 100289 - 100257
    assert arcade.decode([ord("a"), num_ranks, num_ranks + 1]) == "a" + END
    assert arcade.decode([ord("a"), num_ranks + 1], skip_special=True) == "a"
    with pytest.raises(UserError, match="cannot add the token '<im_start>'"):
        open_tokenizer(tmp_path, more_special_tokens=["<im_start>"])


def test_runs_of_spaces_are_tokens_of_every_text(phi):
    tokenizer = open_tokenizer(phi)
    assert tokenizer.encode("a    b  c")[1::2] == [SPACES["    "], SPACES["  "]]
    assert tokenizer.special_ids == {END: 267} and tokenizer.vocab_size == 270
    assert tokenizer.prefix_ids == [] and tokenizer.pad_id == tokenizer.special_id(END)


def test_decoded_text_is_that_of_the_slow_class(phi):
    tokenizer = open_tokenizer(phi)
    ids = tokenizer.encode("a  b .") + [267]
    assert tokenizer.decode(ids, skip_special=True) == "a    b."
    assert tokenizer.decode(ids) == f"a    b.{END}"
    config = json.loads((phi / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "CodeGenTokenizerFast", "clean_up_tokenization_spaces": False}
    (phi / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(phi).decode(ids, skip_special=True) == "a  b ."


def test_tokenizer_json_goes_before_other_files(tmp_path, phi):
    definition = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 270, "content": END, "special": True}],
        "model": {"type": "BPE", "vocab": small_vocabulary(), "merges": []},
    }
    write_rank_file(tmp_path / "arcade100k.tiktoken")
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.special_ids == {END: 270}
    # three ids are unused, text is normalised
    assert tokenizer.vocab_size == 271 and tokenizer.decode([268, 270]) == END
    assert tokenizer.normalize("e\u0301") == "\u00e9"


def test_added_tokens_keep_ids_that_do_not_follow(phi):
    (phi / "added_tokens.json").write_text(json.dumps({"    ": 269, "  ": 275}))
    tokenizer = open_tokenizer(phi)
    assert tokenizer.encode("a    b  c")[1::2] == [269, 275] and tokenizer.vocab_size == 276
    assert tokenizer.decode([269, 270, 275, 268], skip_special=True).strip() == ""
    (phi / "added_tokens.json").write_text(json.dumps({"  ": 5}))
    with pytest.raises(UserError, match="added_tokens.json: gives '  ' the id 5, which is that of '\"'; expected one"):
        open_tokenizer(phi)


def test_settings_come_from_three_files(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "pad_token": "<p>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<p>": 9, "  ": 10}))
    decoder = {"10": {"content": "  ", "special": False}, "11": {"content": "<i>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "pad_token": None}))
    settings = read_settings(tmp_path)
    assert settings.named_tokens == ("<s>", "<p>")
    assert settings.added_tokens == {"<p>": (9, True), "  ": (10, False), "<i>": (11, True)}


@pytest.mark.parametrize("contents", ["{", "[]"])
def test_damaged_settings_are_named(tmp_path, contents):
    write_piece_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(contents)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        open_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_says_what_is_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"none of tokenizer\.model, tokenizer\.json, \*\.tiktoken, vocab\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_tokenizer(tmp_path / "absent")
