"""Read-only arrays over mapped files. An array holds no open file, unlike one over Python's `mmap`."""

import ctypes
import functools
import mmap
import weakref

import numpy as np

MAP_FAILED = ctypes.c_void_p(-1).value


def map_bytes(descriptor: int, offset: int, num_bytes: int) -> np.ndarray | None:
    """Returns bytes of an open file as a uint8 array; the mapping ends with the array and all views of it.

    The file must be at least `offset + num_bytes` long, and must not become shorter.

    Returns:
        None where the system, the file system or the address space does not allow the mapping.
    """
    libc = _libc()
    if libc is None:
        return None
    skip = offset % mmap.ALLOCATIONGRANULARITY
    size = skip + num_bytes
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset - skip)
    if address == MAP_FAILED:
        return None
    pages = (ctypes.c_uint8 * size).from_address(address)
    # at exit arrays may still be read
    weakref.finalize(pages, libc.munmap, address, size).atexit = False
    array = np.frombuffer(pages, np.uint8, num_bytes, skip)
    array.flags.writeable = False
    return array


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """Returns the C library; None on Windows, which has no mmap."""
    if not hasattr(mmap, "MAP_SHARED"):
        return None
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
