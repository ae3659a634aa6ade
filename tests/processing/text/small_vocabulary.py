"""A vocabulary of the 256 bytes and a few merges, for tests that need no published file."""

import base64
from pathlib import Path

from mindvlm.models.vary.tokenizer import COMPACT_SPECIAL_TOKENS
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.vocabulary import rank_vocabulary

MERGES = (b"th", b"the", b"\n\n", b"er", b"us", b"user", b"\xe4\xb8", b" a")


def small_ranks() -> dict[bytes, int]:
    tokens = [bytes([value]) for value in range(256)] + list(MERGES)
    return {token: rank for rank, token in enumerate(tokens)}


def small_tokenizer(special_tokens=COMPACT_SPECIAL_TOKENS) -> Tokenizer:
    return Tokenizer(rank_vocabulary(small_ranks()), special_tokens)


def write_rank_file(path: Path, ranks: dict[bytes, int] | None = None, newline: str = "\n") -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in (ranks or small_ranks()).items()]
    path.write_bytes((newline.join(lines) + newline).encode())
    return path
