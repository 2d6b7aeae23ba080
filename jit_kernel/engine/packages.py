"""The folder of somebody's sources by the package that it belongs to, so that another machine finds it, too.

A folder inside of a package is named by the package and the way from its folder; so is one beside a module that is a
file alone, and the folder from which the module of a Triton kernel is imported. The package is not imported for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

UP = ".."  # the folder that a package lies in: where a Triton kernel's module is imported from


def name_of(folder: str, module: str = "") -> tuple[str, str] | None:
    """The package that a folder belongs to and the way to it, among those that are imported; None without one.

    module: the Triton kernel's, whose folder is the one that its package lies in.
    """
    top = module.partition(".")[0]
    if top:
        places = [place for name, place, _ in _imported() if name == top]
        return next(((top, way) for place in places for way in (".", UP) if _below(place, way) == folder), None)
    best: tuple[int, str, str] | None = None
    for name, place, whole in _imported():
        inside = folder == place or folder.startswith(place + os.sep)
        if not inside or not (whole or place in (folder, os.path.dirname(folder))):
            continue
        # The innermost package, and of modules in one folder the first by name.
        found = -len(place), name, os.path.relpath(folder, place)
        best = found if best is None or found < best else best
    return None if best is None else (best[1], best[2])


def folder_of(package: str, way: str) -> str:
    """The folder that `name_of` named, on this machine. Raises ValueError where there is none."""
    if not package.isidentifier() or os.path.isabs(way) or (way != UP and UP in way.split("/")):
        raise ValueError(f"sources has the package {package!r} and the way {way!r}; they must be a name and a folder")
    found = importlib.util.find_spec(package) if package != "__main__" else None
    if found is None:
        raise ValueError(f"sources has the package {package!r}, which cannot be imported here: install it")
    places = list(found.submodule_search_locations or [])
    places += [os.path.dirname(found.origin)] if found.origin and not places else []
    for place in places:
        folder = _below(os.path.realpath(place), way)
        if os.path.isdir(folder):
            return folder
    raise ValueError(f"sources has the package {package!r}, which has no folder {way!r} in {', '.join(places)}")


def _below(place: str, way: str) -> str:
    return os.path.normpath(os.path.join(place, way))


def _imported() -> Iterator[tuple[str, str, bool]]:
    """Each top-level module: its name, the folder that it lies in without links, and whether it is a package."""
    for name, module in list(sys.modules.items()):
        if "." in name or name == "__main__":
            continue
        known = getattr(module, "__dict__", {})  # not the module itself, which may import what it is asked for
        path, file = known.get("__path__"), known.get("__file__")
        if path is not None:
            yield from ((name, os.path.realpath(each), True) for each in list(path) if isinstance(each, str))
        elif isinstance(file, str):
            yield name, os.path.dirname(os.path.realpath(file)), False
