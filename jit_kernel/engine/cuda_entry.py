"""What a launcher must know of a kernel: its symbol and its parameters, as the compiler left them in the cubin.

The types are a table that `jit_kernel/cuda/entry_table.cuh` puts there. The names, which only messages need, are read
from the source; where that fails a parameter has none.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

_TABLE, _SIZES = b"jit_kernel_entry_table", b"jit_kernel_entry_sizes"
_SYMBOLS, _FUNCTION, _KERNEL = 2, 2, 0x10  # ELF: sh_type, the type of a symbol, and NVIDIA's mark of a kernel
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_NAMED = re.compile(r"[\w>*&\]]\s*\b([A-Za-z_]\w*)\s*(?:\[[^\]]*\])?\s*$")


class EntryError(ValueError):
    """A cubin does not hold the kernel that was asked for; the message says what it holds."""


def metadata(image: bytes, symbol: str, entry: str, sources: Iterable[str]) -> dict[str, object]:
    """What goes beside a cubin: `name`, `types`, `elements` (a letter a parameter), `sizes`, `arguments`, `title`.

    symbol: the kernel's, "" where the compiler does not tell: then it is found among the cubin's by its name.
    """
    symbols = _symbols(image)
    data = {name: data for name, kind, _, data in symbols if kind != _FUNCTION}
    table, sizes = data.get(_TABLE), data.get(_SIZES)
    if table is None or sizes is None:
        raise EntryError(f"the cubin holds no table of the parameters of {entry}")
    letters = table.split(b"\0")[0].decode()
    bare = entry.partition("<")[0].rpartition("::")[2].strip()
    count = len(letters) // 2
    return {
        "name": symbol or _only_kernel([name.decode() for name, kind, other, _ in symbols
                                        if kind == _FUNCTION and other & _KERNEL], bare),
        "types": letters[::2],
        "elements": letters[1::2],
        "sizes": list(struct.unpack_from(f"<{count}H", sizes)),
        "arguments": _names(bare, count, sources),
        "title": entry,
    }  # fmt: skip


def _only_kernel(kernels: list[str], bare: str) -> str:
    fitting = [each for each in kernels if each == bare or f"{len(bare)}{bare}" in each]
    if len(fitting) != 1:
        raise EntryError(f"the cubin holds {len(fitting)} kernels of the name {bare} ({', '.join(kernels)}), not one")
    return fitting[0]


def _symbols(image: bytes) -> list[tuple[bytes, int, int, bytes]]:
    """The symbols of a 64-bit little-endian ELF file: name, type, `st_other`, and the bytes of those with a size."""
    (sections,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    tables = [struct.unpack_from("<IIQQQQIIQQ", image, sections + size * index) for index in range(count)]
    found = []
    for table in tables:
        if table[1] != _SYMBOLS:
            continue
        strings = tables[table[6]][4]
        for place in range(table[4], table[4] + table[5], 24):
            name, info, other, section, value, length = struct.unpack_from("<IBBHQQ", image, place)
            start = strings + name
            data = b""
            if 0 < section < count and info & 15 != _FUNCTION:
                offset = tables[section][4] + value
                data = image[offset : offset + length]
            found.append((image[start : image.index(b"\0", start)], info & 15, other, data))
    return found


def _names(bare: str, count: int, sources: Iterable[str]) -> list[str]:
    """The parameters' names in the declaration of a kernel; "" for each where none with so many is found."""
    declared = re.compile(rf"__global__[^;{{}}]*?\b{re.escape(bare)}\s*\(")
    for source in sources:
        text = _COMMENT.sub(" ", source)
        for match in declared.finditer(text):
            parameters = _parameters(text, match.end())
            if len(parameters) == count:
                names = [_NAMED.search(parameter) for parameter in parameters]
                return [name[1] if name else "" for name in names]
    return [""] * count


def _parameters(text: str, start: int) -> list[str]:
    """The parameters behind an open parenthesis, up to the one that closes it."""
    depth, parts, begin = 1, [], start
    for place in range(start, len(text)):
        character = text[place]
        if character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        if depth == 0 or (depth == 1 and character == ","):
            parts.append(text[begin:place].strip())
            begin = place + 1
        if depth == 0:
            return [part for part in parts if part and part != "void"]
    return []
