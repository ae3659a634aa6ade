"""Several sources as one, and parts of a source: layers over a base, a selection of tensors, the first rows of some."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import ConversionError, find_conflict


class LayeredSource(TensorSource):
    """Sources of native names laid over each other: of tensors of one name, the last layer's is taken.

    Attributes:
        labels: what each layer is called.
        origins: for each tensor the index of the layer that it is taken from.
        overridden: tensors that a later layer replaces: name and index of the layer whose tensor is not used.

    Raises:
        ConversionError: a tensor has another shape, or another kind of numbers, than the one that it replaces.
    """

    def __init__(self, layers: Sequence[tuple[str, TensorSource]]):
        if not layers:
            raise UserError("no source was given; name at least one checkpoint")
        self.labels = tuple(label for label, _ in layers)
        self.path: Path = layers[0][1].path
        self.infos: dict[str, TensorInfo] = {}
        self.origins: dict[str, int] = {}
        self.overridden: list[tuple[str, int]] = []
        self._sources = [source for _, source in layers]
        for index, source in enumerate(self._sources):
            self._lay(index, source)

    @property
    def recipe(self) -> str:
        return " ".join(filter(None, (source.recipe for source in self._sources)))

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._sources[self.origins[name]].read_range(name, start, stop)

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _lay(self, index: int, source: TensorSource) -> None:
        findings = []
        for name, info in source.infos.items():
            below = self.infos.get(name)
            if below is not None:
                findings.append(find_conflict(name, info, below, self.labels[self.origins[name]]))
                self.overridden.append((name, self.origins[name]))
            self.infos[name] = info
            self.origins[name] = index
        found = [finding for finding in findings if finding]
        if found:
            raise ConversionError(f"{self.labels[index]} does not fit over the layers below it", found)


class SelectedSource(TensorSource):
    """Some tensors of another source, in its order.

    Raises:
        UserError: the source lacks one of them.
    """

    def __init__(self, source: TensorSource, names: Collection[str]):
        wanted = set(names)
        absent = next((name for name in names if name not in source.infos), None)
        if absent is not None:
            raise UserError(f"{source.path}: has no tensor {absent}; choose among those that it has")
        self.path = source.path
        self.infos = {name: info for name, info in source.infos.items() if name in wanted}
        self._source = source

    @property
    def recipe(self) -> str:
        return self._source.recipe

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_range(name, start, stop)

    def close(self) -> None:
        self._source.close()


class FirstRows(TensorSource):
    """Another source whose tensors in `num_rows` are cut along axis 0."""

    def __init__(self, source: TensorSource, num_rows: Mapping[str, int]):
        self.path = source.path
        self.infos = {
            name: replace(info, shape=(num_rows[name], *info.shape[1:])) if name in num_rows else info
            for name, info in source.infos.items()
        }
        self._source = source

    @classmethod
    def of(cls, source: TensorSource, wanted: Mapping[str, TensorInfo]) -> TensorSource:
        """Return `source` cut to the rows that are wanted where it has more of them, itself if nothing is cut."""
        num_rows = {
            name: info.shape[0]
            for name, info in wanted.items()
            if name in source.infos
            and source.infos[name].shape[1:] == info.shape[1:]
            and source.infos[name].shape > info.shape
        }
        return cls(source, num_rows) if num_rows else source

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_range(name, start, stop)

    def close(self) -> None:
        self._source.close()
