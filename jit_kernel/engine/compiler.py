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
from jit_kernel.engine import artifact, closure, cuda_entry, process
from jit_kernel.engine.installed import CompileError as CompileError
from jit_kernel.engine.installed import CompilerError as CompilerError
from jit_kernel.engine.installed import CompilerNotFoundError as CompilerNotFoundError
from jit_kernel.engine.installed import Found as Found
from jit_kernel.engine.installed import find as find
from jit_kernel.engine.installed import fingerprint as fingerprint
from jit_kernel.engine.installed import host_compilers as host_compilers
from jit_kernel.engine.installed import identify as identify
from jit_kernel.engine.installed import require as require
from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import KernelSpec

ROUTES = ("host", "cuda", "triton")
UNIT_NAMES = {"host": "unit.cpp", "cuda": "unit.cu", "triton": "unit.json"}
ARTIFACTS = {"host": "kernel.so", "cuda": "kernel.cubin", "triton": "kernel.cubin"}
LAUNCH_METADATA = "launch.json"
TEXTS = "sources"  # the folder beside a unit that holds sources that are texts

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


def compile_unit(spec: KernelSpec, folder: Path, target: Target) -> Compiled:
    """Compile the unit that lies in `folder` into the route's artifact beside it.

    Raises CompilerNotFoundError or CompileError; whatever was left half-written is the caller's to remove.
    """
    route = spec.route
    found = require(route)
    if route == "host" or found.name == "nvcc":
        made = _run_program(found, folder, target, spec)
        if spec.entry:
            _describe_entry(spec, folder, "", made.command)
        return made
    started = time.perf_counter()
    source = (folder / UNIT_NAMES[route]).read_text(encoding="utf-8")
    if route == "cuda":
        image, log, command, symbol = _nvrtc(source, folder, target, spec)
    else:
        image, log, command = _triton(source, folder, target, spec)
    (folder / ARTIFACTS[route]).write_bytes(image)
    (folder / "compile.log").write_text(log, encoding="utf-8")
    if route == "cuda" and spec.entry:
        _describe_entry(spec, folder, symbol, command)
    return Compiled(ARTIFACTS[route], command, time.perf_counter() - started, 0)


def _nvrtc(source: str, folder: Path, target: Target, spec: KernelSpec) -> tuple[bytes, str, str, str]:
    from jit_kernel.engine import nvrtc

    include_dirs = [folder / path for path in _includes(spec.sources)]
    options = flags("cuda", target, spec.flags)[1:]
    command = shlex.join(["nvrtc", f"--gpu-architecture={target.architecture}", *options])
    try:
        image, log, symbol = nvrtc.compile_entry(
            source,
            spec.entry,
            name=UNIT_NAMES["cuda"],
            architecture=target.architecture,
            include_dirs=[*include_dirs, *nvrtc.include_dirs()],
            flags=options,
        )
    except nvrtc.NvrtcError as error:
        words = _first_error(str(error)).replace(f"{folder / TEXTS}/", "")
        raise CompileError(words, log=str(error), command=command) from error
    return image, log, command, symbol


def _describe_entry(spec: KernelSpec, folder: Path, symbol: str, command: str) -> None:
    """Write what the launcher must know of a CUDA kernel beside its cubin."""
    names = closure.files_of(spec.unit, "cuda", spec.kernel, str(config.kernel_sources_dir()), spec.sources)
    read = spec.sources.read if spec.sources else lambda name: (config.kernel_sources_dir() / name).read_bytes()
    texts = (read(name) for name in names if not name.startswith(closure.OURS))
    try:
        found = cuda_entry.metadata(
            (folder / ARTIFACTS["cuda"]).read_bytes(),
            symbol,
            spec.entry,
            (text.decode(errors="replace") for text in texts if text is not None),
        )
    except cuda_entry.EntryError as error:
        raise CompileError(str(error), log=str(error), command=command) from error
    (folder / LAUNCH_METADATA).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _triton(source: str, folder: Path, target: Target, spec: KernelSpec) -> tuple[bytes, str, str]:
    from jit_kernel.engine import triton_compiler

    command = f"triton.compile for {target}"
    try:
        kernel_folder = Path(spec.sources.folder) if spec.sources else config.kernel_sources_dir() / spec.kernel
        image, metadata, log = triton_compiler.compile_unit(source, kernel_folder, target, spec.flags)
    except triton_compiler.TritonError as error:
        raise CompileError(str(error), log=error.log, command=command) from error
    (folder / LAUNCH_METADATA).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    return image, log, command


def _includes(own: Sources | None) -> list[Path]:
    """Where a unit's files are searched for, in the order of closure.py."""
    ours = config.kernel_sources_dir()
    if own is None:
        return [ours, ours / "include"]
    home = Path(own.folder or TEXTS)
    return [home, home / "include", ours / "include"]


def program_command(found: Found, target: Target, extra: Sequence[str], own: Sources | None = None) -> list[str]:
    """The command that compiles the unit in the present folder with a compiler that is a program."""
    includes = [f"-I{path}" for path in _includes(own)]
    if found.route == "cuda":
        architecture = target.architecture.removeprefix("sm_")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        options = [*flags("cuda", target, extra)[1:], *includes]
        return [*found.command, "-cubin", code, *options, UNIT_NAMES["cuda"], "-o", ARTIFACTS["cuda"]]
    import tvm_ffi.libinfo

    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    includes += [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    # __FILE__ would hold this machine's paths, and two builds of one key would differ.
    places = {str(config.kernel_sources_dir()): "kernel_sources", tvm_ffi.libinfo.include_paths()[0]: "tvm_ffi"}
    places |= {own.folder: own.name} if own is not None and own.folder else {}
    relative = [f"-ffile-prefix-map={path}={name}" for path, name in places.items()]
    # The library is linked by name only: the process that loads the kernel has it loaded already.
    return [
        *(*found.command, *flags("host", target, extra), *relative, *includes),
        *(UNIT_NAMES["host"], "-o", ARTIFACTS["host"], f"-L{library.parent}", "-ltvm_ffi"),
    ]


def _run_program(found: Found, folder: Path, target: Target, spec: KernelSpec) -> Compiled:
    command = program_command(found, target, spec.flags, spec.sources)
    started = time.perf_counter()
    environment = config.child_environment(LC_ALL="C", TMPDIR=str(folder))
    functions = _exported(folder, spec)
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
        if spec.sources is not None and spec.sources.text:
            words = words.replace(f"{TEXTS}/", "")
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


def _exported(folder: Path, spec: KernelSpec) -> set[str]:
    if spec.route != "host":
        return set()
    unit = (folder / UNIT_NAMES[spec.route]).read_text(encoding="utf-8")
    return artifact.exported(unit, None if spec.sources else config.kernel_sources_dir())


_ERROR = re.compile(r"(?:\berror\b|\bfatal\b|No space left on device|undefined reference)")


def _first_error(log: str) -> str:
    """The first error of a compiler's output, with the three lines that follow it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            return "\n".join(each[:400] for each in lines[number : number + 4])
    return "\n".join(each[:400] for each in lines[-4:])
