"""The library of C++ kernels: found or compiled at first use, and called through ctypes.

The environment variable `MINDVLM_NATIVE` chooses one of `INSTRUCTION_SETS`, and `off` turns the kernels off. By default
it is the best one of the processor.
"""

import ctypes
import functools
import logging
import os
import platform
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from mindvlm.core.caches import cache_folder, remove_oldest
from mindvlm.core.errors import UserError
from mindvlm.core.host_cpus import num_threads
from mindvlm.core.weight_formats import find_block
from mindvlm.native.build import CompilerError, build, is_whole, source_digest

logger = logging.getLogger(__name__)

INSTRUCTION_SETS = ("amx", "avx512", "avx2", "dotprod", "neon", "portable")
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "q8_0": 3, "q4_0": 4, "q4_K": 5, "q8_c": 6}
"""Storage formats of a matrix, with their numbers in the library."""
BLOCK = 32
"""Values that share a scale."""


def _checked(status: int) -> None:
    """Raises MemoryError if a function of the library had too little memory."""
    if status:
        raise MemoryError("no memory for a computation of the native kernels")


_FUNCTIONS = {
    "mindvlm_choose_kernels": (ctypes.c_char_p, (ctypes.c_char_p,)),
    "mindvlm_set_num_threads": (None, (ctypes.c_int,)),
    "mindvlm_new_float_matrix": (ctypes.c_void_p, (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)),
    "mindvlm_new_block_matrix": (ctypes.c_void_p, (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
    "mindvlm_free_matrix": (None, (ctypes.c_void_p,)),
    "mindvlm_rows_of_group": (ctypes.c_int64, ()),
    "mindvlm_pack_rows": (_checked, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)),
    "mindvlm_quantize": (
        _checked,
        (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
    ),
    "mindvlm_multiply": (_checked, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)),
    "mindvlm_read_row": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)),
}


