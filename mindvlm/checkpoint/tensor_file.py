"""A file of tensors that is being written and knows which tensor it is at, for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mindvlm.checkpoint.atomic import PendingFiles
from mindvlm.checkpoint.source import TensorSource
from mindvlm.errors import UserError


class TensorFile:
    """One of `files` for the writers of formats; a failed write is a UserError that names the tensor."""

    def __init__(self, files: PendingFiles, path: Path):
        self.path = path
        self._files = files
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._tensor: str | None = None

    def __enter__(self) -> TensorFile:
        with self._naming_the_tensor():
            self._file = self._stack.enter_context(self._files.create(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with self._naming_the_tensor():
            self._stack.__exit__(kind, error, trace)

    def write(self, data: bytes | memoryview) -> None:
        with self._naming_the_tensor():
            self._file.write(data)

    def chunks(
        self, source: TensorSource, name: str, progress: Callable[[str, int], None] | None
    ) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of `source`, which the caller writes before it takes the next."""
        self._tensor = name
        for chunk in source.chunks(name):
            yield np.ascontiguousarray(chunk).view(np.uint8).data
            if progress:
                progress(name, chunk.nbytes)

    @contextmanager
    def _naming_the_tensor(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = f" at tensor {self._tensor}" if self._tensor else ""
            raise UserError(
                f"{self.path}: cannot be written{place} ({error.strerror or error}); nothing was kept"
            ) from error
