"""Source in, artifact out.

Three routes: "host" (g++ or clang++ makes a shared library), "cuda" (NVRTC, or nvcc when asked for, makes a
cubin) and "triton" (Triton makes a cubin and its launch metadata). None of them needs the device that it
compiles for. A compiler works in a folder that its caller owns and writes nowhere else.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import artifact, process
from jit_kernel.engine.installed import CompileError as CompileError
from jit_kernel.engine.installed import CompilerError as CompilerError
from jit_kernel.engine.installed import CompilerNotFoundError as CompilerNotFoundError
from jit_kernel.engine.installed import Found as Found
from jit_kernel.engine.installed import find as find
from jit_kernel.engine.installed import fingerprint as fingerprint
from jit_kernel.engine.installed import host_compilers as host_compilers
from jit_kernel.engine.installed import identify as identify
from jit_kernel.engine.installed import require as require

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


@dataclass(frozen=True)
class Compiled:
    """What a compiler made, in the folder that it was given."""

    artifact: str
    command: str
    seconds: float
    peak_bytes: int
    functions: tuple[str, ...] = ()  # what a library exports, as far as its unit tells


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
    # __FILE__ would hold this machine's paths, and two builds of one key would differ.
    places = {str(config.kernel_sources_dir()): "kernel_sources", tvm_ffi.libinfo.include_paths()[0]: "tvm_ffi"}
    relative = [f"-ffile-prefix-map={path}={name}" for path, name in places.items()]
    # The library is linked by name only: the process that loads the kernel has it loaded already.
    return [
        *(*found.command, *flags("host", target, extra), *relative, *(f"-I{path}" for path in includes)),
        *(UNIT_NAMES["host"], "-o", ARTIFACTS["host"], f"-L{library.parent}", "-ltvm_ffi"),
    ]


def _run_program(found: Found, folder: Path, target: Target, extra: Sequence[str]) -> Compiled:
    command = program_command(found, target, extra)
    started = time.perf_counter()
    environment = config.child_environment(LC_ALL="C", TMPDIR=str(folder))
    functions = _exported(folder, found.route)
    try:
        ended = process.run(command, folder=folder, log=folder / "compile.log", environment=environment)
    except OSError as error:
        if not folder.is_dir():
            raise
        raise CompileError(f"{found} cannot be started: {error}", log="", command=shlex.join(command)) from error
    seconds = time.perf_counter() - started
    try:
        if ended.status != 0:
            raise artifact.UnfitError(_ending(ended))
        artifact.check(folder / ARTIFACTS[found.route], found.route, functions)
    except artifact.UnfitError as error:
        words = _first_error(ended.output)
        message = f"{words}\n{found}: {error}" if words else f"{found}: {error}"
        raise CompileError(message, log=ended.output, command=shlex.join(command)) from error
    return Compiled(ARTIFACTS[found.route], shlex.join(command), seconds, ended.peak_bytes, tuple(sorted(functions)))


def _ending(ended: process.Ended) -> str:
    """How a compiler that failed ended, and the mend where it did not fail by itself."""
    if ended.killed_by == "SIGKILL" or "Killed signal terminated program" in ended.output:
        return (
            "it was killed (SIGKILL), as the system does where memory runs out; compile fewer kernels at a time "
            "(python -m jit_kernel.warmup --jobs 1), or give it more memory"
        )
    return f"it was ended by {ended.killed_by}" if ended.killed_by else f"it ended with status {ended.status}"


def _exported(folder: Path, route: str) -> set[str]:
    if route != "host":
        return set()
    sources = config.kernel_sources_dir()
    return artifact.exported((folder / UNIT_NAMES[route]).read_text(encoding="utf-8"), sources)


_ERROR = re.compile(r"(?:\berror\b|\bfatal\b|No space left on device|undefined reference)")


def _first_error(log: str) -> str:
    """The first error of a compiler's output, with the three lines that follow it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            return "\n".join(each[:400] for each in lines[number : number + 4])
    return "\n".join(each[:400] for each in lines[-4:])
