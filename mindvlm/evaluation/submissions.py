"""Files in the formats of servers and original programs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError


def write_text(path: Path, content: str) -> Path:
    """Writes a text file, whose folder is created, and returns its path. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content.encode())
    return path


def write_json(path: Path, value: Any, *, indent: int | None = None) -> Path:
    """Writes a JSON file and returns its path."""
    return write_text(path, json.dumps(value, indent=indent, ensure_ascii=False))


def write_json_lines(path: Path, rows: Sequence[Any]) -> Path:
    """Writes a file of JSON lines and returns its path."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_sheet(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """Writes an Excel file with one sheet and returns its path. Raises UserError if openpyxl is not installed."""
    try:
        from openpyxl import Workbook
    except ImportError:
        raise UserError(f"{path}: Excel files need the package openpyxl; run: pip install openpyxl") from None
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        sheet.append(list(row))
    content = io.BytesIO()
    book.save(content)
    with atomic_file(path) as file:
        file.write(content.getvalue())
    return path
