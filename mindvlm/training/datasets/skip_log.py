"""The list of samples that cannot be used."""

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.samples import Skipped

logger = logging.getLogger(__name__)


class SkipLog:
    """Counts skipped samples and lists each record once, as JSON lines; extends the list of an earlier run.
    The first skips of a run are logged.

    Args:
        path: the list; None counts only.
    """

    SHOWN = 5

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path is not None else None
        self.by_dataset: Counter[str] = Counter()
        self.listed = self._read()

    @property
    def num_skipped(self) -> int:
        """Samples skipped since this log was created; a record skipped in two epochs counts twice."""
        return self.by_dataset.total()

    def add(self, skipped: Skipped) -> None:
        """Counts a sample and, unless its record is listed, lists it."""
        self.by_dataset[skipped.dataset] += 1
        if self.num_skipped <= self.SHOWN:
            more = "; further ones are only listed" if self.num_skipped == self.SHOWN else ""
            logger.info(f"skipped: {skipped}{more}")
        key = (skipped.dataset, skipped.record)
        if self.path is None or key in self.listed:
            return
        self.listed.add(key)
        # a lone surrogate becomes its JSON escape
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(asdict(skipped), ensure_ascii=False) + "\n")

    def _read(self) -> set[tuple[str, int]]:
        if self.path is None or not self.path.exists():
            return set()
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            # a killed run leaves an incomplete last line
            self.path.write_text("".join(lines := lines[:-1]), encoding="utf-8")
        try:
            entries = [json.loads(line) for line in lines]
            return {(entry["dataset"], entry["record"]) for entry in entries}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: is not a list of skipped samples; move it away") from None
