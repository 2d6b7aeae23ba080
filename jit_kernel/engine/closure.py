"""The files that a unit is made of: what it includes or imports from the kernel sources, directly or not.

C++ and CUDA: every #include that is found below kernel_sources, in each place where a compiler may look: beside the
including file, in kernel_sources and in kernel_sources/include. An #include under an #if counts always; one of a macro
is refused. What is found in none of the three is a system header: the compiler's identity stands for it. Triton: the
unit's module and every import that is found below kernel_sources, with the __init__ of each package on the way.

Of sources that lie elsewhere (engine/sources.py) the same holds, with their folder in the place of kernel_sources; of
jit_kernel's own files they may include those of include/, which are named "jit_kernel:include/...". A Triton kernel's
imports are followed inside its own package, or its own folder where it has no package.

Files are read anew for every key: that takes 2 ms for the 31 files of a CPU kernel on a busy machine, less than 1 ms
for the others, and a memory of them would have to notice edits.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator

from jit_kernel.engine.sources import Sources

OURS = "jit_kernel:"  # before the names of our files among the sources of somebody else

# Without a ^, which would cost ten times as much; what stands in a comment counts too.
_INCLUDE = re.compile(rb'#[ \t]*include(?:_next)?\b[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>|([^\n]*))')
_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]*(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))", re.MULTILINE
)
_COMMENT = re.compile(rb"#[^\n]*")


class ClosureError(ValueError):
    """A source brings in a file in a way that no key can follow; the message names the file and the line."""


def files_of(unit: str, route: str, kernel: str, sources: str, own: Sources | None = None) -> dict[str, str]:
    """The sha256 of every file below the folder `sources` that a unit is made of, by its name below that folder.

    own: where the unit's own files lie, if not there. Raises ClosureError for an #include of a macro or of a file
    outside of both.
    """
    root = os.path.realpath(sources)
    digests: dict[str, str] = {}
    top = ""
    if route == "triton":
        module = json.loads(unit)["module"]
        root = own.folder if own else root
        installed = os.path.basename(root) in ("site-packages", "dist-packages")
        top = module.partition(".")[0] if own and (installed or "." in module) else ""
        waiting = list(_modules(module if own else f"{kernel.replace('/', '.')}.{module}", root, top))
    else:
        waiting = list(_included(unit.encode(), "", root, own))
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        data = _read(name, root, own)
        if data is None:
            continue
        digests[name] = hashlib.sha256(data).hexdigest()
        waiting += _imported(data, name, root, top) if route == "triton" else _included(data, name, root, own)
    return digests


def _read(name: str, root: str, own: Sources | None) -> bytes | None:
    if own is not None and not name.startswith(OURS):
        return own.read(name)
    path = f"{root}/{name.removeprefix(OURS)}"
    if not os.access(path, os.F_OK):  # a failed open costs ten times as much
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except IsADirectoryError:
        return None


def _included(data: bytes, name: str, root: str, own: Sources | None) -> Iterator[str]:
    """Where a compiler may find what a C++ file includes, by names below the root. `name` is "" for the unit."""
    if b"\\\n" in data:
        data = data.replace(b"\\\n", b"")
    mark = OURS if name.startswith(OURS) else ""
    for quoted, angled, other in _INCLUDE.findall(data):
        if not (quoted or angled):
            raise ClosureError(
                f"{name or 'the unit'}: #include {other.decode(errors='replace').strip()}: "
                "a file must be included by its name, or no key could cover it"
            )
        wanted = os.fsdecode(quoted or angled)
        if not wanted.startswith("/") and ".." not in wanted:
            if quoted and "/" in name:
                yield f"{name.rpartition('/')[0]}/{wanted}"
            yield wanted
            yield f"include/{wanted}"
            if own is not None:
                yield f"{OURS}include/{wanted}"
            continue
        place = root if own is None or mark else own.folder
        yield from _above(name.removeprefix(mark), mark, wanted, place)


def _above(name: str, mark: str, wanted: str, root: str) -> Iterator[str]:
    """The same for an absolute path, or one with "..". A root of "" holds texts."""
    inside = outside = False
    for folder in dict.fromkeys((posixpath.dirname(name), "", "include") if name else ("", "include")):
        path = os.path.normpath(os.path.join(root, folder, wanted))
        if path.startswith(root + os.sep) if root else not path.startswith(("/", "..")):
            inside = True
            yield mark + (os.path.relpath(path, root) if root else path)
        elif root:
            outside |= os.path.isfile(path)
    if outside or not (root or inside):
        raise ClosureError(
            f'{name or "the unit"}: #include "{wanted}" lies outside the kernel sources, and no key would cover it'
        )


def _imported(data: bytes, name: str, root: str, top: str) -> Iterator[str]:
    """Where the modules may lie that a Python file imports, by names below the root."""
    package = name.split("/")[:-1]
    for source, names, plain in _IMPORT.findall(data.replace(b"\\\n", b"")):
        if plain:
            for module in _listed(plain):
                yield from _modules(module, root, top)
            continue
        module = source.decode(errors="replace")
        dots = len(module) - len(module.lstrip("."))
        if dots:
            above = package[: len(package) - dots + 1]
            module = ".".join([*above, *filter(None, [module[dots:]])])
        yield from _modules(module, root, top)
        for each in _listed(names):  # a name may be a submodule
            yield from _modules(f"{module}.{each}", root, top)


def _listed(names: bytes) -> Iterable[str]:
    """The names of an import statement's list, without what they are renamed to."""
    for part in _COMMENT.sub(b"", names).strip(b"() \t").split(b","):
        name = part.split()[:1]  # of "name as other"
        if name:
            yield name[0].decode(errors="replace")


def _modules(module: str, root: str, top: str) -> Iterator[str]:
    """The files that importing a module by its dotted name runs, wherever below the root they exist.

    top: the package whose modules alone count; "" for all: somebody's root may hold every package that is installed.
    """
    parts = module.split(".")
    if top and parts[0] != top:
        return
    if not os.path.exists(os.path.join(root, parts[0])) and not os.path.exists(os.path.join(root, f"{parts[0]}.py")):
        return
    for depth in range(1, len(parts) + 1):
        yield "/".join([*parts[:depth], "__init__.py"])
    yield "/".join(parts) + ".py"
