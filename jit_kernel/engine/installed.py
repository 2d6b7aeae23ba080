"""Which compilers are installed here, and what is wrong with one that cannot be used."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernel import config
from jit_kernel.engine import process, progress

# What a program has to say of its version in: seconds until the wait is reported, and until it is given up.
_SLOW_SECONDS, _LIMIT_SECONDS = 2.0, 20.0
_MOST_VERSION_CHARACTERS = 4096
# Programs that stand before a compiler in CXX, and start it.
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "buildcache", "env", "nice")


class CompilerError(RuntimeError):
    """No kernel can be compiled: there is no compiler, or it failed; the message says what to do about it."""


class CompilerNotFoundError(CompilerError):
    """No compiler for a route is installed, or it cannot be used; the message names the mend."""


class CompileError(CompilerError):
    """A compiler ran and failed. `log` is what it printed, `command` repeats it."""

    def __init__(self, message: str, *, log: str, command: str) -> None:
        super().__init__(message)
        self.log = log
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes hand exceptions over pickled, and BaseException's own way knows no keywords.
        return _compile_error, (str(self), self.log, self.command)


def _compile_error(message: str, log: str, command: str) -> CompileError:
    return CompileError(message, log=log, command=command)


@dataclass(frozen=True)
class Found:
    """A compiler that is installed: its command, the file behind it and why it was chosen."""

    route: str
    name: str
    command: tuple[str, ...]
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.reason})"


def find(route: str) -> Found | None:
    """The compiler that a route would take now, or None. Starts nothing.

    Raises CompilerNotFoundError for a CXX that names no program.
    """
    if route == "host":
        return next(_host_compilers(), None)
    if route == "cuda" and config.cuda_compiler() == "nvcc":
        nvcc = shutil.which("nvcc")
        reason = "JIT_KERNEL_CUDA_COMPILER is nvcc"
        return Found("cuda", "nvcc", (nvcc, *_host_options()), Path(nvcc).resolve(), reason) if nvcc else None
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
    return list(_host_compilers())


def _host_compilers() -> Iterator[Found]:
    """The same, one at a time: a search of PATH in vain takes 0.06 ms of each look-up."""
    if config.host_compiler():
        command = _chosen()
        reason = f"CXX is {config.host_compiler()!r}"
        yield Found("host", Path(command[0]).name, command, Path(command[0]).resolve(), reason)
    for name in ("g++", "clang++"):
        found = _on_path(name)
        if found:
            yield found


# What a search of PATH found, and the file that it was: to search and resolve again takes 0.1 ms of each look-up.
_searched: dict[tuple[str, str], tuple[Found, tuple[int, ...]]] = {}
config.on_reload(_searched.clear)


def _on_path(name: str) -> Found | None:
    """A compiler of PATH: the one that was found before for this PATH, as long as the same file is there."""
    asked = name, config.search_path()
    known = _searched.get(asked)
    if known is not None and known[1] == _file_of(known[0].command[0]):
        return known[0]
    _searched.pop(asked, None)
    path = shutil.which(name)
    if not path:
        return None
    found = Found("host", name, (os.path.abspath(path),), Path(path).resolve(), f"{name} is on PATH and CXX is not set")
    if os.path.isabs(path):  # else another working folder has another
        _searched[asked] = found, _file_of(found.command[0])
    return found


def _file_of(path: str) -> tuple[int, ...]:
    """Which file lies at a path, links followed; nothing where none does."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mode


def _unusable(problem: str) -> CompilerNotFoundError:
    return CompilerNotFoundError(f"CXX is {config.host_compiler()!r}: {problem}")


def _chosen() -> tuple[str, ...]:
    """CXX as a command: a program, perhaps behind one that starts it, and options; or the path of one program."""
    chosen = config.host_compiler()
    whole = shutil.which(chosen)
    if whole is not None:  # a path with a space in it
        return (os.path.abspath(whole),)
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise _unusable(f"it is no command ({error}); close the quote, or set CXX to a path alone") from error
    if not words:
        raise _unusable("it holds no word; set CXX to a compiler, or unset it")
    path = _program(words[0])
    for place, word in enumerate(words[1:], 1):
        if os.path.basename(words[place - 1]) not in _LAUNCHERS or word.startswith("-") or "=" in word:
            break
        _program(word)
    return (path, *words[1:])


