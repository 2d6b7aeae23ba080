"""Triton to a cubin, for a device that need not be here.

The compiler runs in a process of its own (triton_process.py): its settings are global to a process
(TRITON_CACHE_DIR, the interpreter), and the user's own Triton kernels keep theirs.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import process

# Bytes of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide,
# technical specifications): 8.6, 8.9 and 12.x have 100 KiB a multiprocessor, of which 1 KiB is reserved.
SHARED_LIMITS = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 232448,
    120: 101376,
    121: 101376,
}
# Of Triton's settings these alone reach the compiler: the user chooses the tools that it starts, and nothing else.
_TOOL_SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_LIBDEVICE_PATH")
_PROGRAM = Path(__file__).with_name("triton_process.py")
_SECONDS_LIMIT = 600
_KEPT_BYTES = 256 << 20  # the answer holds the cubin
_SHOWN_CHARACTERS = 200


class TritonError(RuntimeError):
    """Triton is missing, or refused a kernel. `log` holds what the compiler printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def version() -> str:
    """The installed Triton's version; TritonError without one."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("triton")
    except PackageNotFoundError as error:
        raise TritonError("Triton is not installed: pip install triton") from error


def capability(architecture: str) -> int:
    """The compute capability of an architecture's name: 90 for "sm_90a"."""
    return int(architecture.removeprefix("sm_").rstrip("af"))


def shared_limit(architecture: str) -> int:
    """Bytes of shared memory that one block may have; of an unknown architecture the smallest."""
    return SHARED_LIMITS.get(capability(architecture), min(SHARED_LIMITS.values()))


def compile_unit(
    unit: str, kernel_folder: Path, target: Target, flags: Sequence[str] = ()
) -> tuple[bytes, dict[str, object], str]:
    """Compile one kernel of a folder of Triton sources.

    unit: JSON with `module` (a file of the folder, without .py) and `function` in it; `signature`, the types of the
        run-time arguments, or None for the file's SIGNATURE; `types`, what stands behind names in it; `aligned`, names
        of arguments, or None for the file's ALIGNED_POINTERS; `constants`, the constexpr arguments; `num_warps` and
        `num_stages`. A `module` with `whole` is imported from the folder by its whole name.
    Returns the cubin, what a launcher needs (`name`, `types` with one letter an argument, `threads`, `shared` in
    bytes, `arguments`), and the log. Raises TritonError; also when a block would need more shared memory than the
    target has, or scratch memory, which no launcher here gives.
    """
    if flags:
        raise TritonError(f"flags are {tuple(flags)}; Triton takes none, its options stand in the unit")
    title, job = _job(json.loads(unit), kernel_folder, target)
    with tempfile.TemporaryDirectory(prefix="jit_kernel-triton-") as private:
        environment = config.child_environment(
            without=lambda name: name.startswith("TRITON_") and name not in _TOOL_SETTINGS,
            TRITON_CACHE_DIR=private,
            PYTHONDONTWRITEBYTECODE="1",
            TRITON_DISABLE_LINE_INFO="1",  # it would hold this machine's paths
        )
        try:
            done = process.run(
                [sys.executable, str(_PROGRAM), json.dumps(job)],
                environment=environment,
                kept_bytes=_KEPT_BYTES,
                seconds=_SECONDS_LIMIT,
            )
        except OSError as error:
            raise TritonError(f"{sys.executable} cannot be started: {error}") from error
        except process.TooSlowError as error:
            raise TritonError(f"{title} for {target} took more than {_SECONDS_LIMIT} s") from error
    if done.status != 0:
        ending = f"ended by {done.killed_by}" if done.killed_by else f"status {done.status}"
        lines = [line for line in done.errors.splitlines() if line.strip()] or [ending]
        raise TritonError(f"{title} for {target} did not compile: {lines[-1]}", done.errors)
    try:
        answer = json.loads(done.output.strip().rpartition("\n")[2])
        image, metadata = base64.b64decode(answer["image"]), answer["metadata"]
        shared = metadata["shared"]
    except (ValueError, KeyError, TypeError) as error:
        said = repr(done.output[-_SHOWN_CHARACTERS:]) if done.output.strip() else "nothing"
        raise TritonError(
            f"{title} for {target}: {sys.executable} ended well and answered no cubin; it printed {said}",
            done.errors,
        ) from error
    if shared > shared_limit(target.architecture):
        raise TritonError(
            f"{metadata['name']} needs {shared} bytes of shared memory; "
            f"a block of {target} has {shared_limit(target.architecture)}",
            done.errors,
        )
    return image, metadata, done.errors


def _job(unit: dict[str, Any], kernel_folder: Path, target: Target) -> tuple[str, dict[str, object]]:
    """What messages call a kernel, and what the compiler's process is told of it."""
    whole = unit["whole"]
    package = f"{kernel_folder.parent.name}.{kernel_folder.name}"
    return f"{unit['module']}:{unit['function']}" if whole else package, {
        "unit": unit,
        "sources": str(kernel_folder if whole else kernel_folder.parents[1]),
        "module": unit["module"] if whole else f"{package}.{unit['module']}",
        "capability": capability(target.architecture),
        "path": sys.path,
    }
