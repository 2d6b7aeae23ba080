"""Kernels that are compiled ahead: what a module declares, and what a program warms."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jit_kernel.device import Target, cpu_count
from jit_kernel.engine import memory
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.toolkit.kernels import Kernel
from jit_kernel.toolkit.library import Library

Compiled = Kernel | Library
Maker = Callable[[Target], Iterable[Compiled]]

_declared: list[tuple[str, Compiled | Maker]] = []


def declare(*kernels: Compiled | Maker) -> None:
    """Name kernels of the calling module that `python -m jit_kernel.warmup --module` compiles ahead.

    A function among them is called with the target and answers with the kernels for it.
    """
    for kernel in kernels:
        if not isinstance(kernel, (Kernel, Library)) and not callable(kernel):
            raise TypeError(f"declare: {kernel!r} is no kernel of jit.cuda, jit.library or jit.triton")
    module = str(sys._getframe(1).f_globals.get("__name__", ""))
    _declared.extend((module, kernel) for kernel in kernels)


def warm(kernels: Iterable[Compiled], jobs: int | None = None) -> None:
    """Have kernels in the store, each for its own target: those that are missing are compiled, `jobs` at a time.

    Raises what the first one that failed raised, when all others are done.
    """
    wanted = dict.fromkeys((spec, kernel.target) for kernel in kernels for spec in kernel.jobs(kernel.target))
    with ThreadPoolExecutor(max_workers=jobs or cpu_count()) as pool:
        futures = [pool.submit(memory.build, spec, target) for spec, target in wanted]
    for future in futures:
        future.result()


def specs_of(module: str, target: Target) -> list[KernelSpec]:
    """What a module, and every module of it if it is a package, declares for a target.

    Imports it. Raises ValueError where it cannot be imported, declares nothing, or nothing for this target.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"module is {module!r}; it cannot be imported: {error}") from error
    if not _of(module):
        raise ValueError(f"module is {module!r}; it declares no kernel: jit_kernel.jit.declare(...) names them")
    specs = known(module, target)
    if not specs:
        raise ValueError(f"module is {module!r}; it declares no kernel for {target}")
    return specs


def known(module: str, target: Target) -> list[KernelSpec]:
    """The same of a module that is imported; nothing where it declares nothing for the target."""
    return list(dict.fromkeys(spec for kernel in _kernels(_of(module), target) for spec in kernel.jobs(target)))


def _of(module: str) -> list[Compiled | Maker]:
    return [kernel for owner, kernel in _declared if owner == module or owner.startswith(f"{module}.")]


def _kernels(declared: Iterable[Compiled | Maker], target: Target) -> Iterator[Compiled]:
    for kernel in declared:
        for each in [kernel] if isinstance(kernel, (Kernel, Library)) else kernel(target):
            if each.serves(target):
                yield each
