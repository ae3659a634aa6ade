"""Verifies that a converted file holds its sources: reopens it, reverses the rules and compares bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import CastSource, TensorSource, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.weights.opened import Input, Opened
from mindvlm.weights.rules.overlaid import SelectedSource
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.planning import make_plan


@dataclass(frozen=True)
class Verified:
    """Counts of the tensors that were compared bit by bit.

    Attributes:
        num_source_tensors: tensors of the sources, compared with the written ones through the reversed rules.
        num_planned_tensors: written tensors that no source holds as they are, compared with the plan: those that an
            adapter changed, and those of which a later source overrides a part.
        num_left_out: tensors of the sources that are not in the file: dropped, overridden or not selected.
    """

    num_source_tensors: int
    num_planned_tensors: int
    num_left_out: int

    def describe(self) -> str:
        """Returns one line for the summary."""
        total = self.num_source_tensors + self.num_left_out
        which = f"all {total}" if not self.num_left_out else f"{self.num_source_tensors} of {total}"
        line = f"{which} tensors of the source are in it, bit for bit"
        if self.num_planned_tensors:
            line += (
                f"; {self.num_planned_tensors} tensors that no source holds as they are were recomputed and are equal"
            )
        return line


def verify_conversion(
    opened: Opened,
    written: str | Path,
    *,
    shown_as: str | Path | None = None,
    way_out: Plan | None = None,
    buffers: TensorSource | None = None,
    dtype: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Verified:
    """Compares the tensors of the sources with the file `written`, bit by bit.

    The written tensors go back through the reversed rules of each source, so the comparison does not repeat the
    conversion.

    Args:
        opened: the sources.
        written: the file or folder written from them.
        shown_as: its name in messages, if it lies elsewhere for the time being.
        way_out: the plan from native to written names; None if they are native.
        buffers: tensors that were written beside those of `way_out`.
        dtype: the dtype that floating-point tensors were cast to; None if they were kept.
        progress: called with the number of bytes compared.

    Raises:
        UserError: a tensor is missing or superfluous, has another dtype or shape, or differs in a bit.
    """
    shown = shown_as or written
    comparison = _Comparison(shown, dtype, progress)
    with open_checkpoint(written) as checkpoint:
        native: TensorSource = checkpoint
        if way_out:
            added = set(buffers.infos) if buffers else set()
            if buffers:
                comparison.compare(buffers, checkpoint, sorted(added), "kept from the source")
            native = SelectedSource(checkpoint, [name for name in checkpoint.infos if name not in added])
            forward = way_out.table.reverse()
            native = make_plan(forward, native.infos, partial=True, origin=str(shown)).view(native)
        _compare_names(opened.source, native, shown)
        proved: set[str] = set()
        num_source_tensors = 0
        for index, one in enumerate(opened.inputs):
            names = _whole_tensors(opened, index)
            if names:
                comparison.compare(one.tensors, _led_back(one, native, shown), names, "of the source")
            num_source_tensors += len(names)
            proved.update(target for name in names for target in one.plan.targets_of(name))
        others = [name for name in native.infos if name not in proved]
        comparison.compare(opened.source, native, others, "as planned")
    total = sum(len(one.checkpoint.infos) for one in opened.inputs)
    return Verified(num_source_tensors, len(others), total - num_source_tensors)


@dataclass(frozen=True)
class _Comparison:
    """Compares tensors bit by bit; see `verify_conversion` for the fields."""

    written: str | Path
    dtype: str | None
    progress: Callable[[int], object] | None

    def compare(self, expected: TensorSource, found: TensorSource, names: Iterable[str], what: str) -> None:
        """Raises UserError unless the tensors `names` are equal; `what` describes them in the message."""
        expected = CastSource(expected, self.dtype) if self.dtype else expected
        for name in names:
            if found.infos.get(name) != expected.infos[name]:
                raise UserError(
                    f"{self.written}: verification failed, tensor {name} {what} became {found.infos.get(name)}, "
                    f"expected {expected.infos[name]}; convert again"
                )
            for chunk, wanted in zip(found.chunks(name), expected.chunks(name), strict=True):
                if not np.array_equal(chunk.view(np.uint8), wanted.view(np.uint8)):
                    raise UserError(
                        f"{self.written}: verification failed, tensor {name} {what} has other values; convert again"
                    )
                if self.progress:
                    self.progress(chunk.nbytes)


def _compare_names(expected: TensorSource, found: TensorSource, written: str | Path) -> None:
    for name in expected.infos:
        if name not in found.infos:
            raise UserError(f"{written}: verification failed, tensor {name} is missing; convert again")
    for name in found.infos:
        if name not in expected.infos:
            raise UserError(f"{written}: verification failed, holds {name}, which the sources have not; convert again")


def _whole_tensors(opened: Opened, index: int) -> list[str]:
    """Returns the tensors of a source no part of which was dropped, overridden, left out or changed by an adapter."""
    plan = opened.inputs[index].plan
    infos = opened.source.infos
    arrived = {name for name in plan.infos if opened.origins[name] == index and name in infos} - set(opened.modified)
    return [
        name
        for name in opened.inputs[index].tensors.infos
        if (targets := plan.targets_of(name)) and arrived.issuperset(targets)
    ]


def _led_back(one: Input, native: TensorSource, written: str | Path) -> TensorSource:
    """Returns the written tensors that the source contributes to, under the names of the source."""
    own = SelectedSource(native, [name for name in one.plan.infos if name in native.infos])
    return make_plan(one.plan.reverse_table(), own.infos, partial=True, origin=str(written)).view(own)
