"""Numbers that stand in Python and in C++ or Triton sources, read from the text of both."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from jit_kernel import config

SOURCES = config.kernel_sources_dir() / "flash_attention_v3"
INCLUDE = config.kernel_sources_dir() / "include" / "jit_kernel" / "cuda"
HOPPER, PORTABLE = SOURCES / "hopper", SOURCES / "portable"


@dataclass(frozen=True)
class TileRow:
    """One row of hopper/prefill/tile_table.inc for calls with or without a mask."""

    head_dim: int
    head_dim_v: int
    masked: bool
    keys: int
    warpgroups: int
    stages_q: int
    stages: int
    overlap: bool
    ping_pong: bool
    query_steps: int


def tile_rows() -> list[TileRow]:
    """Every row of the table, without and with a mask, in order."""
    text = re.sub(r"//[^\n]*", "", (HOPPER / "prefill" / "tile_table.inc").read_text(encoding="utf-8"))
    rows = []
    for fields in re.findall(r"^JIT_KERNEL_TILE\((.*?)\)$", text, re.MULTILINE | re.DOTALL):
        for masked in (False, True):
            head_dim, head_dim_v, *tile = (_value(field, masked) for field in fields.split(","))
            rows.append(TileRow(head_dim, head_dim_v, masked, *tile))  # type: ignore[arg-type]
    return rows


@dataclass(frozen=True)
class Fp8TileRow:
    """One row of hopper/prefill/fp8_tile_table.inc for calls with or without a mask, values prepared or not."""

    head_dim: int
    masked: bool
    prepared: bool
    keys: int
    warpgroups: int
    stages_q: int
    stages: int
    stages_loaded: int
    ping_pong: bool
    part_columns: int


def fp8_tile_rows() -> list[Fp8TileRow]:
    """Every row of the table of e4m3, without and with a mask, in order."""
    text = re.sub(r"//[^\n]*", "", (HOPPER / "prefill" / "fp8_tile_table.inc").read_text(encoding="utf-8"))
    rows = []
    for kind, fields in re.findall(r"^JIT_KERNEL_FP8_(PREPARED_)?TILE\((.*?)\)$", text, re.MULTILINE | re.DOTALL):
        for masked in (False, True):
            head_dim, *tile = (_value(field, masked) for field in fields.split(","))
            rows.append(Fp8TileRow(head_dim, masked, bool(kind), *tile))  # type: ignore[arg-type]
    return rows


def _value(field: str, masked: bool) -> int:
    """A field's value: a number, a truth value, or what it says of kMasked."""
    text = field.strip()
    choice = re.fullmatch(r"kMasked \? (\d+) : (\d+)", text)
    if choice:
        return int(choice[1] if masked else choice[2])
    known = {"true": True, "false": False, "kMasked": masked, "!kMasked": not masked}
    return known[text] if text in known else int(text)


def constant(path: Path, name: str) -> str:
    """The text behind `name =` in a C++ file, which must have exactly one."""
    found = re.findall(rf"\b{name} = ([^,;]+)[,;]", path.read_text(encoding="utf-8"))
    assert len(found) == 1, f"{path.name} has {len(found)} definitions of {name}"
    return str(found[0])


def most_skipped(stages: int) -> tuple[int, int]:
    """kMostFirst and kMostLast of consumer.cuh for a number of stages."""
    numbers = {"C::kStages": stages}
    for name in ("kMostLast", "kMostFirst"):
        expression = constant(HOPPER / "prefill" / "consumer.cuh", name)
        left, operator, right = expression.split()
        a, b = (numbers[word] if word in numbers else int(word) for word in (left, right))
        numbers[name] = {"/": a // b if b else 0, "-": a - b, "+": a + b}[operator]
    return numbers["kMostFirst"], numbers["kMostLast"]


def python_bits(path: Path) -> dict[str, int]:
    """The numbers that a Python file names in capitals at its top, as they are, in tuples or in tl.constexpr(n)."""
    bits: dict[str, int] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        pairs = zip(target.elts, value.elts, strict=True) if _both_tuples(target, value) else [(target, value)]  # type: ignore[attr-defined]
        for name, each in pairs:
            number = each.args[0] if isinstance(each, ast.Call) and len(each.args) == 1 else each
            is_public = isinstance(name, ast.Name) and name.id.isupper() and not name.id.startswith("_")
            if is_public and isinstance(number, ast.Constant) and isinstance(number.value, int):
                bits[name.id] = number.value
    return bits


def _both_tuples(target: ast.expr, value: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


def parameters(path: Path, function: str) -> list[str]:
    """The names of a C++ function's parameters, in order."""
    found = re.search(rf"\b{function}\(([^)]*)\)\s*\{{", path.read_text(encoding="utf-8"))
    assert found, f"{path.name} has no {function}"
    return [parameter.split()[-1].lstrip("*&") for parameter in found[1].split(",")]


def arguments(path: Path, method: str) -> list[str | None]:
    """What a Python file's one call of `.method(...)` passes, by name where an argument has one.

    A name is a variable's, the last part of `call.name` or the key of `call["name"]`, inside a conversion too. In the
    place of `*arguments.some(...)` stands the tuple that `some` of the file arguments.py beside it returns.
    """
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    ]
    assert len(calls) == 1, f"{path.name} has {len(calls)} calls of {method}"
    return [name for argument in calls[0].args for name in _names(argument, path)]


def _names(value: ast.expr, path: Path) -> list[str | None]:
    if not isinstance(value, ast.Starred):
        return [_name(value)]
    assert isinstance(value.value, ast.Call) and isinstance(value.value.func, ast.Attribute), ast.dump(value)
    wanted = value.value.func.attr
    functions = ast.parse(path.with_name("arguments.py").read_text(encoding="utf-8")).body
    found = [each for each in functions if isinstance(each, ast.FunctionDef) and each.name == wanted]
    answer = found[0].body[-1]
    assert isinstance(answer, ast.Return) and isinstance(answer.value, ast.Tuple), f"{wanted} ends with no tuple"
    return [_name(each) for each in answer.value.elts]


def _name(value: ast.expr) -> str | None:
    if isinstance(value, ast.IfExp):
        return _name(value.orelse)
    if isinstance(value, ast.BoolOp):
        return _name(value.values[0])
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and _name(value.func.value) == "arguments":
        return value.func.attr
    if isinstance(value, ast.Call) and value.args:
        key = value.args[0]
        is_get = isinstance(value.func, ast.Attribute) and value.func.attr == "get"
        return str(key.value) if is_get and isinstance(key, ast.Constant) else _name(key)
    if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant):
        return str(value.slice.value)
    if isinstance(value, ast.Attribute):
        return value.attr
    return value.id if isinstance(value, ast.Name) else None
