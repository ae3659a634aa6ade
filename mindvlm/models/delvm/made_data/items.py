"""Items of made data: pictures that are made, skipped and resumed together."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from mindvlm.processing.code_processor import LABEL, PICTURE
from mindvlm.processing.samples.public_data import Unusable

if TYPE_CHECKING:
    from mindvlm.models.delvm.picture_codes import PictureEncoder

Group = Sequence[Image.Image]
"""Pictures that belong together: a picture and its label, frames of a video, or a single picture."""


class Item(NamedTuple):
    """Pictures that are made together.

    Attributes:
        name: unique in its task; folders are separated by "/".
        groups: for each group, the names of its pictures, without the ending .png.
        load: returns the groups, or raises `Unusable`. Threads call it.
    """

    name: str
    groups: Sequence[Sequence[str]]
    load: Callable[[], Sequence[Group]]


def pair_of(name: str) -> tuple[str, str]:
    """Returns the names of a picture and its label."""
    return f"{name}{PICTURE}", f"{name}{LABEL}"


def load_in_order(items: Iterable[Item]) -> Iterator[tuple[Item, Sequence[Group] | str]]:
    """Yields each item with its groups, or with the reason why it cannot be used. Threads load the next items."""
    num_threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        pending = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(_load, item)))
                if len(pending) > num_threads:
                    item, future = pending.popleft()
                    yield item, future.result()
            for item, future in pending:
                yield item, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _load(item: Item) -> Sequence[Group] | str:
    try:
        return item.load()
    except Unusable as reason:
        return str(reason)


def encode_in_order(
    loaded: Iterable[tuple[Item, Sequence[Group]]], encoder: "PictureEncoder"
) -> Iterator[tuple[Item, list[list[int]]]]:
    """Yields each item with the codes of each of its groups. A batch may hold pictures of several items."""
    waiting, pictures, codes = deque(), [], deque()

    def finished() -> Iterator[tuple[Item, list[list[int]]]]:
        while waiting and len(codes) >= sum(map(len, waiting[0].groups)):
            item = waiting.popleft()
            rows = [[code for _ in group for code in codes.popleft()] for group in item.groups]
            yield item, rows

    for item, groups in loaded:
        waiting.append(item)
        pictures += [picture for group in groups for picture in group]
        while len(pictures) >= encoder.batch_size:
            codes.extend(encoder(pictures[: encoder.batch_size]).tolist())
            del pictures[: encoder.batch_size]
        yield from finished()
    if pictures:
        codes.extend(encoder(pictures).tolist())
    yield from finished()
