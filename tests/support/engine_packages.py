"""Packages with the modules and functions of sglang and vLLM that the plug-ins replace, where a test imports them.

The functions have the engines' names and answer with their own; a second module has imported them by name, as the
engines' backends do.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from tests.support import engine_calls

SGLANG_FUNCTIONS = "sglang.kernels.ops.attention.flash_attention"
SGLANG_BACKEND = "sglang.srt.layers.attention.flashattention_backend"
SGLANG_KERNEL = "sgl_kernel.flash_attn"
VLLM_FUNCTIONS = "vllm.vllm_flash_attn.flash_attn_interface"
VLLM_BACKEND = "vllm.v1.attention.backends.fa_utils"


def function_text(engine: str, name: str, module: str) -> str:
    """A function with the engine's signature that answers with its name."""
    listed = ", ".join(
        each if default is None else f"{each}={default}" for each, default in engine_calls.signature(engine, name)
    )
    return f"def {name}({listed}):\n    return {f'{module}.{name}'!r}\n\n\n"


def write_sglang(root: Path) -> None:
    attention = ("flash_attn_with_kvcache", "flash_attn_varlen_func")
    for module, names in ((SGLANG_FUNCTIONS, attention), (SGLANG_KERNEL, (*attention, "get_scheduler_metadata"))):
        functions = "".join(function_text(engine_calls.SGLANG, name, module) for name in names)
        _write(root, module, f"import torch\n\n\n{functions}")
    imported = f"{', '.join(attention)}, {attention[0]} as _under_another_name"
    _write(root, SGLANG_BACKEND, f"from {SGLANG_FUNCTIONS} import {imported}\n")


def write_vllm(root: Path) -> None:
    names = tuple(engine_calls.RECORDS[engine_calls.VLLM]["signatures"])
    functions = "".join(function_text(engine_calls.VLLM, name, VLLM_FUNCTIONS) for name in names)
    _write(root, VLLM_FUNCTIONS, f"import torch\n\n\n{functions}")
    (root / "vllm/vllm_flash_attn/__init__.py").write_text(f"from {VLLM_FUNCTIONS} import flash_attn_varlen_func\n")
    imports = (
        "from vllm.vllm_flash_attn import flash_attn_varlen_func",
        f"from {VLLM_FUNCTIONS} import {', '.join(names[1:])}",
    )
    _write(root, VLLM_BACKEND, "\n".join(imports))


def _write(root: Path, module: str, text: str) -> None:
    *packages, name = module.split(".")
    folder = root
    for package in packages:
        folder = folder / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text(text)


def entry_point(group: str) -> Any:
    """What an engine loads by the entry point that pyproject.toml declares."""
    root = Path(__file__).parents[2]
    ((name, value),) = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"][group].items()
    return EntryPoint(name, value, group).load()


@contextmanager
def importable(root: Path) -> Iterator[None]:
    """The packages of a folder can be imported here, and are forgotten at the end."""
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("sglang", "sgl_kernel", "vllm"):
                del sys.modules[name]
