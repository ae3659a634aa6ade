"""The tokenizers of a recorded TinyLLaVA text case, opened like those of a checkpoint folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_files import open_tokenizer

# variant in the records -> folder, and what its tokenizer_config.json says
VARIANTS = {
    "bpe": ("bpe", {}),
    "bpe_fast": ("bpe", {"tokenizer_class": "CodeGenTokenizerFast"}),
    "spm": ("spm", {"legacy": False}),
    "spm_legacy": ("spm", {"legacy": True}),
    "spm_fast": ("spm", {"tokenizer_class": "LlamaTokenizerFast"}),
    "arcade": ("arcade", {}),
}
PIECE_MODEL_BYTES = "tokenizer_model.npz"


class Vocabularies:
    """The tokenizers of a folder `tokenizers`.

    Args:
        source: the folder `tokenizers`.
        scratch: an empty folder, because the record stores tokenizer.model under another name.
    """

    def __init__(self, source: Path, scratch: Path):
        self.source, self.scratch = source, scratch
        self.opened: dict[tuple, Tokenizer] = {}

    def get(self, variant: str, *, more_special_tokens: Sequence[str] = (), pad_token: str | None = None) -> Tokenizer:
        """Returns the tokenizer with that recorded name, with `<image>` as a placeholder."""
        key = (variant, tuple(more_special_tokens), pad_token)
        if key not in self.opened:
            more = list(more_special_tokens)
            if pad_token and variant != "arcade":
                more.append(pad_token)
            tokenizer = open_tokenizer(self.folder(variant), more_special_tokens=more)
            tokenizer.pad_token = pad_token or tokenizer.pad_token
            tokenizer.add_placeholder(IMAGE_MARKER)
            self.opened[key] = tokenizer
        return self.opened[key]

    def folder(self, variant: str) -> Path:
        """Returns a folder in the layout of a checkpoint."""
        target = self.scratch / variant
        if target.exists():
            return target
        name, settings = VARIANTS[variant]
        target.mkdir()
        for path in (self.source / name).iterdir():
            shutil.copyfile(path, target / path.name)
        if (target / PIECE_MODEL_BYTES).exists() and not variant.endswith("fast"):
            with np.load(target / PIECE_MODEL_BYTES) as arrays:
                (target / "tokenizer.model").write_bytes(arrays["tokenizer_model"].tobytes())
        config = target / "tokenizer_config.json"
        known = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        config.write_text(json.dumps({**known, **settings}), encoding="utf-8")
        return target
