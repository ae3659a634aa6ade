"""Proof that a converted file holds its sources: re-opened, led back through the rules and compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import CastSource, TensorSource, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.weights.opened import Layer, Opened
from mindvlm.weights.rules.layered import SelectedSource
from mindvlm.weights.rules.plan import Plan

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Verified:
    """What was compared bit by bit.

    Attributes:
        num_source_tensors: tensors of the sources, with the written ones led back through the reversed rules.
        num_planned_tensors: written tensors that no source holds as they are, with what was planned: those that an
            adapter changed, and those of which a later source overrides a part.
        num_left_out: tensors of the sources that are not in the file: dropped, overridden or not selected.
    """

    num_source_tensors: int
    num_planned_tensors: int
    num_left_out: int

    def describe(self) -> str:
        """One line for people."""
        total = self.num_source_tensors + self.num_left_out
        which = f"all {total}" if not self.num_left_out else f"{self.num_source_tensors} of {total}"
        line = f"{which} tensors of the source are in it, bit for bit"
        if self.num_planned_tensors:
            line += (
                f"; {self.num_planned_tensors} tensors that no source holds as they are were computed again and equal"
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
    progress: Progress | None = None,
) -> Verified:
    """Compare the tensors of the sources with the file `written`, bit by bit.

    The written tensors go back through the reversed rules of each source, so the comparison does not repeat the way
    they came.

    Args:
        opened: the sources.
        written: what was written from them.
        shown_as: what to call it in messages, if it lies elsewhere for the time being.
        way_out: the plan from native to written names; None if they are native.
        buffers: tensors that were written beside those of `way_out`.
        dtype: what floating-point tensors were cast to; None if they were kept.
        progress: called with a name and the bytes compared.

    Raises:
        UserError: a tensor is missing or superfluous, has another dtype or shape, or differs in a bit.
    """
    with open_checkpoint(written) as checkpoint:
        written = shown_as or written
        native: TensorSource = checkpoint
        if way_out:
            added = set(buffers.infos if buffers else ())
            _Comparison(written, "kept from the source", dtype, progress)(buffers, checkpoint, sorted(added))
            native = SelectedSource(checkpoint, [name for name in checkpoint.infos if name not in added])
            forward = way_out.table.reverse()
            native = forward.plan(native.infos, partial=True, origin=str(written)).view(native)
        _compare_names(opened.source, native, written)
        proved: set[str] = set()
        num_source_tensors = 0
        for index, layer in enumerate(opened.layers):
            names = _whole_tensors(opened, index)
            compare = _Comparison(written, "of the source", dtype, progress)
            compare(layer.checkpoint, _led_back(layer, native, written), names)
            num_source_tensors += len(names)
            proved.update(target for name in names for target in layer.plan.targets_of(name))
        others = [name for name in native.infos if name not in proved]
        _Comparison(written, "as planned", dtype, progress)(opened.source, native, others)
    total = sum(len(layer.checkpoint.infos) for layer in opened.layers)
    return Verified(num_source_tensors, len(others), total - num_source_tensors)


@dataclass(frozen=True)
class _Comparison:
    written: str | Path
    what: str
    dtype: str | None
    progress: Progress | None

    def __call__(self, expected: TensorSource | None, found: TensorSource, names: Sequence[str]) -> None:
        if not names:
            return
        expected = CastSource(expected, self.dtype) if self.dtype else expected
        for name in names:
            if found.infos.get(name) != expected.infos[name]:
                raise UserError(
                    f"{self.written}: verification failed, tensor {name} {self.what} became {found.infos.get(name)}, "
                    f"expected {expected.infos[name]}; convert again"
                )
            for chunk, wanted in zip(found.chunks(name), expected.chunks(name), strict=True):
                if not np.array_equal(chunk.view(np.uint8), wanted.view(np.uint8)):
                    raise UserError(
                        f"{self.written}: verification failed, tensor {name} {self.what} has other values; "
                        "convert again"
                    )
                if self.progress:
                    self.progress(name, chunk.nbytes)


def _compare_names(expected: TensorSource, found: TensorSource, written: str | Path) -> None:
    for name in expected.infos:
        if name not in found.infos:
            raise UserError(f"{written}: verification failed, tensor {name} is missing; convert again")
    for name in found.infos:
        if name not in expected.infos:
            raise UserError(f"{written}: verification failed, holds {name}, which the sources have not; convert again")


def _whole_tensors(opened: Opened, index: int) -> list[str]:
    """Tensors of a layer that arrived whole: not dropped, overridden, left out or changed by an adapter in any part."""
    plan = opened.layers[index].plan
    infos = opened.source.infos
    arrived = {name for name in plan.infos if opened.origins[name] == index and name in infos} - set(opened.modified)
    return [
        name
        for name in opened.layers[index].checkpoint.infos
        if (targets := plan.targets_of(name)) and arrived.issuperset(targets)
    ]


def _led_back(layer: Layer, native: TensorSource, written: str | Path) -> TensorSource:
    """The written tensors that the layer had a say in, under the layer's own names."""
    own = SelectedSource(native, [name for name in layer.plan.infos if name in native.infos])
    return layer.plan.reverse_table().plan(own.infos, partial=True, origin=str(written)).view(own)
