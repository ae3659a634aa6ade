"""The comparisons of one case with their errors, and the values that were not compared."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

FORWARD_BOUND, TRAINING_BOUND, IDENTICAL = 1e-5, 1e-4, 0.0
# One pixel in a million that is off by one grey level exceeds this relative error.
PIXEL_BOUND = 1e-6


@dataclass(frozen=True)
class Item:
    """One comparison.

    `error` is the relative Frobenius error, or None if only equality counts or the error is not finite.
    """

    name: str
    holds: bool
    result: str
    error: float | None
    bound: float
    note: str = ""

    def line(self) -> str:
        bound = "identical" if self.bound == IDENTICAL else f"<= {self.bound:.0e}"
        note = f"  ({self.note})" if self.note else ""
        return f"{'PASS' if self.holds else 'FAIL'}  {self.name:<52} {self.result:<22} bound {bound}{note}"


class Report:
    """Collects the comparisons of one case.

    Args:
        recorded: the expected arrays; each must be compared or skipped once.
    """

    def __init__(self, case: str, kind: str, mode: str, recorded: dict[str, np.ndarray]):
        self.case, self.kind, self.mode = case, kind, mode
        self.recorded = recorded
        self.open_names = set(recorded)
        self.items: list[Item] = []
        self.not_compared: dict[str, str] = {}
        self.kernels = "off"
        self.seconds = 0.0

    def close(
        self, name: str, actual: np.ndarray, *, bound: float = FORWARD_BOUND, at: np.ndarray | None = None, note=""
    ) -> None:
        """Compares an array with the recorded one of that name; integers must be identical.

        Args:
            at: boolean index of leading axes; only these elements are compared.
        """
        self.open_names.discard(name)
        expected, actual = self.recorded[name], np.asarray(actual)
        if actual.shape != expected.shape:
            self.fail(name, f"shape {list(actual.shape)}, recorded {list(expected.shape)}", bound=bound)
            return
        if expected.dtype.kind in "iub":
            bound = IDENTICAL
        if at is not None:
            note = f"{note + ', ' if note else ''}{int(at.sum())} of {at.size} places"
            expected, actual = expected[at], actual[at]
        if actual.size == 0:
            self.skip(name, f"nothing to compare ({note or 'empty'})")
            return
        error = relative_error(actual, expected)
        result = "identical" if error == 0 else f"{error:.2e}"
        finite = error if np.isfinite(error) else None
        self.items.append(Item(name, bool(error <= bound), result, finite, bound, note))

    def check(self, name: str, error: float, *, bound: float, note: str = "") -> None:
        """Adds an error measured elsewhere."""
        self.open_names.discard(name)
        finite = error if np.isfinite(error) else None
        self.items.append(Item(name, bool(error <= bound), f"{error:.2e}", finite, bound, note))

    def same(self, name: str, pairs: Sequence[tuple[str, object, object]], note: str = "") -> None:
        """Compares values that must be equal, given as (label, actual, recorded)."""
        self.open_names.discard(name)
        wrong = [label for label, actual, recorded in pairs if actual != recorded]
        count = f"{len(pairs)} entries" if len(pairs) > 1 else ""
        note = ", ".join(text for text in (note, count) if text)
        if wrong:
            self.fail(name, f"{len(wrong)} of {len(pairs)} differ", note=f"first: {wrong[0]}")
        elif pairs:
            self.items.append(Item(name, True, "identical", None, IDENTICAL, note))

    def fail(self, name: str, result: str, *, bound: float = IDENTICAL, note: str = "") -> None:
        self.open_names.discard(name)
        self.items.append(Item(name, False, result, None, bound, note))

    def skip(self, name: str, reason: str) -> None:
        """Records that a value is not compared, with the reason."""
        self.open_names.discard(name)
        self.not_compared[name] = reason

    def skip_rest(self, reason: str) -> None:
        for name in self.recorded:
            if name in self.open_names:
                self.skip(name, reason)

    @property
    def holds(self) -> bool:
        return bool(self.items) and all(item.holds for item in self.items)

    def text(self) -> str:
        """Formats one line per item, then the values that were not compared, then the verdict."""
        failed = sum(not item.holds for item in self.items)
        errors = [item for item in self.items if item.error]
        worst = max(errors, key=lambda item: item.error / (item.bound or 1e-30), default=None)
        lines = [item.line() for item in self.items]
        lines += [f"----  {name:<52} not compared: {reason}" for name, reason in self.not_compared.items()]
        verdict = "PASS" if self.holds else "FAIL"
        near = f"; nearest to its bound: {worst.name} {worst.error:.2e}" if worst else ""
        lines.append(
            f"{verdict}  {self.case} ({self.kind}, {self.mode}): {len(self.items)} compared, {failed} failed, "
            f"{len(self.not_compared)} not compared{near}; {self.seconds:.0f} s"
        )
        return "\n".join(lines)

    def json(self) -> str:
        """Formats the report as one JSON object on one line."""
        return json.dumps(
            {
                "case": self.case,
                "kind": self.kind,
                "mode": self.mode,
                "kernels": self.kernels,
                "holds": self.holds,
                "items": [asdict(item) for item in self.items],
                "not_compared": self.not_compared,
                "seconds": round(self.seconds, 1),
            }
        )


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the Frobenius norm of the difference over that of the expected array (over 1 if that is zero).

    NaN gives infinity, unless both elements are NaN, as the mean over no labels is.
    """
    both = np.isnan(actual) & np.isnan(expected)
    actual, expected = actual[~both], expected[~both]
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    norm = float(np.linalg.norm(expected.astype(np.float64).ravel()))
    error = float(np.linalg.norm(difference.ravel())) / (norm or 1.0)
    return error if np.isfinite(error) else float("inf")
