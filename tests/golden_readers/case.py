"""One recorded case: a folder with a README, a config, weights, inputs and outputs, all optional."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class UnusableCase(Exception):
    """Raised for a folder that cannot be run; the message is one line."""


@dataclass(frozen=True)
class Case:
    """The contents of a case folder; missing files give empty attributes.

    Attributes:
        config: contents of config.json.
        inputs, outputs: the arrays of inputs.npz and outputs.npz.
        documents: contents of every other JSON file, by name.
        readme: text of README.md.
        family_readme: text of the README.md beside the folder.
    """

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    documents: dict[str, Any]
    readme: str
    family_readme: str

    @classmethod
    def open(cls, folder: str | Path) -> "Case":
        """Reads all files except the weights.

        Raises:
            UnusableCase: the folder does not exist or contains a damaged file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UnusableCase(f"{folder}: no such folder; give the folder of one case")
        try:
            documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
            config = documents.pop("config.json", {})
            return cls(
                folder=folder,
                config=config,
                inputs=read_arrays(folder / "inputs.npz"),
                outputs=read_arrays(folder / "outputs.npz"),
                documents=documents,
                readme=read_text(folder / "README.md"),
                family_readme=read_text(folder.resolve().parent / "README.md"),
            )
        except (ValueError, OSError) as error:
            raise UnusableCase(f"{folder}: cannot be read ({' '.join(str(error).split())})") from None

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    def pictures(self) -> list[Path]:
        """The image files of the folder, by name."""
        return sorted(path for path in self.folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def vocabulary(self) -> Path | None:
        """The tiktoken rank file in the folder or beside it."""
        found = [*sorted(self.folder.glob("*.tiktoken")), *sorted(self.folder.resolve().parent.glob("*.tiktoken"))]
        return found[0] if found else None

    def meaning(self, array: str) -> str:
        """Returns the description of an array in the README's table; empty if the table does not name it."""
        for line in self.readme.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) > 1 and re.match(rf"`{re.escape(array)}`", cells[0]):
                return cells[-1]
        return ""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
