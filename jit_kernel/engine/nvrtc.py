"""CUDA C++ to a cubin in this process, without a toolkit: NVRTC through ctypes.

The library comes from the wheels nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, else from an installed
toolkit; the headers from nvidia-cuda-runtime and nvidia-cuda-crt of the same major. No GPU and no driver are needed
to compile. Where a driver is present, a library of a newer major than the driver's is passed over, because the
driver could not load what it makes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

_INSTALL_HINT = (
    "install the extra 'cuda13' or 'cuda12' of this package (nvidia-cuda-nvrtc and nvidia-cuda-runtime), "
    "or put a CUDA toolkit's nvcc on PATH"
)


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused a source. `log` holds what the compiler printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


def compile_cubin(
    source: str, *, name: str, architecture: str, include_dirs: Sequence[Path], flags: Sequence[str] = ()
) -> tuple[bytes, str]:
    """Compile one translation unit for `architecture` ("sm_90a") and return its cubin and the log.

    `name` is the unit's name in messages. `include_dirs` are searched before the CUDA headers of `include_dirs()`.
    Raises NvrtcError with the log when the library is missing or the source does not compile.
    """
    return compile_entry(source, "", name=name, architecture=architecture, include_dirs=include_dirs, flags=flags)[:2]


def compile_entry(
    source: str, entry: str, *, name: str, architecture: str, include_dirs: Sequence[Path], flags: Sequence[str] = ()
) -> tuple[bytes, str, str]:
    """The same, with the kernel `entry` in the cubin, "scale<float, 4>" as C++ names it, and third its symbol."""
    library = _library()
    directories = [*include_dirs, *_cuda_include_dirs()]
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *flags]
    options += [f"--include-path={directory}" for directory in directories]
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None),
    )
    try:
        if entry:
            _check(library, library.nvrtcAddNameExpression(program, entry.encode()))
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _fetch(library, "ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
        if status != 0:
            raise NvrtcError(f"{name} does not compile for {architecture}: {_error_text(library, status)}", log)
        symbol = ctypes.c_char_p()
        if entry:
            _check(library, library.nvrtcGetLoweredName(program, entry.encode(), ctypes.byref(symbol)))
        return _fetch(library, "CUBIN", program), log, (symbol.value or b"").decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """The library's version, "13.0"; raises NvrtcError when there is none."""
    library = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def find() -> Path | None:
    """The library that compile_cubin uses: the newest major that the driver, where present, can load."""
    limit = _driver_major()
    candidates = [(_major(path), path) for path in _libraries()]
    fitting = [found for found in candidates if limit is None or found[0] <= limit]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def include_dirs() -> list[Path]:
    """Folders with the CUDA headers that belong to find()'s library; empty when there are none."""
    return _cuda_include_dirs()


@functools.cache
def _cuda_include_dirs() -> list[Path]:
    library = find()
    if library is None:
        return []
    wheel_folders = [
        library.parent.parent / "include",  # the cu13 wheels share one folder; so does a toolkit
        library.parent.parent.parent / "cuda_runtime" / "include",  # cu12 wheels
        library.parent.parent.parent / "cuda_nvcc" / "include",  # crt/ of the cu12 wheels
    ]
    toolkit_folders = [library.parent.parent / "targets" / "x86_64-linux" / "include"]
    marks = ("cuda_bf16.h", "crt/host_defines.h")
    return [folder for folder in wheel_folders + toolkit_folders if any((folder / mark).exists() for mark in marks)]


def _libraries() -> Iterator[Path]:
    """Every libnvrtc.so.<major> of the wheels and of the toolkits that are easy to see; wheels first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    folders = [folder for root in roots for folder in sorted(root.glob("*/lib"))]
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).resolve().parent.parent] if nvcc else []
    toolkits.append(Path("/usr/local/cuda"))
    folders += [toolkit / lib for toolkit in toolkits for lib in ("lib64", "lib")]
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc.so.*")):
            if re.fullmatch(r"libnvrtc\.so\.\d+", path.name):
                yield path


def _major(path: Path) -> int:
    return int(path.name.rsplit(".", 1)[1])


def _driver_major() -> int | None:
    """The CUDA major of the installed driver, or None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    value = ctypes.c_int()
    return value.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(value)) == 0 else None


@functools.cache
def _library() -> ctypes.CDLL:
    path = find()
    if path is None:
        seen = ", ".join(str(path) for path in _libraries()) or "none"
        raise NvrtcError(
            f"no NVRTC library fits (found: {seen}; the driver's CUDA major: {_driver_major() or 'no driver'}); "
            f"{_INSTALL_HINT}"
        )
    # NVRTC opens its builtins by bare name, which no loader path of a wheel holds: load them first.
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for result in ("ProgramLog", "CUBIN"):
        getattr(library, f"nvrtcGet{result}Size").argtypes = [pointer, ctypes.POINTER(size)]
        getattr(library, f"nvrtcGet{result}").argtypes = [pointer, ctypes.c_char_p]
    library.nvrtcCreateProgram.argtypes = [
        ctypes.POINTER(pointer),
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.nvrtcAddNameExpression.argtypes = [pointer, ctypes.c_char_p]
    library.nvrtcGetLoweredName.argtypes = [pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)]
    library.nvrtcCompileProgram.argtypes = [pointer, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _fetch(library: ctypes.CDLL, result: str, program: ctypes.c_void_p) -> bytes:
    """The bytes that a pair of NVRTC's functions returns, nvrtcGet<result>Size and nvrtcGet<result>."""
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{result}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{result}")(program, buffer))
    return buffer.raw


def _error_text(library: ctypes.CDLL, status: int) -> str:
    return str(library.nvrtcGetErrorString(status).decode())


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise NvrtcError(f"NVRTC failed: {_error_text(library, status)}")
