"""The few calls of the CUDA driver that map a rank's memory into another process and order streams by words in it.

Waits and writes of 32-bit words are carried out by the stream itself, so they need no multiprocessor, which a
persistent attention kernel would not leave them (CUDA Driver API: "Stream Memory Operations", "IPC").
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

_HANDLE = 64  # bytes of a CUipcMemHandle
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: int32(word - value) >= 0


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE),)


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, size, stream = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    of = {
        "cuMemAlloc_v2": [ctypes.POINTER(pointer), size],
        "cuMemFree_v2": [pointer],
        "cuMemsetD8_v2": [pointer, ctypes.c_ubyte, size],
        "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), pointer],
        "cuIpcOpenMemHandle_v2": [ctypes.POINTER(pointer), _Handle, ctypes.c_uint],
        "cuIpcCloseMemHandle": [pointer],
        "cuMemcpyAsync": [pointer, pointer, size, stream],
        "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, pointer, size, stream],
        "cuStreamWaitValue32_v2": [stream, pointer, ctypes.c_uint32, ctypes.c_uint],
        "cuStreamWriteValue32_v2": [stream, pointer, ctypes.c_uint32, ctypes.c_uint],
        "cuThreadExchangeStreamCaptureMode": [ctypes.POINTER(ctypes.c_int)],
        "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    }
    for name, arguments in of.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name} failed: {(text.value or b'unknown').decode()} ({code})")


def allocate(count: int) -> int:
    """The address of `count` new bytes of zeros on the current device, an allocation of their own."""
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), count)
    _call("cuMemsetD8_v2", address, 0, count)
    torch.cuda.synchronize()
    return address.value


def free(address: int) -> None:
    _call("cuMemFree_v2", address)


def handle_of(address: int) -> bytes:
    """What another process of this host maps an allocation by."""
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def open_handle(handle: bytes) -> int:
    """The address of another process's allocation in this one, whichever GPU of the host it lies on."""
    address = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    return address.value


def close_handle(address: int) -> None:
    _call("cuIpcCloseMemHandle", address)


def copy(to: int, of: int, count: int, stream: torch.cuda.Stream) -> None:
    if count:
        _call("cuMemcpyAsync", to, of, count, stream.cuda_stream)


def wait_for(word: int, value: int, stream: torch.cuda.Stream) -> None:
    """The stream goes on when the 32-bit word at an address is at least `value`, counted round 2^32."""
    _call("cuStreamWaitValue32_v2", stream.cuda_stream, word, value & 0xFFFFFFFF, _GEQ)


def write(word: int, value: int, stream: torch.cuda.Stream) -> None:
    """The stream writes a 32-bit word, after what stands before it in the stream."""
    _call("cuStreamWriteValue32_v2", stream.cuda_stream, word, value & 0xFFFFFFFF, 0)


def read_words(address: int, count: int, stream: torch.cuda.Stream) -> list[int]:
    """32-bit words at an address, read beside whatever other streams wait for."""
    words = (ctypes.c_uint32 * count)()
    _call("cuMemcpyDtoHAsync_v2", words, address, 4 * count, stream.cuda_stream)
    stream.synchronize()
    return list(words)


def spare_captures() -> None:
    """Let this thread ask events while another one captures a graph, which the default mode calls an error."""
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))
