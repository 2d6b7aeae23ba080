"""What the key of an entry covers: the files that its unit is made of, and no other."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import tvm_ffi.libinfo

from jit_kernel import config
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import build, closure, nvrtc
from jit_kernel.fa3 import cpu
from jit_kernel.fa3.hopper import kernels as hopper
from jit_kernel.fa3.portable import kernels as portable
from jit_kernel.jit import KernelSpec

SOURCES = config.kernel_sources_dir()
GPU = Target("cuda", "sm_90a")


def of_route(specs: Iterable[KernelSpec], route: str) -> KernelSpec:
    return next(spec for spec in specs if spec.route == route)


# One kernel of each kind, with the target that it is compiled for.
KINDS = {
    "cpu forward": (cpu.kernels.forward_spec("bf16"), cpu_target()),
    "cpu combine": (cpu.kernels.combine_spec(), cpu_target()),
    "hopper launcher": (of_route(hopper.all_specs(), "host"), cpu_target()),
    "hopper kernel": (hopper.forward_spec("bf16", 128, 128, True, False), GPU),
    "hopper decode": (hopper.decode_spec("bf16", 128, 8), GPU),
    "portable launcher": (of_route(portable.all_specs(GPU), "host"), cpu_target()),
    "portable kernel": (of_route(portable.all_specs(GPU), "triton"), GPU),
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernel sources, which the keys are made from."""
    copy = tmp_path / "sources"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(config, "kernel_sources_dir", lambda: copy)
    return copy


def keys() -> dict[str, str]:
    return {name: build.key_of(spec, target)[0] for name, (spec, target) in KINDS.items()}


def changed_by(path: Path, text: str = "\n") -> set[str]:
    """The kinds of kernel whose key changes when a file gets one more line."""
    before = keys()
    path.write_text((path.read_text() if path.exists() else "") + text)
    after = keys()
    return {name for name in KINDS if before[name] != after[name]}


def files(name: str) -> set[str]:
    """The files that one of KINDS is made of."""
    spec, _ = KINDS[name]
    return set(closure.files_of(spec.unit, spec.route, spec.kernel, str(config.kernel_sources_dir())))


def test_a_header_of_the_cpu_leaves_gpu_code_alone(sources):
    assert changed_by(sources / "include" / "jit_kernel" / "cpu" / "simd_avx2.h") == {"cpu forward"}
    headers = [name for name in files("cpu forward") if "/cpu/" in name]
    assert len(headers) > 20
    for name in headers:
        assert changed_by(sources / name) <= {"cpu forward", "cpu combine"}, name


def test_a_launcher_leaves_device_code_alone(sources):
    for name in ("hopper", "portable"):
        unit = KINDS[f"{name} launcher"][0].unit
        (launcher,) = (each for each in files(f"{name} launcher") if each.removeprefix("include/") in unit)
        changed = changed_by(sources / launcher)
        assert f"{name} launcher" in changed and changed <= {"hopper launcher", "portable launcher"}


# A file that the unit of each kind brings in by way of another.
INDIRECT = {
    "cpu forward": "include/jit_kernel/cpu/simd_avx2.h",
    "cpu combine": "include/jit_kernel/cpu/element.h",
    "hopper kernel": "flash_attention_v3/hopper/common/softmax.cuh",
    "hopper decode": "flash_attention_v3/hopper/decode/schedule.cuh",
    "portable kernel": "flash_attention_v3/portable/sequence.py",
}


@pytest.mark.parametrize(("name", "header"), INDIRECT.items())
def test_a_header_that_is_included_indirectly_counts(sources, name, header):
    assert (sources / header).exists() and header not in KINDS[name][0].unit
    assert name in changed_by(sources / header)


@pytest.mark.parametrize("name", ["cpu forward", "cpu combine", "portable launcher"])
def test_the_compiler_opens_no_other_file_of_the_sources(tmp_path, name):
    """The compiler's own list of what it read is part of the closure."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    spec, _ = KINDS[name]
    (tmp_path / "unit.cpp").write_text(spec.unit)
    folders = [SOURCES, SOURCES / "include", *tvm_ffi.libinfo.include_paths(), *nvrtc.include_dirs()]
    done = subprocess.run(
        [compiler, "-std=c++17", "-M", *(f"-I{folder}" for folder in folders), *spec.flags, "unit.cpp"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened = {path for path in done.stdout.replace("\\\n", " ").split() if path.startswith(f"{SOURCES}/")}
    assert opened and {str(Path(path).relative_to(SOURCES)) for path in opened} <= files(name)


def test_a_readme_is_in_no_key(sources):
    assert changed_by(sources / "flash_attention_v3" / "cpu" / "README.md") == set()
    assert changed_by(sources / "flash_attention_v3" / "hopper" / "README.md") == set()
    assert changed_by(sources / "flash_attention_v3" / "portable" / "notes.txt") == set()


def test_a_new_header_that_nothing_includes_changes_nothing(sources):
    assert changed_by(sources / "include" / "jit_kernel" / "another.h") == set()
    assert changed_by(sources / "flash_attention_v3" / "cpu" / "another.h") == set()


def test_the_manifest_names_what_the_key_covers(sources):
    _, inputs = build.key_of(*KINDS["cpu combine"])
    assert "flash_attention_v3/cpu/entry/combine.h" in inputs
    assert "include/jit_kernel/cpu/element.h" in inputs
    assert not any("hopper" in name or "decode" in name for name in inputs)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An empty folder of sources with one kernel's folder."""
    (tmp_path / "family" / "kernel").mkdir(parents=True)
    (tmp_path / "include" / "shared").mkdir(parents=True)
    return tmp_path