class Library:
    """The loaded kernels.

    Attributes:
        path: the shared library; operators of a graph are named `path:Function`.
        digest: that of its sources, see `source_digest`.
        instruction_set: that of the kernels in use; None until `choose`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.digest = source_digest()
        self.instruction_set: str | None = None
        self._functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, arguments
        self.call("mindvlm_set_num_threads", num_threads())

    def call(self, name: str, *arguments):
        """Calls a function of the library."""
        return getattr(self._functions, name)(*arguments)

    def choose(self, instruction_set: str | None) -> str:
        """Chooses the kernels; None chooses the best ones of the processor. Matrices of blocks of others are invalid.

        Raises:
            UserError: the processor or the library does not have this instruction set.
        """
        chosen = self.call("mindvlm_choose_kernels", instruction_set and instruction_set.encode())
        if chosen is None:
            raise UserError(
                f"MINDVLM_NATIVE is {instruction_set!r}, which this processor does not have; leave it unset"
            )
        self.instruction_set = chosen.decode()
        return self.instruction_set

    def graph_key(self) -> Path:
        """Returns what a compiled graph depends on: the path in the names of operators."""
        return self.path

    def quantize(self, weights: np.ndarray, dtype: str, importance: np.ndarray | None = None) -> np.ndarray:
        """Returns weights (rows, cols) rounded to blocks (rows, cols / size, bytes) uint8 as they are stored.

        Of several roundings to 4 bits, takes the one of the smallest squared error.

        Args:
            importance: (cols,), weights of the squared errors, such as the mean squares of the activations.
        """
        weights = np.ascontiguousarray(weights, np.float32)
        rows, cols = weights.shape
        block = find_block(dtype)
        blocks = np.empty((rows, cols // block.size, block.num_bytes), np.uint8)
        given = None if importance is None else np.ascontiguousarray(importance, np.float32)
        self.call(
            "mindvlm_quantize",
            FORMATS[block.format],
            weights.ctypes.data,
            rows,
            cols,
            None if given is None else given.ctypes.data,
            blocks.ctypes.data,
        )
        return blocks


class Matrix:
    """A weight matrix W (rows, cols) in memory of the library, or over an array that it keeps alive.

    Attributes:
        handle: the number that operators of a graph take.
        num_bytes: size of the stored values.
    """

    def __init__(self, library: Library, handle: int, shape: tuple[int, int], num_bytes: int, values=None):
        self.library, self.handle, self.shape, self.num_bytes = library, handle, shape, num_bytes
        self.values = values
        # at exit the process frees all memory itself
        weakref.finalize(self, library.call, "mindvlm_free_matrix", handle).atexit = False

    @classmethod
    def of_floats(cls, library: Library, values: np.ndarray, dtype: str) -> "Matrix":
        """Returns a matrix over a C-contiguous array; bfloat16 values are given as uint16."""
        rows, cols = values.shape
        handle = library.call("mindvlm_new_float_matrix", FORMATS[dtype], rows, cols, values.ctypes.data)
        return cls(library, handle, (rows, cols), values.nbytes, values)

    @classmethod
    def of_blocks(cls, library: Library, dtype: str, shape: tuple[int, int]) -> "Matrix":
        """Returns an empty matrix of blocks; `pack` fills it. Raises MemoryError if there is no memory for it."""
        rows, cols = shape
        block = find_block(dtype)
        handle = library.call("mindvlm_new_block_matrix", FORMATS[block.format], rows, cols)
        if not handle:
            raise MemoryError(f"no memory for a matrix of {rows} x {cols} weights")
        return cls(library, handle, shape, rows * (cols // block.size) * block.num_bytes)

    def pack(self, first: int, blocks: np.ndarray) -> None:
        """Fills rows from `first` on, a multiple of `row_step`, with blocks (rows, cols / size, bytes) uint8."""
        blocks = np.ascontiguousarray(blocks)
        self.library.call("mindvlm_pack_rows", self.handle, first, len(blocks), blocks.ctypes.data)

    def graph_key(self) -> tuple:
        """Returns what a compiled graph depends on: nothing, because it takes the handle as an input."""
        return ()

    @property
    def row_step(self) -> int:
        """Number of rows that the layout of blocks interleaves."""
        return self.library.call("mindvlm_rows_of_group")

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """Returns x W^T: (N, cols) float32 -> (N, rows)."""
        x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), self.shape[0]), np.float32)
        self.library.call("mindvlm_multiply", self.handle, x.ctypes.data, len(x), y.ctypes.data)
        return y

    def row(self, index: int) -> np.ndarray:
        """Returns row `index` as float32."""
        row = np.empty(self.shape[1], np.float32)
        self.library.call("mindvlm_read_row", self.handle, index, row.ctypes.data)
        return row


@functools.cache
def open_library() -> Library | None:
    """Returns the kernels, compiled at first use; None, after one warning, if there are none.

    Raises:
        UserError: `MINDVLM_NATIVE` has a wrong value.
    """
    chosen = os.environ.get("MINDVLM_NATIVE") or None
    if chosen not in (None, "off", *INSTRUCTION_SETS):
        raise UserError(f"MINDVLM_NATIVE is {chosen!r}; expected off or one of {', '.join(INSTRUCTION_SETS)}")
    if are_off():
        return None
    path = Path(__file__).with_name("libkernels.so")
    if (library := load(path)) is None:
        library = compile_library()
    if library:
        library.choose(chosen)
        logger.info(f"native kernels: {library.instruction_set}, {num_threads()} threads")
    return library


def are_off() -> bool:
    """Whether nobody expects kernels: `MINDVLM_NATIVE` is off, or the system is not Linux."""
    return os.environ.get("MINDVLM_NATIVE") == "off" or platform.system() != "Linux"


def load(path: Path) -> Library | None:
    """Returns the kernels in a file; None if it is missing, damaged or out of date, or cannot be named in a graph."""
    if ":" in str(path):
        return None
    with suppress(OSError):
        # checked before it is loaded: a process that has loaded a path never loads another file of this path, and
        # a damaged library may end it
        content = path.read_bytes()
        if source_digest().encode() in content and is_whole(content):
            return Library(path)
    return None


def compile_library() -> Library | None:
    """Returns the kernels in the cache folder, compiled if need be; None, after a warning, if that is impossible."""
    import fcntl  # not on Windows

    try:
        folder = cache_folder() / "native"
        if ":" in str(folder):
            raise UserError(
                f"MindSpore loads no library from a path with a colon, {folder}; set MINDVLM_CACHE to another"
            )
        path = folder / f"kernels-{source_digest()}.so"
        if library := load(path):
            # the time of the last use; the folder may be read-only
            with suppress(OSError):
                os.utime(path)
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            # of several processes, one compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            if library := load(path):
                return library
            logger.info("compiling native kernels, once")
            build(path)
            remove_oldest("kernels", path)
        return Library(path)
    except CompilerError as error:
        reason = str(error)
        if error.output:
            log = path.with_suffix(".log")
            with suppress(OSError):
                log.write_text(error.output)
                reason += f", see {log}"
    except (OSError, UserError) as error:
        reason = str(error)
        if getattr(error, "strerror", None):
            reason = (
                f"{error.filename or folder} cannot be written ({error.strerror}); set MINDVLM_CACHE to another folder"
            )
    warnings.warn(
        f"native kernels are not used: {reason}; MindSpore's are slower, and their weights are float32", stacklevel=3
    )
    return None
