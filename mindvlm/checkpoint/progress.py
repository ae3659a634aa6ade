"""What a person sees while tensors are copied."""

from __future__ import annotations

from tqdm import tqdm

from mindvlm.checkpoint.source import TensorSource


def bytes_bar(source: TensorSource, what: str, *, show: bool) -> tqdm:
    """A bar on stderr that is full when all bytes of `source` have passed; it is gone when it closes."""
    total = sum(info.num_bytes for info in source.infos.values())
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show, leave=False)
