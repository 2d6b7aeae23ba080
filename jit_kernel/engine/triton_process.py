"""The program in which Triton compiles one kernel: the job is its argument, the answer its standard output, both JSON.

Started by triton_compiler.py; it imports nothing of jit_kernel, which need not be on its path.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
from typing import Any

# As the launcher's packed_arguments.h reads them: how a value is passed, and what a pointer points to.
_TYPE_LETTERS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "l", "u8": "B", "u16": "H", "u32": "I", "u64": "L",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_ELEMENT_LETTERS = {
    "fp32": "f", "fp64": "d", "fp16": "h", "bf16": "b", "fp8e4nv": "8", "fp8e5": "9", "i32": "i", "i64": "l",
}  # fmt: skip


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """The work of the compiler's own process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unit = job["unit"]
    module = importlib.import_module(job["module"])
    function = getattr(module, unit["function"])
    function = function if hasattr(function, "arg_names") else triton.jit(function)
    # A module may give its signature itself, with names in it for which the unit has types.
    given = module.SIGNATURE if unit["signature"] is None else unit["signature"]
    types = {name: _substituted(kind, unit["types"]) for name, kind in given.items()}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    arguments = [name for name in function.arg_names if name not in unit["constants"]]
    if arguments != list(given):
        raise ValueError(
            f"the parameters of {unit['function']} that are not constants are {', '.join(arguments)}; those of the "
            f"signature {', '.join(given)}"
        )
    unknown = [f"{name}: {kind}" for name, kind in types.items() if kind[0] != "*" and kind not in _TYPE_LETTERS]
    if unknown:
        raise ValueError(f"the launcher passes no {', '.join(unknown)}; it passes {', '.join(_TYPE_LETTERS)}")
    aligned = module.ALIGNED_POINTERS if unit["aligned"] is None else unit["aligned"]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
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
            "elements": "".join(
                _ELEMENT_LETTERS.get(types[n][1:], "*") if types[n][0] == "*" else "-" for n in arguments
            ),
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
