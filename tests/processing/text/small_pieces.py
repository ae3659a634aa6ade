"""A SentencePiece model of Llama's form, trained on a few sentences, for tests that need no published file."""

import io
import json
from functools import lru_cache
from pathlib import Path

import sentencepiece

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The sky is blue.USER: What is on the table? ASSISTANT: The red cup is on the table.",
    "The cup is red.USER: What colour is the bus? ASSISTANT: The bus is red and the sky is blue.",
)
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}


@lru_cache
def small_model() -> bytes:
    """The bytes of a tokenizer.model: unknown, beginning and end marks, the 256 bytes, and some pieces.

    As in Llama's, `USER` is a piece and with a space in front it is none, which the original's label rules count on.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_piece_files(folder: Path, **settings: object) -> Path:
    """Writes tokenizer.model and tokenizer_config.json (`SETTINGS` with changes); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(small_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder
