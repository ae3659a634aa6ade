"""Reading of the official files of a benchmark from one folder."""

import ast
import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError, counted


class DataFolder:
    """The files of a benchmark.

    Args:
        root: the folder.
        needs: path of each file or folder below it, possibly a pattern for one of several names -> where it comes
            from.

    Raises:
        UserError: files are missing; the message names each of them with its origin.
    """

    def __init__(self, root: Path, needs: Mapping[str, str]):
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder of the benchmark's files as --data")
        self.root, self.needs, self.last_read = root, needs, ""
        missing = [f"{name} (from {origin})" for name, origin in needs.items() if not self.find(name).exists()]
        if missing:
            raise UserError(f"{root} lacks {counted(len(missing), 'file')}: {'; '.join(missing)}")

    def path(self, name: str) -> Path:
        """Returns the path of a file, which errors of `reading` name from now on."""
        self.last_read = name
        return self.find(name)

    def find(self, name: str) -> Path:
        """Returns the path that matches a pattern, or the path of a name."""
        if "*" in name and (found := sorted(self.root.glob(name))):
            return found[0]
        return self.root / name

    def json(self, name: str) -> Any:
        """Returns the value of a JSON file."""
        return parse_json(self.text(name), str(self.root / name))

    def json_lines(self, name: str) -> list[dict]:
        """Returns the values of a file of JSON lines."""
        # str.splitlines would also end a line at characters that JSON allows in a text, such as U+2028
        lines = enumerate(self.text(name).split("\n"), 1)
        return [parse_json(line, f"{self.root / name}: line {number}") for number, line in lines if line.strip()]

    def table(self, name: str) -> list[dict[str, str]]:
        """Returns the rows of a tab-separated file with a header, cells as text."""
        # a cell holds a whole picture
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(self.text(name), newline=""), delimiter="\t"))

    def text(self, name: str) -> str:
        """Returns the content of a text file. Raises UserError if it cannot be read."""
        try:
            return self.path(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.root / name}: cannot be read as text ({error}); get it again") from None

    def assigned_text(self, name: str, variable: str) -> str:
        """Returns the text that a Python file assigns to a variable; the file is not run."""
        for node in ast.parse(self.text(name)).body:
            if isinstance(node, ast.Assign) and variable in (getattr(target, "id", "") for target in node.targets):
                return str(ast.literal_eval(node.value))
        raise KeyError(variable)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reports a file that lacks what the code in the `with` block looks up as another version of it."""
        try:
            yield
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else f"has another form ({one_line(error)})"
            origin = self.needs.get(self.last_read, "the benchmark's page")
            raise UserError(
                f"{self.root / self.last_read}: {lacks}; it is damaged or of another version, get it from {origin}"
            ) from None


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({one_line(error)}); get the file again") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
