"""Source in, artifact out.

Three routes: "host" (g++ or clang++ makes a shared library), "cuda" (NVRTC, or nvcc when asked for, makes a
cubin) and "triton" (Triton makes a cubin and its launch metadata). None of them needs the device that it
compiles for. A compiler works in a folder that its caller owns and writes nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import process

ROUTES = ("host", "cuda", "triton")
UNIT_NAMES = {"host": "unit.cpp", "cuda": "unit.cu", "triton": "unit.json"}
ARTIFACTS = {"host": "kernel.so", "cuda": "kernel.cubin", "triton": "kernel.cubin"}
LAUNCH_METADATA = "launch.json"

# Every instruction set by its own name: gcc 9 knows these, and -march=x86-64-v4 only since gcc 11.
_V3_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mmovbe")
_V4_FLAGS = (*_V3_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
_CPU_FLAGS = {"x86-64-v3": _V3_FLAGS, "x86-64-v4": _V4_FLAGS}
_FEATURE_FLAGS = {
    "avx512bf16": ("-mavx512bf16",),
    "avx512vnni": ("-mavx512vnni",),
    "amxbf16": ("-mamx-tile", "-mamx-bf16"),
}
_HOST_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pipe")


class CompilerNotFoundError(RuntimeError):
    """No compiler for a route is installed; the message names the package to install."""


class CompileError(RuntimeError):
    """A compiler ran and failed. `log` is everything that it printed, `command` repeats it."""

    def __init__(self, message: str, *, log: str, command: str) -> None:
        super().__init__(message)
        self.log = log
        self.command = command


@dataclass(frozen=True)
class Found:
    """A compiler that is installed: its command, the file behind it and why it was chosen."""

    route: str
    name: str
    command: tuple[str, ...]
    path: Path
    reason: str


@dataclass(frozen=True)
class Compiled:
    """What a compiler made, in the folder that it was given."""

    artifact: str
    command: str
    seconds: float
    peak_bytes: int


def find(route: str) -> Found | None:
    """The compiler that a route would take now, or None. Starts nothing."""
    if route == "host":
        return next(iter(host_compilers()), None)
    if route == "cuda" and config.cuda_compiler() == "nvcc":
        nvcc = shutil.which("nvcc")
        reason = "JIT_KERNEL_CUDA_COMPILER is nvcc"
        return Found("cuda", "nvcc", (nvcc,), Path(nvcc).resolve(), reason) if nvcc else None
    if route == "cuda":
        from jit_kernel.engine import nvrtc

        library = nvrtc.find()
        return Found("cuda", "nvrtc", (), library, "the default for cubins") if library else None
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Found("triton", "triton", (), Path(spec.origin).resolve(), "the installed triton")


def host_compilers() -> list[Found]:
    """Every host compiler present, the one that is taken first: CXX, else g++, else clang++."""
    found = []
    chosen = config.host_compiler()
    if chosen:
        words = shlex.split(chosen)
        path = shutil.which(words[0])
        if path is None:
            raise CompilerNotFoundError(f"CXX is {chosen!r}, but there is no such program")
        command = (path, *words[1:])
        found.append(Found("host", words[0], command, Path(path).resolve(), "CXX names it"))
    for name in ("g++", "clang++"):
        path = shutil.which(name)
        if path:
            reason = f"{name} is on PATH and CXX is not set"
            found.append(Found("host", name, (path,), Path(path).resolve(), reason))
    return found


def require(route: str) -> Found:
    """The compiler of a route; CompilerNotFoundError says what to install."""
    found = find(route)
    if found is not None:
        return found
    raise CompilerNotFoundError(
        {
            "host": "no C++ compiler was found: install g++ (Debian, Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX",
            "cuda": "nvcc is not on PATH: install a CUDA toolkit, or unset JIT_KERNEL_CUDA_COMPILER"
            if config.cuda_compiler() == "nvcc"
            else "NVRTC was not found: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt (driver 580 "
            "or newer), or the packages of this package's extra cuda12",
            "triton": "Triton was not found: pip install triton",
        }[route]
    )


def fingerprint(found: Found) -> str:
    """Where a compiler's file lies and when it was last touched; changes when it is replaced."""
    status = os.stat(found.path)
    fields = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join((*found.command, str(found.path), *map(str, fields)))


def identify(found: Found) -> str:
    """The version that a compiler states. A program is started for it."""
    if found.name == "nvrtc":
        from jit_kernel.engine import nvrtc

        return f"NVRTC {nvrtc.version()}"
    if found.route == "triton":
        from jit_kernel.engine import triton_compiler

        return f"Triton {triton_compiler.version()}"
    command = [*found.command, "--version"]
    answer = process.run(command, seconds=60)
    if answer.status != 0:
        raise CompilerNotFoundError(f"{shlex.join(command)} failed: {answer.errors.strip() or answer.status}")
    return answer.output.strip()


