"""Triton to a cubin, for a device that need not be here.

The compiler runs in a process of its own: its settings are global to a process (TRITON_CACHE_DIR, the interpreter),
and the user's own Triton kernels keep theirs. Run as a program, this file is that process: the job on standard
input, the answer on standard output, both JSON.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jit_kernel.device import Target

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
# Which tools Triton starts is the user's to say; what it does with kernels is not.
_TOOL_SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_LIBDEVICE_PATH")
_TYPE_LETTERS = {"i64": "l", "i32": "i", "fp32": "f"}
_SECONDS_LIMIT = 600


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

    unit: JSON with `module` (a file of the folder, without .py) and `function` in it; `types`, what stands behind
        the names in that file's SIGNATURE; `constants`, the constexpr arguments; `num_warps` and `num_stages`.
    Returns the cubin, what a launcher needs (`name`, `types` with one letter an argument, `threads`, `shared` in
    bytes, `arguments`), and the log. Raises TritonError; also when a block would need more shared memory than the
    target has, or scratch memory, which no launcher here gives.
    """
    if flags:
        raise TritonError(f"flags are {tuple(flags)}; Triton takes none, its options stand in the unit")
    job = {
        "unit": json.loads(unit),
        "sources": str(kernel_folder.parents[1]),
        "package": f"{kernel_folder.parent.name}.{kernel_folder.name}",
        "capability": capability(target.architecture),
        "path": sys.path,
    }
    with tempfile.TemporaryDirectory(prefix="jit_kernel-triton-") as private:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TRITON_") or name in _TOOL_SETTINGS
        }
        environment |= {"TRITON_CACHE_DIR": private, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"TRITON_DISABLE_LINE_INFO": "1"}  # it would hold this machine's paths
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=_SECONDS_LIMIT,
            check=False,
        )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise TritonError(f"{job['package']} for {target} did not compile: {lines[-1]}", done.stderr)
    answer = json.loads(done.stdout.splitlines()[-1])
    metadata = answer["metadata"]
    if metadata["shared"] > shared_limit(target.architecture):
        raise TritonError(
            f"{metadata['name']} needs {metadata['shared']} bytes of shared memory; "
            f"a block of {target} has {shared_limit(target.architecture)}",
            done.stderr,
        )
    return base64.b64decode(answer["image"]), metadata, done.stderr


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """The work of the compiler's own process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = time.perf_counter()
    unit = job["unit"]
    module = importlib.import_module(f"{job['package']}.{unit['module']}")
    function = getattr(module, unit["function"])
    types = {name: _substituted(kind, unit["types"]) for name, kind in module.SIGNATURE.items()}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    arguments = [name for name in function.arg_names if name not in unit["constants"]]
    if arguments != list(module.SIGNATURE):
        raise ValueError(f"the arguments of {unit['function']} are not those of SIGNATURE and the constants")
    attributes = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]] for name in module.ALIGNED_POINTERS
    } if unit["aligned"] else {}  # fmt: skip
    compiled = triton.compile(
        ASTSource(function, signature, unit["constants"], attributes),
        target=GPUTarget("cuda", job["capability"], 32),
        options={"num_warps": unit["num_warps"], "num_stages": unit["num_stages"]},
    )
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{metadata.name} needs scratch memory, which the launcher does not give")
    return {
        "image": base64.b64encode(compiled.asm["cubin"]).decode(),
        "metadata": {
            "name": metadata.name,
            "types": "".join("p" if types[n][0] == "*" else _TYPE_LETTERS[types[n]] for n in arguments),
            "threads": 32 * metadata.num_warps,
            "shared": metadata.shared,
            "arguments": arguments,
            "num_stages": metadata.num_stages,
            "triton": triton.__version__,
            "seconds": round(time.perf_counter() - started, 3),
        },
    }


def _substituted(kind: str, types: dict[str, str]) -> str:
    return f"*{types.get(kind[1:], kind[1:])}" if kind.startswith("*") else kind


def _main() -> None:
    job = json.load(sys.stdin)
    # Not this file's own folder, whose cache.py and compiler.py would hide others of the same name.
    sys.path[:] = [job["sources"], *job["path"]]
    answer = _compile(job)
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
