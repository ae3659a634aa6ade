"""Views of sources: several laid over each other, a selection of tensors, the first rows of some."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import SourceView, TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import ConversionError, find_conflict


class OverlaidSource(TensorSource):
    """Sources of native names laid over each other: for each name, the last source that has it wins.

    Attributes:
        labels: names of the sources in messages.
        origins: for each tensor the index of the source that provides it.
        overridden: name and index of each tensor that a later source replaces.

    Raises:
        ConversionError: a tensor has another shape, or another kind of numbers, than the one that it replaces.
    """

    def __init__(self, sources: Sequence[tuple[str, TensorSource]]):
        if not sources:
            raise UserError("no source was given; name at least one checkpoint")
        self.labels = tuple(label for label, _ in sources)
        self.path: Path = sources[0][1].path
        self.infos: dict[str, TensorInfo] = {}
        self.origins: dict[str, int] = {}
        self.overridden: list[tuple[str, int]] = []
        self._sources = [source for _, source in sources]
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
            raise ConversionError(f"{self.labels[index]} does not fit over the sources before it", found)


class SelectedSource(SourceView):
    """A selection of the tensors of another source, in its order.

    Raises:
        UserError: the source lacks one of them.
    """

    def __init__(self, source: TensorSource, names: Collection[str]):
        wanted = set(names)
        absent = next((name for name in names if name not in source.infos), None)
        if absent is not None:
            raise UserError(f"{source.path}: has no tensor {absent}; choose one that it has")
        super().__init__(source, {name: info for name, info in source.infos.items() if name in wanted})

    @property
    def recipe(self) -> str:
        return self._source.recipe


class FirstRows(SourceView):
    """Another source with the tensors in `num_rows` cut along axis 0."""

    def __init__(self, source: TensorSource, num_rows: Mapping[str, int]):
        infos = {
            name: replace(info, shape=(num_rows[name], *info.shape[1:])) if name in num_rows else info
            for name, info in source.infos.items()
        }
        super().__init__(source, infos)

    @classmethod
    def of(cls, source: TensorSource, wanted: Mapping[str, TensorInfo]) -> TensorSource:
        """Returns `source` cut to the wanted rows where it has more of them; `source` itself if nothing is cut."""
        num_rows = {
            name: info.shape[0]
            for name, info in wanted.items()
            if name in source.infos
            and source.infos[name].shape[1:] == info.shape[1:]
            and source.infos[name].shape > info.shape
        }
        return cls(source, num_rows) if num_rows else source
