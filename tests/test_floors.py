"""The house stands: a file imports only from lower floors, and importing anything does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jit_kernel import config

PACKAGE = config.package_dir()

# Low to high. A module may import those of lower floors, and of its own folder where that is named here.
FLOORS: list[set[str]] = [
    {"config", "musa", "nvrtc"},
    {"device", "progress"},
    {"triton_compiler"},
    {"compiler", "cache"},
    {"builds"},
    {"jit"},
    {"fa3"},
    {"flash_attention_v3", "operators"},
    {"attention", "integrations", "warmup", "doctor", "why"},
    {"__main__"},
]
# The package's own __init__ resolves public names at their first use, so it may name what is above it.
ROOMS_WITH_FLOORS = {"fa3", "attention", "integrations"}


def floor_of(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if name in rooms:
            return number
    raise AssertionError(f"jit_kernel/{name} stands on no floor: give it one in {Path(__file__).name}")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, anywhere in it, as parts of their names."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = tuple(node.module.split("."))
            found.update((*base, alias.name) for alias in node.names)
    return {name for name in found if name[0] == "jit_kernel" and len(name) > 1}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    own = floor_of(room)
    for name in imported(path):
        target = name[1]
        if target in {"__version__"} or not ((PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").exists()):
            continue
        same_room = target == room and room in ROOMS_WITH_FLOORS
        same_floor = {room, target} == {"flash_attention_v3", "operators"}
        assert floor_of(target) < own or same_room or same_floor, f"{path.name} imports {'.'.join(name)}"


def test_implementations_do_not_know_each_other():
    families = ("cpu", "hopper", "portable", "musa")
    for path in (PACKAGE / "fa3").glob("*.py"):
        own = next((family for family in families if path.stem.split("_")[0] == family), None)
        if own is None:
            continue
        for name in imported(path):
            if name[:2] == ("jit_kernel", "fa3") and len(name) > 2:
                other = name[2].split("_")[0]
                assert other not in families or other == own, f"{path.name} imports {'.'.join(name)}"
                assert not name[2].startswith("dispatch"), f"{path.name} imports {'.'.join(name)}"


def test_only_the_named_files_start_processes_or_write_the_store():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        if "import subprocess" in text or "os.system(" in text:
            assert path.stem in {"compiler", "triton_compiler", "musa"}, f"{path.name} starts processes"


FRESH = """
import sys, os
before = set(os.listdir('.'))
import jit_kernel
assert not [name for name in ('torch', 'tvm_ffi', 'triton', 'numpy', 'filelock') if name in sys.modules]
assert jit_kernel.__version__
assert 'flash_attn_varlen_func' in dir(jit_kernel)
assert set(os.listdir('.')) == before
"""


def test_importing_the_package_does_nothing(tmp_path):
    """No torch, no files: not in the working folder, the home folder or the store."""
    environment = {
        "HOME": str(tmp_path / "home"),
        "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"),
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


PUBLIC = """
import torch, tvm_ffi, time
started = time.perf_counter()
from jit_kernel import flash_attn_varlen_func
print(time.perf_counter() - started)
"""


def test_the_public_names_import_quickly(tmp_path):
    """With torch and tvm_ffi imported, a public name costs at most 20 ms."""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path), "PATH": ""}
    times = []
    for _ in range(5):
        answer = subprocess.run(
            [sys.executable, "-c", PUBLIC], env=environment, capture_output=True, text=True, check=True
        )
        times.append(float(answer.stdout))
    print(f"import of a public name: {min(times) * 1e3:.1f} ms")
    assert min(times) <= 0.020
