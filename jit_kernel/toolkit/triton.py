"""Triton kernels of anybody's modules, compiled by Triton and launched without it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import KernelSpec, Scalar
from jit_kernel.toolkit.devices import Device
from jit_kernel.toolkit.kernels import TritonKernel


def triton(
    function: Callable[..., Any] | str,
    *,
    signature: Mapping[str, str] | None,
    constants: Mapping[str, Scalar | float] | None = None,
    aligned: Sequence[str] | None = (),
    sources: Sources | None = None,
    types: Mapping[str, str] | None = None,
    target: Device = None,
    num_warps: int = 4,
    num_stages: int = 3,
    variant: Mapping[str, Scalar] | None = None,
) -> TritonKernel:
    """A Triton function as a kernel, compiled ahead in a process of its own and kept in the store.

    function: a `@triton.jit` function at the top level of a module, or its name, with which a process needs no
    Triton: "my.package.kernels:add", or "add.py:add" of a file of `sources` (None: of jit_kernel's own).
    signature: Triton's type of each run-time parameter, in their order: "*bf16", "i32", "fp32"; None for the module's
    SIGNATURE, where `types` stand for names in it. constants: the value of each `tl.constexpr` parameter. aligned: the
    pointers and ints that are multiples of 16; None for the module's ALIGNED_POINTERS. target: as `device` of `cuda`.
    The key covers the module and what it imports of its own package. Raises ValueError and TypeError.
    """
    if isinstance(function, str) and function.partition(":")[0].endswith(".py"):
        module, name, kernel, sources = _of_file(function, sources)
    else:
        module, name, folder = _place_of(function)
        sources = Sources(folder, name=module.partition(".")[0])
        kernel = f"{sources.name}/{name}"
    unit = {
        "module": module,
        "whole": sources is not None,
        "function": name,
        "signature": None if signature is None else dict(signature),
        "types": dict(types or {}),
        "constants": dict(constants or {}),
        "aligned": None if aligned is None else list(aligned),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    try:
        text = json.dumps(unit, indent=1)
    except TypeError as error:
        raise TypeError(f"constants is {constants!r}; each must be an int, a float, a bool or a str") from error
    given = variant or {"function": name, **{key: _shown(value) for key, value in (constants or {}).items()}}
    return TritonKernel(KernelSpec(kernel, text, "triton", tuple(given.items()), (), sources), target)


def _of_file(function: str, sources: Sources | None) -> tuple[str, str, str, Sources | None]:
    """Module, function and kernel of a file of sources."""
    file, _, name = function.partition(":")
    parts = PurePosixPath(file).with_suffix("").parts
    if sources is None:
        return ".".join(parts[2:]), name, "/".join(parts[:2]), None
    if not sources.folder or sources.read(file) is None or not name.isidentifier():
        raise ValueError(f"function is {function!r}; it must be file.py:function, of a file of a folder of sources")
    return ".".join(parts), name, f"{sources.name}/{name}", sources


def _shown(value: Scalar | float) -> Scalar:
    return str(value) if isinstance(value, float) else value


def _place_of(function: Callable[..., Any] | str) -> tuple[str, str, str]:
    """The module and the name of a function, and the folder from which its module is imported."""
    if isinstance(function, str):
        module, colon, name = function.partition(":")
        found = importlib.util.find_spec(module) if colon and name.isidentifier() else None
        if found is None or not found.origin:
            raise ValueError(f"function is {function!r}; it must be module:function, of a module that can be found")
        return module, name, _root_of(module, found.origin)
    plain = getattr(function, "fn", function)
    if not inspect.isfunction(plain) or "<locals>" in plain.__qualname__ or "." in plain.__qualname__:
        raise TypeError(f"function is {function!r}; it must be a @triton.jit function at the top level of a module")
    module, file = plain.__module__, inspect.getsourcefile(plain)
    if module == "__main__":
        main = getattr(sys.modules["__main__"], "__spec__", None)
        module = main.name if main is not None else Path(str(file)).stem
    if file is None or not os.path.isfile(file):
        raise TypeError(f"function is {function!r}; it must be of a module that is a file")
    return module, plain.__name__, _root_of(module, file)


def _root_of(module: str, file: str) -> str:
    """The folder below which a module's file has the module's name."""
    path = Path(file).resolve()
    parts = module.split(".")
    stem = path.parent if path.name == "__init__.py" else path.with_suffix("")
    if list(stem.parts[-len(parts) :]) != parts:
        raise TypeError(f"module {module} lies in {file}; it must be a file of that name in the folders of its package")
    return str(stem.parents[len(parts) - 1])
