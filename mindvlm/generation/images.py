"""Encoding of pictures to feature rows for the placeholders of a prompt."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor

from mindvlm.generation.engine import Engine
from mindvlm.nn.rows import concatenated, rows_between
from mindvlm.processing.images.picture import Picture

MAX_CACHED_VIEWS = 16


@dataclass(frozen=True)
class ImageFeatures:
    """Feature rows of pictures.

    Attributes:
        rows: (R, hidden), in the order of the placeholders; None without pictures.
        counts: number of rows of each picture.
    """

    rows: Tensor | None = None
    counts: list[int] = field(default_factory=list)

    def followed_by(self, other: "ImageFeatures") -> "ImageFeatures":
        """Returns the features of both, in order."""
        rows = concatenated(rows for rows in (self.rows, other.rows) if rows is not None)
        return ImageFeatures(rows, self.counts + other.counts)


class ImageEncoder:
    """Encodes pictures and caches the features of recent views.

    Args:
        engine: runs the vision graph.

    Attributes:
        batch_sizes: numbers of views that are encoded together, the largest first and 1 last.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self.batch_sizes = (1,)

    def encode(self, pictures: Sequence[Picture], context: Sequence[int] = ()) -> ImageFeatures:
        """Returns the feature rows of pictures; arguments as in `rows`."""
        return self.rows(pictures, self.encode_views(pictures), context)

    def rows(self, pictures: Sequence[Picture], features: Sequence[Tensor], context: Sequence[int]) -> ImageFeatures:
        """Returns the feature rows of pictures.

        Args:
            pictures: in the order of their placeholders.
            features: those of the views of each picture.
            context: ids of the prompt without placeholders; a family's rows, and their number, may depend on it.
        """
        model = self.engine.model
        rows = [
            model.picture_rows(of_views, one.layout, context) for one, of_views in zip(pictures, features, strict=True)
        ]
        return ImageFeatures(concatenated(rows), [len(one) for one in rows])

    def encode_views(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Returns the features of the V views of each picture, (V, T, hidden)."""
        pixels: dict[bytes, list[np.ndarray]] = {}
        for picture in pictures:
            if picture.features is not None:
                continue
            views = [list(vars(view).values()) for view in picture.views]
            pixels |= zip(picture.digests, views, strict=True)
        found = {digest: self.cache[digest] for digest in pixels if digest in self.cache}
        for batch in self.batches({digest: view for digest, view in pixels.items() if digest not in found}):
            features = self.engine.encode_images(
                *map(np.stack, zip(*(pixels[digest] for digest in batch), strict=True))
            )
            found |= {digest: rows_between(features, at, at + 1) for at, digest in enumerate(batch)}
        for digest in pixels:
            self.cache[digest] = found[digest]
            self.cache.move_to_end(digest)
        while len(self.cache) > MAX_CACHED_VIEWS:
            self.cache.popitem(last=False)
        return [
            concatenated(found[digest] for digest in picture.digests)
            if picture.features is None
            else Tensor(picture.features)
            for picture in pictures
        ]

    def batches(self, pixels: Mapping[bytes, Sequence[np.ndarray]]) -> Iterator[list[bytes]]:
        """Yields the digests of views that are encoded together, which have the same shapes."""
        groups: dict[tuple, list[bytes]] = {}
        for digest, view in pixels.items():
            groups.setdefault(tuple(array.shape for array in view), []).append(digest)
        for group in groups.values():
            while group:
                size = next(size for size in self.batch_sizes if size <= len(group))
                yield group[:size]
                group = group[size:]
