"""Functions of a serving engine replaced by ours in this process, and put back.

A module that has imported a function by name holds a reference of its own, so every module that is loaded gets the
replacement, and loses it again. Modules that are loaded later import what they find.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from jit_kernel.engine.forks import Lock

Function = Callable[..., Any]
Wanted = Mapping[tuple[str, str], Callable[[Function], Function]]


class Replacements:
    """The functions of one engine. `wanted` tells, by module and name, what makes a replacement, a new object, of the
    original."""

    def __init__(self, engine: str, wanted: Callable[[], Wanted]) -> None:
        self._engine, self._wanted = engine, wanted
        self._lock = Lock()
        self._made: list[tuple[Function, Function]] = []  # originals and what stands for them

    def make(self) -> None:
        """Replace every function, or none: RuntimeError for a module or function that is missing."""
        with self._lock:
            if self._made:
                return
            found = [(self._found(*place), maker) for place, maker in self._wanted().items()]
            made = [(original, maker(original)) for original, maker in found]
            for original, ours in made:
                _swap(original, ours)
            self._made = made

    def undo(self) -> None:
        """Put every original back where its replacement stands."""
        with self._lock:
            for original, ours in self._made:
                _swap(ours, original)
            self._made = []

    def are_made(self) -> bool:
        """Whether the replacements stand now."""
        return bool(self._made)

    def _found(self, module: str, name: str) -> Function:
        try:
            function: Function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"jit_kernel cannot replace {module}.{name} of {self._engine}: {error}; "
                f"start {self._engine} without {self._engine} in JIT_KERNEL_PLUGINS"
            ) from error
        return function


def always(ours: Function) -> Callable[[Function], Function]:
    """What makes a replacement that calls `ours`: another object, so that putting back leaves our own modules alone."""

    def replacement_of(original: Function) -> Function:
        def replacement(*arguments: Any, **named: Any) -> Any:
            return ours(*arguments, **named)

        return replacement

    return replacement_of


def _swap(old: Function, new: Function) -> None:
    """Write `new` wherever a loaded module holds `old`."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        names = [name for name, value in list(vars(module).items()) if value is old]
        for name in names:
            setattr(module, name, new)
