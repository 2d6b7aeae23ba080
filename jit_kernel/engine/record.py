"""A profile: the kernels that a run loaded, one a line of JSON, so that a warm-up compiles just those.

A line holds what names a kernel and what it is compiled from: kernel, route, variant, flags, unit and target, of a
kernel of somebody else's its entry and its sources, too: their texts, the package that they belong to, or else the
folder, which has to be in the same place where the profile is read; nothing of a call, so no lengths. A kernel that a
package declares is compiled from its present unit, whatever the line says (ready.py); what stands in the unit of
another is code, so a profile that somebody else could change is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import ownership, packages
from jit_kernel.engine.forks import Lock
from jit_kernel.engine.progress import warn_once
from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import KernelSpec, Scalar

_MOST_KERNELS = 4096
_MOST_BYTES = 16 << 20
_ROUTES = ("host", "cuda", "triton")

_guard = Lock()
_noted: set[str] = set()
_begun: set[Path] = set()


class ProfileError(ValueError):
    """A profile cannot be read; the message names the file, the line and what it must be."""


def note(spec: KernelSpec, target: Target) -> None:
    """Add a kernel to the profile that JIT_KERNEL_RECORD names, once. A profile that cannot be written is a WARNING."""
    path = config.settings().record
    if path is None:
        return
    line = json.dumps({**_plain(spec), "target": str(target)}, sort_keys=True) + "\n"
    try:
        with _guard:
            if path not in _begun:
                _noted.update(_lines(path))
                _begun.add(path)
            if line in _noted:
                return
            if len(_noted) >= _MOST_KERNELS:
                warn_once(f"JIT_KERNEL_RECORD: {path} holds {_MOST_KERNELS} kernels; no more are added")
                return
            _noted.add(line)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, line.encode())  # whole: processes that write at once do not mix their lines
            finally:
                os.close(descriptor)
    except (OSError, ProfileError) as error:
        warn_once(f"JIT_KERNEL_RECORD: {path} cannot be written: {error}")


def read(path: Path) -> list[tuple[KernelSpec, Target]]:
    """The kernels of a profile, each once, in order. Raises ProfileError, and CacheError for one that others may
    change."""
    ownership.check_file(path, "profile")
    found: dict[tuple[KernelSpec, Target], None] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            fields = json.loads(line)
            found[_spec(fields), Target.parse(fields["target"])] = None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProfileError(
                f"profile {path}, line {number} is {line[:80]!r}; it must be a kernel: {error}"
            ) from error
    if not found:
        raise ProfileError(f"profile {path} is empty; JIT_KERNEL_RECORD={path} writes one")
    return list(found)


def _lines(path: Path) -> list[str]:
    """The lines of a profile; none where there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    lines = data.decode(errors="replace").splitlines(keepends=True)
    if len(data) > _MOST_BYTES or len(lines) > 2 * _MOST_KERNELS:
        raise ProfileError(f"profile {path} has more than {_MOST_KERNELS} kernels; it must be one that a run wrote")
    return lines


def _plain(spec: KernelSpec) -> dict[str, object]:
    found: dict[str, object] = {
        "kernel": spec.kernel,
        "route": spec.route,
        "unit": spec.unit,
        "variant": [list(field) for field in spec.variant],
        "flags": list(spec.flags),
    }
    if spec.entry:
        found["entry"] = spec.entry
    if spec.sources is not None:
        found["sources"] = {"name": spec.sources.name, **_place_of(spec, spec.sources)}
    return found


def _place_of(spec: KernelSpec, own: Sources) -> dict[str, object]:
    """Where somebody's sources lie, for any machine where that can be said."""
    if not own.folder:
        return {"text": dict(own.text)}
    module = json.loads(spec.unit)["module"] if spec.route == "triton" else ""
    found = packages.name_of(own.folder, module)
    return {"folder": own.folder} if found is None else {"package": found[0], "way": found[1]}


def _spec(fields: dict[str, object]) -> KernelSpec:
    kernel, unit, route = (_text(fields, name) for name in ("kernel", "unit", "route"))
    if route not in _ROUTES:
        raise ValueError(f"route is {route!r}; it must be one of {', '.join(_ROUTES)}")
    if not all(part and part.strip(".") and "\0" not in part for part in kernel.split("/")):
        raise ValueError(f"kernel is {kernel!r}; it must be the name of folders")
    variant, flags = fields["variant"], fields["flags"]
    if not isinstance(variant, list) or not isinstance(flags, list):
        raise TypeError("variant and flags must be lists")
    entry = _text(fields, "entry") if "entry" in fields else ""
    sources = _sources(fields["sources"], route) if "sources" in fields else None
    return KernelSpec(kernel, unit, route, tuple(map(_field, variant)), tuple(map(str, flags)), sources, entry)


def _sources(given: object, route: str) -> Sources:
    """The sources of a kernel that is not jit_kernel's own."""
    kinds = {"folder", "name"}, {"text", "name"}, {"package", "way", "name"}
    if not isinstance(given, dict) or set(given) not in kinds or not isinstance(given["name"], str):
        raise ValueError(f"sources is {given!r}; it must have a name, and a package's folder, a folder or texts")
    if "package" in given:
        return Sources.of_package(str(given["package"]), str(given["way"]), given["name"])
    if "text" in given:
        if route == "triton" or not isinstance(given["text"], dict):
            raise ValueError(f"sources has the text {given['text']!r}; it must be a folder for triton, else files")
        return Sources(text=given["text"], name=given["name"])
    folder = given["folder"]
    if not isinstance(folder, str) or not os.path.isabs(folder):
        raise ValueError(f"sources has the folder {folder!r}; it must be an absolute path")
    return Sources(folder, name=given["name"])


def _field(pair: object) -> tuple[str, Scalar]:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], str | int | bool):
        raise ValueError(f"variant has {pair!r}; it must hold pairs of a name and a value")
    return str(pair[0]), pair[1]


def _text(fields: dict[str, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a str")
    return value
