"""Whether what a compiler made can be what was asked for: looked at before it is published, and without loading it.

A launcher for a GPU cannot be loaded where no driver is, so its symbols are read from the file.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from jit_kernel.engine import closure

LIBRARY = "kernel.so"
_PREFIX = b"__tvm_ffi_"
_SHARED, _CUDA, _DYNAMIC_SYMBOLS = 3, 190, 11  # ELF: e_type, e_machine and sh_type
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_EXPORT = re.compile(r"\b(?:JIT_KERNEL_EXPORT(?:_QUESTION)?|TVM_FFI_DLL_EXPORT_TYPED_FUNC)\(\s*(\w+)\s*,")
_DEFINED = re.compile(r"\b__tvm_ffi_(\w+)\(")
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)\(([^)\n]*)\)(.*)$", re.MULTILINE)


class UnfitError(ValueError):
    """A compiler made something else than was asked for; the message says what, "it" is the compiler."""


def exported(unit: str, sources: Path | None) -> set[str]:
    """The functions that a C++ unit exports itself, directly or by a macro of a file of `sources` that it includes.

    Those that an included file exports outside of a macro are not among them, nor any of a unit with an #if.
    """
    text = _COMMENT.sub("", unit)
    if re.search(r"#[ \t]*if", text):
        return set()
    names = {*_EXPORT.findall(text), *_DEFINED.findall(text)}
    called = set(re.findall(r"\b(\w+)\(", text))
    by_macro: dict[str, set[str]] = {}
    if sources is None:
        return names
    for file in closure.files_of(unit, "host", "", str(sources)):
        data = (sources / file).read_text(encoding="utf-8", errors="replace").replace("\\\n", " ")
        for macro, parameters, body in _DEFINE.findall(data):
            if macro in called:
                found = set(_EXPORT.findall(body)) - {each.strip() for each in parameters.split(",")}
                by_macro[macro] = by_macro.get(macro, found) & found  # defined twice: what both export
    return names.union(*by_macro.values())


def check(path: Path, route: str, functions: set[str]) -> None:
    """Raise UnfitError unless a shared library for this machine with these functions lies there, or a cubin."""
    if path.is_symlink() or not path.is_file():
        raise UnfitError(f"it ended with status 0 and made no {path.name}")
    data = path.read_bytes()
    try:
        if route == "host":
            _check_library(data, functions)
        elif data[:4] != b"\x7fELF" or _machine(data) != _CUDA:
            raise UnfitError(f"it ended with status 0 and made no cubin, but {data[:16]!r}...")
    except UnfitError:
        raise
    except (struct.error, IndexError, ValueError) as error:  # tables that lead out of the file
        raise UnfitError(f"it ended with status 0 and made a broken {path.name} of {len(data)} bytes") from error


def foreign(data: bytes) -> list[str]:
    """Why a library is for another machine than this process's; nothing where it is for this one."""
    ours = _our_header()
    if ours[:4] != b"\x7fELF":  # another system's format
        return []
    if data[:4] != b"\x7fELF" or len(data) < 64:
        return ["it is no shared library"]
    if data[4:6] != ours[4:6] or _machine(data) != _machine(ours):
        return [f"it is for another machine: ELF machine {_machine(data)}, this process is {_machine(ours)}"]
    return []


def _our_header() -> bytes:
    import tvm_ffi.libinfo

    with open(tvm_ffi.libinfo.find_libtvm_ffi(), "rb") as file:
        return file.read(64)


def _check_library(data: bytes, functions: set[str]) -> None:
    ours = _our_header()
    if ours[:4] != b"\x7fELF":  # another system's format
        return
    if data[:4] != b"\x7fELF":
        raise UnfitError(f"it ended with status 0 and made no shared library, but {data[:16]!r}...")
    if data[4:6] != ours[4:6] or _machine(data) != _machine(ours):
        raise UnfitError(
            f"it makes code for another architecture: ELF machine {_machine(data)}, this process is {_machine(ours)}"
        )
    if struct.unpack_from("<H", data, 16)[0] != _SHARED:
        raise UnfitError("it ended with status 0 and made no shared library: another kind of ELF file")
    if data[4:6] != b"\x02\x01":  # the tables of 32-bit and of big-endian files are laid out otherwise
        return
    there = defined(data)
    missing = sorted(name for name in functions if _PREFIX + name.encode() not in there)
    if missing or not any(name.startswith(_PREFIX) for name in there):
        wanted = ", ".join(missing) or "any of the kernel's functions"
        raise UnfitError(f"it ended with status 0 and made a library without {wanted}")


def _machine(data: bytes) -> int:
    return int(struct.unpack_from("<H" if data[5] == 1 else ">H", data, 18)[0])


def defined(data: bytes) -> set[bytes]:
    """The names of the dynamic symbols that a 64-bit little-endian ELF file defines."""
    (sections,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    tables = [struct.unpack_from("<IIQQQQIIQQ", data, sections + size * index) for index in range(count)]
    names: set[bytes] = set()
    for table in tables:
        if table[1] != _DYNAMIC_SYMBOLS:
            continue
        offset, length, strings = table[4], table[5], tables[table[6]][4]
        for place in range(offset, offset + length, 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, place)
            if section != 0:
                names.add(data[strings + name : data.index(b"\0", strings + name)])
    return names
