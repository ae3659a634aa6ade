"""A file of tensors that is being written and knows which tensor it is at, for messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mindvlm.checkpoint.atomic import PendingFiles
from mindvlm.checkpoint.dtypes import item_size
from mindvlm.checkpoint.source import CHUNK_BYTES, TensorSource
from mindvlm.core.errors import UserError

_FLUSH_BYTES = 128 * 1024 * 1024


class TensorFile:
    """One of `files` for the writers of formats; a failed write is a UserError that names the tensor.

    What is written goes to the disk in the background, so that the end does not wait for the whole file.
    """

    def __init__(self, files: PendingFiles, path: Path):
        self.path = path
        self._files = files
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._tensor: str | None = None

    def __enter__(self) -> TensorFile:
        with self._naming_the_tensor():
            self._file = self._stack.enter_context(self._files.create(self.path))
        self._stack.callback(self._flusher.shutdown)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with self._naming_the_tensor(), self._stack:
            if error is not None:
                raise error
            if self._flushing:
                self._flushing.result()

    def write(self, data: bytes | memoryview) -> None:
        with self._naming_the_tensor():
            self._file.write(data)
            self._unflushed += len(data)
            if self._unflushed < _FLUSH_BYTES or (self._flushing and not self._flushing.done()):
                return
            if self._flushing:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
            self._unflushed = 0

    def write_tensor(
        self,
        source: TensorSource,
        name: str,
        start: int,
        stop: int,
        progress: Callable[[str, int], None] | None = None,
        write: Callable[[memoryview], Any] | None = None,
    ) -> None:
        """Write elements [start, stop) of a flattened tensor of `source`; `progress` gets its name and bytes written.

        `write` takes the bytes in the place of this object's own, which is where they end up.

        Raises:
            UserError: the disk is full, or the source cannot be read.
        """
        self._tensor = name
        step = CHUNK_BYTES // item_size(source.infos[name].dtype)
        for begin in range(start, stop, step):
            chunk = np.ascontiguousarray(source.read_range(name, begin, min(begin + step, stop)))
            (write or self.write)(chunk.view(np.uint8).data)
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
