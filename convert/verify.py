"""Proof that a converted file holds its source: re-opened, led back through the rules and compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import CastSource, TensorSource, open_checkpoint
from mindvlm.convert.plan import Plan
from mindvlm.errors import UserError


def verify_conversion(
    source: TensorSource,
    plan: Plan,
    written: str | Path,
    *,
    dtype: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> int:
    """Compare every tensor of `source` that `plan` keeps with the file `written`; return how many there are.

    The written tensors go back through the reversed rules, so the comparison does not repeat the way they came. With
    `dtype` the source is cast in the same way first. `progress` is called with a name and the bytes compared.

    Raises:
        UserError: a tensor is missing, has another dtype or shape, or differs in a bit.
    """
    expected = source if dtype is None else CastSource(source, dtype)
    with open_checkpoint(written) as checkpoint:
        back = plan.table.reverse().plan(checkpoint.infos, origin=str(written)).view(checkpoint)
        names = [name for name in source.infos if name not in plan.dropped]
        for name in names:
            if back.infos.get(name) != expected.infos[name]:
                raise UserError(
                    f"{written}: verification failed, tensor {name} of the source became {back.infos.get(name)}, "
                    f"expected {expected.infos[name]}; convert again"
                )
            for chunk, wanted in zip(back.chunks(name), expected.chunks(name), strict=True):
                if not np.array_equal(chunk.view(np.uint8), wanted.view(np.uint8)):
                    raise UserError(f"{written}: verification failed, tensor {name} has other values; convert again")
                if progress:
                    progress(name, chunk.nbytes)
        extra = [name for name in back.infos if name not in source.infos]
        if extra:
            raise UserError(f"{written}: verification failed, holds {extra[0]}, which the source has not")
    return len(names)
