"""A CUDA driver that only remembers, in the place of libcuda.so.1: what a launch hands over, seen without a GPU.

It stays in a process for good, so it is for processes of their own (tests.support.children). NVRTC asks a driver for
more than it has: compile before.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("driver_double.h")
CUDA = 2  # DLPack's number


def built(folder: Path) -> Path:
    """The library, under the name by which launchers ask for the driver."""
    path = folder / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(path)], check=True)
    return path


class Launch(ctypes.Structure):
    """As in driver_double.h."""

    _fields_ = (
        ("launches", ctypes.c_int64),
        ("loads", ctypes.c_int64),
        ("values_read", ctypes.c_int64),
        ("most_shared", ctypes.c_int64),
        ("non_portable", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 7),
        ("cluster", ctypes.c_int64 * 3),
        ("cooperative", ctypes.c_int64),
        ("programmatic", ctypes.c_int64),
        ("values", ctypes.c_uint64 * 32),
    )


class Driver:
    """The double, in the place of the driver from now on."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        library.double_last.restype = ctypes.POINTER(Launch)
        library.double_symbol.restype = ctypes.c_char_p
        self._library = library
        self.last: Launch = library.double_last().contents

    @property
    def symbol(self) -> str:
        """Of the function that was asked for last."""
        return str(self._library.double_symbol().decode())


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _OnCuda:
    """What DLPack takes for a tensor on a GPU."""

    def __init__(self, managed: _Tensor) -> None:
        self.managed = managed

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.managed.device_id

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor", None)


_kept: list[Any] = []


def on_cuda(address: int, code: int, bits: int, device: int = 0) -> Any:
    """A tensor of one element at an address of no memory, said to lie on a GPU. code, bits: of DLPack's dtype."""
    import tvm_ffi

    shape = (ctypes.c_int64 * 1)(1)
    place = ctypes.cast(shape, ctypes.c_void_p).value
    managed = _Tensor(address, CUDA, device, 1, code, bits, 1, place, place, 0, None, None)
    _kept.extend((shape, managed))
    return tvm_ffi.from_dlpack(_OnCuda(managed))
