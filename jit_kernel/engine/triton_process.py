"""The program in which Triton compiles one kernel: the job is its argument, the answer its standard output, both JSON.

Started by triton_compiler.py; it imports nothing of jit_kernel, which need not be on its path.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
from typing import Any

_TYPE_LETTERS = {"i64": "l", "i32": "i", "fp32": "f"}


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """The work of the compiler's own process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
        },
    }


def _substituted(kind: str, types: dict[str, str]) -> str:
    return f"*{types.get(kind[1:], kind[1:])}" if kind.startswith("*") else kind


def _main() -> None:
    job = json.loads(sys.argv[1])
    # Without this file's own folder, whose store.py and compiler.py would be found before others of the same name.
    sys.path[:] = [job["sources"], *job["path"]]
    answer = _compile(job)
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
