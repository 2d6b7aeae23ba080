"""Kernel sources include what their folder may know, and numbers that Python and C++ share are the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jit_kernel import config
from jit_kernel.fa3 import cpu
from jit_kernel.fa3.checks import plain, values

SOURCES = config.kernel_sources_dir()
WRAPPERS = "include/jit_kernel"
CPU = "flash_attention_v3/cpu"
SUFFIXES = (".h", ".cuh", ".cu", ".cpp", ".inc")
# Folders of the CPU kernels and what each may include of them beside itself.
CPU_FOLDERS = {
    "common": set(),
    "prefill": {"common"},
    "backward": {"common"},
    "decode": {"common"},
    "entry": {"common", "prefill", "decode", "backward"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def included(path: Path) -> list[Path]:
    """The files of kernel_sources that a source includes; what lies elsewhere is the system's or tvm-ffi's."""
    found = []
    for quoted, angled in INCLUDE.findall(path.read_text(encoding="utf-8")):
        places = [root / (quoted or angled) for root in (SOURCES, SOURCES / "include")]
        own = [place for place in places if place.is_file()]
        assert own or angled, f"{path} includes {quoted}, which is no file below {SOURCES}"
        found += own
    return found


GRAPH = {
    path.relative_to(SOURCES).as_posix(): [target.relative_to(SOURCES).as_posix() for target in included(path)]
    for path in sorted(SOURCES.rglob("*"))
    if path.suffix in SUFFIXES
}


def folder_of(name: str) -> str:
    """What a source belongs to: the wrappers of one kind of device, or one implementation of a kernel family."""
    depth = 3 if name.startswith(WRAPPERS) else 2
    return "/".join(name.split("/")[:depth])


@pytest.mark.parametrize("name", GRAPH)
def test_a_source_includes_its_own_folder_and_the_wrappers(name):
    """So an edit of one family's source recompiles nothing of another's; the wrappers know no kernel."""
    for target in GRAPH[name]:
        allowed = target.startswith(WRAPPERS) and not name.startswith(WRAPPERS)
        assert allowed or folder_of(target) == folder_of(name), f"{name} includes {target}"


def test_there_are_sources_of_every_kind():
    """The test above reads what it should."""
    folders = {folder_of(name) for name in GRAPH}
    assert {CPU, "flash_attention_v3/hopper", f"{WRAPPERS}/cpu", f"{WRAPPERS}/cuda"} <= folders
    assert all(any(name.startswith(f"{CPU}/{folder}/") for name in GRAPH) for folder in CPU_FOLDERS)


@pytest.mark.parametrize("name", [name for name in GRAPH if name.startswith(CPU)])
def test_folders_of_the_cpu_kernels_have_an_order(name):
    """common knows none of the others, prefill and decode do not know each other, entry stands on top."""
    folder = name.removeprefix(CPU + "/").split("/")[0]
    for target in GRAPH[name]:
        other = target.removeprefix(CPU + "/").split("/")[0] if target.startswith(CPU) else folder
        assert other == folder or other in CPU_FOLDERS[folder], f"{name} includes {target}"


def test_no_sources_include_each_other():
    """No circle among files either: #pragma once would hide it until an order of includes breaks."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in GRAPH[name]:
                visit(target, (*above, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def constants(path: str) -> dict[str, float]:
    """The constants of a C++ source by name, as far as a number or the largest int32 stands there."""
    text = (SOURCES / path).read_text(encoding="utf-8")
    found: dict[str, float] = {}
    for declared in re.findall(r"^constexpr \w+ ((?:k\w+ = [^;]+))", text, re.MULTILINE):
        for name, value in re.findall(r"(k\w+) = ([^,]+)", declared):
            if value.startswith("{"):
                continue  # a struct
            found[name] = 2**31 - 1 if "numeric_limits<int32_t>::max()" in value else _number(value)
    return found


def _number(text: str) -> float:
    """A number, or uintptr_t{1} << a number of bits."""
    shifted = re.fullmatch(r"uintptr_t\{1\} << (\d+)", text)
    return 1 << int(shifted[1]) if shifted else float(text)


def test_a_plain_call_has_the_limits_of_the_checks():
    """What a library computes unchecked is what Python's checks let through."""
    assert constants(f"{CPU}/entry/plain_call.h") == {"kMostHeadDim": cpu.kernels.MAX_HEAD_DIM}
    assert constants(f"{WRAPPERS}/host/plain_tensor.h") == {
        "kLargestNumber": values.FLOAT32_MAX,
        "kSmallestNumber": values.FLOAT32_MIN,
        "kMostSplits": values.MAX_SPLITS,
        "kMostIndex": values.INT32_MAX,
        "kSureAddress": plain.SURE_ADDRESS,
    }


def fields(struct: str) -> tuple[list[str], int]:
    """The arguments that a struct of entry/arguments.h reads, in order, and how many it says there are."""
    text = (SOURCES / CPU / "entry" / "arguments.h").read_text(encoding="utf-8")
    match = re.search(rf"struct {struct}(?: : (\w+))? {{(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    assert match, struct
    count = re.search(r"kCount = (\d+);", match[2])
    of_base = fields(match[1])[0] if match[1] else []
    return of_base + re.findall(r"(\w+) = from\.\w+\(\);", match[2]), int(count[1]) if count else 0


@pytest.mark.parametrize(
    ("struct", "opening"),
    [
        ("ForwardArguments", "`forward` takes its arguments in this order:"),
        ("PlainArguments", "`plain_forward` is for arguments without any check yet:"),
    ],
)
def test_the_readme_lists_the_arguments_in_the_order_of_the_call(struct, opening):
    names, count = fields(struct)
    assert len(names) == count == len(set(names))
    text = (SOURCES / CPU / "README.md").read_text(encoding="utf-8")
    start = text.index(opening)
    words = re.findall(r"\w+", text[start : text.index("\n\n", start)])
    listed = [word for word in words if word in names]
    assert listed[:count] == names


@pytest.mark.parametrize("struct", ["CombineArguments", "MergeArguments"])
def test_a_struct_reads_as_many_arguments_as_it_counts(struct):
    names, count = fields(struct)
    assert len(names) == count