def _program(word: str) -> str:
    """The path of a program that CXX names; CompilerNotFoundError says what is wrong with the word."""
    path = shutil.which(word)
    if path is not None:
        return os.path.abspath(path)
    if os.path.isdir(word):
        problem, mend = "is a folder", "name the program in it"
    elif os.path.exists(word):
        problem, mend = "cannot be executed", f"run: chmod +x {shlex.quote(word)}"
    elif os.path.basename(word) == word:
        problem, mend = "is on no folder of PATH: there is no such program", "install it"
    else:
        problem, mend = "is not there: there is no such program", "quote a path with a space in it"
    raise _unusable(f"{word!r} {problem}; {mend}, or set CXX to a compiler that is installed")


def _host_options() -> list[str]:
    """What makes nvcc take the host compiler that CXX names, with its options."""
    if not config.host_compiler():
        return []
    words = list(_chosen())
    while len(words) > 1 and os.path.basename(words[0]) in _LAUNCHERS:  # nvcc would give them its own options
        words.pop(0)
    program = shutil.which(words[0]) or words[0]
    return [f"-ccbin={program}", *(f"-Xcompiler={word}" for word in words[1:])]


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
    """Where a compiler's files lie and when they were last touched; changes when one of them is replaced."""
    fields = [*found.command]
    programs = [shutil.which(word.removeprefix("-ccbin=")) for word in found.command[1:]]
    for path in (found.path, *(Path(each).resolve() for each in programs if each)):
        try:
            status = os.stat(path)
        except OSError as error:
            raise CompilerNotFoundError(f"{found} cannot be used: {error}") from error
        fields += [str(path), *map(str, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))]
    return ":".join(fields)


def identify(found: Found) -> str:
    """The version that a compiler states. A program is started for it.

    Raises CompilerNotFoundError for a program that gives none.
    """
    if found.name == "nvrtc":
        from jit_kernel.engine import nvrtc

        try:
            return f"NVRTC {nvrtc.version()}"
        except (nvrtc.NvrtcError, OSError) as error:  # a library that the loader refuses
            raise CompilerNotFoundError(f"{found.path} cannot be used: {error}") from error
    if found.route == "triton":
        from jit_kernel.engine import triton_compiler

        try:
            return f"Triton {triton_compiler.version()}"
        except triton_compiler.TritonError as error:  # a module without its package's metadata
            raise CompilerNotFoundError(f"{found.path} cannot be used: {error}") from error
    command = [*found.command, "--version"]
    line = shlex.join(command)
    mend = f"({found.reason}); set CXX to a compiler that works"
    try:
        answer = process.run(
            command,
            environment=config.child_environment(LC_ALL="C"),
            seconds=_LIMIT_SECONDS,
            slow=(_SLOW_SECONDS, lambda: progress.say(f"waiting for the answer of: {line}")),
        )
    except OSError as error:
        raise CompilerNotFoundError(f"{line} cannot be started: {error} {mend}") from error
    except process.TooSlowError as error:
        raise CompilerNotFoundError(f"{line} gave no answer in {_LIMIT_SECONDS:.0f} s {mend}") from error
    if answer.status != 0:
        ending = f"ended by {answer.killed_by}" if answer.killed_by else f"status {answer.status}"
        raise CompilerNotFoundError(f"{line} failed, {ending}: {_short(answer.errors or answer.output)} {mend}")
    version = (answer.output.strip() or answer.errors.strip())[:_MOST_VERSION_CHARACTERS]
    if not version:
        raise CompilerNotFoundError(f"{line} printed no version {mend}")
    return version


def _short(text: str) -> str:
    """The last lines of an output, of a length that a message can have."""
    return "\n".join(text.strip().splitlines()[-4:])[-1000:]
