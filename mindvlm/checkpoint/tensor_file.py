"""A file of tensors during writing; its errors name the current tensor."""

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
from mindvlm.checkpoint.dtypes import block_size, item_size
from mindvlm.checkpoint.source import CHUNK_BYTES, TensorSource
from mindvlm.core.errors import UserError

_FLUSH_BYTES = 128 * 1024 * 1024


class TensorFile:
    """One of `files` during writing; a failed write is a UserError that names the tensor.

    A background thread flushes written bytes to disk, so that closing does not wait for the whole file. zipfile can
    write to it.

    Args:
        progress: called with the name of a tensor and the bytes just written.
    """

    def __init__(self, files: PendingFiles, path: Path, progress: Callable[[str, int], None] | None = None):
        self.path = path
        self._progress = progress
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

    def write(self, data: bytes | memoryview) -> int:
        """Writes all bytes and returns their number."""
        with self._naming_the_tensor():
            self._file.write(data)
            self._unflushed += len(data)
            if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                if self._flushing:
                    self._flushing.result()
                self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
                self._unflushed = 0
        return len(data)

    def flush(self) -> None:
        """Does nothing; zipfile calls it."""

    def write_tensor(
        self,
        source: TensorSource,
        name: str,
        start: int,
        stop: int,
        write: Callable[[memoryview], Any] | None = None,
    ) -> None:
        """Writes elements [start, stop) of a flattened tensor of `source`.

        `write` replaces the method of this object, such as with that of an archive that writes to this file.

        Raises:
            UserError: the disk is full, or the source cannot be read.
        """
        self._tensor = name
        dtype = source.infos[name].dtype
        step = CHUNK_BYTES // item_size(dtype) * block_size(dtype)
        for begin in range(start, stop, step):
            chunk = np.ascontiguousarray(source.read_range(name, begin, min(begin + step, stop)))
            (write or self.write)(chunk.view(np.uint8).data)
            if self._progress:
                self._progress(name, chunk.nbytes)

    @contextmanager
    def _naming_the_tensor(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = f" at tensor {self._tensor}" if self._tensor else ""
            raise UserError(
                f"{self.path}: cannot be written{place} ({error.strerror or error}); nothing was kept"
            ) from error
