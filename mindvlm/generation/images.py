"""Encoding of pictures to feature rows for the placeholders of a prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mindspore import Tensor

from mindvlm.generation.engine import Engine, concatenated
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
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, pictures: Sequence[Picture], context: Sequence[int] = ()) -> ImageFeatures:
        """Returns the feature rows of pictures.

        Args:
            pictures: in the order of their placeholders.
            context: ids of the prompt without placeholders; a family's rows, and their number, may depend on it.
        """
        model = self.engine.model
        rows = [model.picture_rows(self.encode_views(one), one.layout, context) for one in pictures]
        return ImageFeatures(concatenated(rows), [len(one) for one in rows])

    def encode_views(self, picture: Picture) -> Tensor:
        """Returns the features of a picture's V views, (V, T, hidden)."""
        found = []
        for view in picture.views:
            pixels = list(vars(view).values())
            digest = hashlib.sha256(b"".join(array.tobytes() for array in pixels)).hexdigest()
            if digest not in self.cache:
                self.cache[digest] = self.engine.encode_images(*(array[None] for array in pixels))
                if len(self.cache) > MAX_CACHED_VIEWS:
                    self.cache.popitem(last=False)
            self.cache.move_to_end(digest)
            found.append(self.cache[digest])
        return concatenated(found)