def flags(route: str, target: Target, extra: Sequence[str] = ()) -> list[str]:
    """The flags of a compilation but for paths: what an artifact depends on, so part of its key."""
    if route == "host":
        instructions = [*_CPU_FLAGS.get(target.architecture, ())] if target.vendor == "cpu" else []
        for feature in target.features:
            instructions += _FEATURE_FLAGS[feature]
        return [*_HOST_FLAGS, *instructions, *extra]
    if route == "cuda":
        return [config.cuda_compiler(), "--std=c++17", *extra]
    return list(extra)


def compile_unit(route: str, folder: Path, target: Target, extra: Sequence[str], kernel_folder: Path) -> Compiled:
    """Compile the unit that lies in `folder` into the route's artifact beside it.

    Raises CompilerNotFoundError or CompileError; whatever was left half-written is the caller's to remove.
    """
    found = require(route)
    if route == "host" or found.name == "nvcc":
        return _run_program(found, folder, target, extra)
    started = time.perf_counter()
    source = (folder / UNIT_NAMES[route]).read_text(encoding="utf-8")
    if route == "cuda":
        image, log, command = _nvrtc(source, folder, target, extra)
    else:
        image, log, command = _triton(source, folder, target, extra, kernel_folder)
    (folder / ARTIFACTS[route]).write_bytes(image)
    (folder / "compile.log").write_text(log, encoding="utf-8")
    return Compiled(ARTIFACTS[route], command, time.perf_counter() - started, 0)


def _nvrtc(source: str, folder: Path, target: Target, extra: Sequence[str]) -> tuple[bytes, str, str]:
    from jit_kernel.engine import nvrtc

    include_dirs = [*_kernel_includes(), *nvrtc.include_dirs()]
    options = flags("cuda", target, extra)[1:]
    command = shlex.join(["nvrtc", f"--gpu-architecture={target.architecture}", *options])
    try:
        image, log = nvrtc.compile_cubin(
            source,
            name=UNIT_NAMES["cuda"],
            architecture=target.architecture,
            include_dirs=include_dirs,
            flags=options,
        )
    except nvrtc.NvrtcError as error:
        raise CompileError(_first_error(str(error)), log=str(error), command=command) from error
    return image, log, command


def _triton(
    source: str, folder: Path, target: Target, extra: Sequence[str], kernel_folder: Path
) -> tuple[bytes, str, str]:
    from jit_kernel.engine import triton_compiler

    command = f"triton.compile for {target}"
    try:
        image, metadata, log = triton_compiler.compile_unit(source, kernel_folder, target, extra)
    except triton_compiler.TritonError as error:
        raise CompileError(str(error), log=error.log, command=command) from error
    (folder / LAUNCH_METADATA).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    return image, log, command


def _kernel_includes() -> list[Path]:
    sources = config.kernel_sources_dir()
    return [sources, sources / "include"]


def program_command(found: Found, target: Target, extra: Sequence[str]) -> list[str]:
    """The command that compiles the unit in the present folder with a compiler that is a program."""
    if found.route == "cuda":
        architecture = target.architecture.removeprefix("sm_")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        includes = [f"-I{path}" for path in _kernel_includes()]
        options = [*flags("cuda", target, extra)[1:], *includes]
        return [*found.command, "-cubin", code, *options, UNIT_NAMES["cuda"], "-o", ARTIFACTS["cuda"]]
    import tvm_ffi.libinfo

    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    includes = [*map(str, _kernel_includes()), *tvm_ffi.libinfo.include_paths()]
    # The library is linked by name only: the process that loads the kernel has it loaded already.
    return [
        *(*found.command, *flags("host", target, extra), *(f"-I{path}" for path in includes)),
        *(UNIT_NAMES["host"], "-o", ARTIFACTS["host"], f"-L{library.parent}", "-ltvm_ffi"),
    ]


def _run_program(found: Found, folder: Path, target: Target, extra: Sequence[str]) -> Compiled:
    command = program_command(found, target, extra)
    started = time.perf_counter()
    environment = config.child_environment(LC_ALL="C", TMPDIR=str(folder))
    ended = process.run_watched(command, folder, folder / "compile.log", environment)
    if ended.status != 0:
        raise CompileError(
            _first_error(ended.output) or f"{found.name} ended with status {ended.status}",
            log=ended.output,
            command=shlex.join(command),
        )
    return Compiled(ARTIFACTS[found.route], shlex.join(command), time.perf_counter() - started, ended.peak_bytes)


_ERROR = re.compile(r"(?:\berror\b|\bfatal\b|No space left on device|undefined reference)")


def _first_error(log: str) -> str:
    """The first error of a compiler's output, with the three lines that follow it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            return "\n".join(lines[number : number + 4])
    return "\n".join(lines[-4:])