def cpp(tree: Path, unit: str) -> set[str]:
    return set(closure.files_of(unit, "host", "family/kernel", str(tree)))


def test_includes_in_every_form_count(tree):
    kernel = tree / "family" / "kernel"
    (kernel / "entry.h").write_text(
        '#include "beside.h"\n  #  include "../up.h"\n#include <shared/angled.h>\n#include <vector>\n'
        '#if NEVER\n#include "shared/conditional.h"\n#endif\n#include \\\n  "continued.h"\n#include "no/such/file.h"\n'
    )
    for name in ("beside.h", "continued.h", "unused.h"):
        (kernel / name).write_text("")
    (tree / "family" / "up.h").write_text('#include "family/kernel/entry.h"\n')  # a circle ends
    for name in ("angled.h", "conditional.h"):
        (tree / "include" / "shared" / name).write_text("#pragma once\n")
    assert cpp(tree, '#include "family/kernel/entry.h"\n') == {
        *("family/kernel/entry.h", "family/kernel/beside.h", "family/kernel/continued.h", "family/up.h"),
        *("include/shared/angled.h", "include/shared/conditional.h"),
    }


def test_a_file_that_would_be_found_first_counts(tree):
    """A new file beside the including one takes the place of the one below include/."""
    (tree / "family" / "kernel" / "entry.h").write_text('#include "shared/a.h"\n')
    (tree / "include" / "shared" / "a.h").write_text("")
    before = cpp(tree, '#include "family/kernel/entry.h"\n')
    (tree / "family" / "kernel" / "shared").mkdir()
    (tree / "family" / "kernel" / "shared" / "a.h").write_text("")
    after = cpp(tree, '#include "family/kernel/entry.h"\n')
    assert after - before == {"family/kernel/shared/a.h"}


@pytest.mark.parametrize("line", ["#include NAME", "#  include NAME(x)", "#include_next NAME"])
def test_an_include_of_a_macro_is_refused(tree, line):
    (tree / "family" / "kernel" / "entry.h").write_text(f"{line}\n")
    with pytest.raises(closure.ClosureError, match=r"family/kernel/entry\.h: #include NAME.* by its name"):
        cpp(tree, '#include "family/kernel/entry.h"\n')


def test_a_file_outside_the_sources_is_refused(tree):
    outside = tree.parent / "outside.h"
    outside.write_text("")
    for name in (str(outside), "../outside.h"):
        with pytest.raises(closure.ClosureError, match="lies outside the kernel sources"):
            cpp(tree, f'#include "{name}"\n')
    assert cpp(tree, f'#include "{tree}/family/kernel/none.h"\n') == set()


def test_imports_in_every_form_count(tree):
    kernel = tree / "family" / "kernel"
    (kernel / "forward.py").write_text(
        "import os, triton.language as tl\nfrom family.kernel.a import (\n    one,  # of, two\n    two as other,\n)\n"
        "from family.kernel import b, c as renamed\nfrom . import d\nfrom .e import three\nfrom ..above import four\n"
        "import family.kernel.f as f, family.kernel.g\nif True:\n    from family.kernel.h import \\\n        five\n"
    )
    for name in "abcdefghu":
        (kernel / f"{name}.py").write_text("")
    (kernel / "a.py").write_text("from family.kernel.indirect import six\n")
    (kernel / "indirect.py").write_text("from family.kernel.forward import seven\n")
    (kernel / "__init__.py").write_text("")
    (tree / "family" / "above.py").write_text("")
    found = set(closure.files_of('{"module": "forward"}', "triton", "family/kernel", str(tree)))
    expected = [*"abcdefgh", "forward", "indirect", "__init__"]
    assert found == {*(f"family/kernel/{name}.py" for name in expected), "family/above.py"}


def test_the_projects_sources_name_what_they_bring_in():
    """C++ includes files by name and Python imports by statement: then the closure follows every one of them."""
    python = sorted(SOURCES.rglob("*.py"))
    assert python
    for path in SOURCES.rglob("*"):
        name = path.relative_to(SOURCES).as_posix()
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            cpp(SOURCES, f'#include "{name}"\n')
            assert not any(word in path.read_text() for word in ("#embed", ".incbin", "__has_include")), name
    for path in python:
        package, module = path.parent.relative_to(SOURCES).as_posix(), path.stem
        followed = set(closure.files_of(f'{{"module": "{module}"}}', "triton", package, str(SOURCES)))
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                inner = f"{name.replace('.', '/')}.py"
                assert name.split(".")[0] in ("triton", "__future__") or inner in followed, f"{path} imports {name}"
        assert "importlib" not in path.read_text() and "__import__" not in path.read_text()


def test_the_key_names_flags_target_and_route():
    spec, target = KINDS["cpu combine"]
    others = [
        (KernelSpec(spec.kernel, spec.unit, spec.route, spec.variant, (*spec.flags, "-DX")), target),
        (spec, Target("cpu", "x86-64")),
        (KernelSpec("another/kernel", spec.unit, spec.route, spec.variant, spec.flags), target),
        (KernelSpec(spec.kernel, spec.unit + "\n", spec.route, spec.variant, spec.flags), target),
    ]
    assert len({build.key_of(*each)[0] for each in [(spec, target), *others]}) == 1 + len(others)
