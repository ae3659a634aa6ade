"""A byte-level BPE vocabulary of OPT's form: four named tokens, the 256 bytes and a few merges."""

import json
from pathlib import Path

from mindvlm.models.vary.tokenizer import opt_tokenizer
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.vocabulary import byte_characters

MERGES = ("t h", "th e", "Ġ a", "Ġ the", "e r", "u s", "us er")
NAMED = ("<s>", "<pad>", "</s>", "<unk>")


def small_vocabulary() -> dict[str, int]:
    tokens = [*NAMED, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    return {token: token_id for token_id, token in enumerate(tokens)}


def write_bpe_files(folder: Path, **others: object) -> Path:
    """Writes vocab.json and merges.txt, and further JSON files by name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(small_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    for name, contents in others.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def small_bpe(folder: Path) -> Tokenizer:
    return opt_tokenizer(write_bpe_files(folder) / "vocab.json")
