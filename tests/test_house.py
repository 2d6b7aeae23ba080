"""The structure of the source code: a file imports only from lower floors, and importing anything does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jit_kernel import config
from tests.support import house
from tests.support.quick import QUICK

PACKAGE = config.package_dir()

# Low to high, by the first parts of a file's dotted name below jit_kernel. A file imports from lower floors, and from
# its own; that no circle arises there is a test of its own.
FLOORS: list[set[str]] = [
    {"config"},
    {"moore_threads"},
    {"device"},
    {"engine"},
    {"toolkit"},
    {"jit"},
    {"fa3.call", "fa3.decision", "fa3.gradients.call"},
    {"fa3.features"},
    {"fa3.checks"},
    {"fa3.header"},
    {"fa3.cpu", "fa3.hopper", "fa3.portable", "fa3.musa"},
    {"fa3.dispatch"},
    {"fa3.seam"},
    {"fa3.gradients"},
    {"fa3.torch_operators"},
    {"fa3.entry"},
    {"flash_attention_v3"},
    {"ready"},
    {"", "fa3"},  # the packages' own __init__, which only names what stands below
    {"attention", "integrations", "ops", "warmup", "commands"},
    {"__main__"},
]
# Implementations stand side by side and do not know each other.
APART = {"fa3.cpu", "fa3.hopper", "fa3.portable", "fa3.musa"}


def room_of(name: str) -> tuple[int, str]:
    """The floor of a file and the room that gives it."""
    inner = name.removeprefix("jit_kernel").removeprefix(".")
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if inner == room or (room and inner.startswith(room + ".") and room != "fa3"):
                return number, room
    raise AssertionError(f"{name} stands on no floor: give it one in {Path(__file__).name}")


GRAPH = house.imports(house.ROOT)


def test_no_file_imports_itself_in_a_circle():
    """Inside a floor and inside a folder, too: imports in functions and for types alone count."""
    assert house.circles(house.ROOT) == []


def test_argument_lists_are_few():
    """An argument is listed where it is public, where it becomes a field, and where a kernel takes it.

    A backward pass has fields of its own, in gradients/call.py.

    The lists of `integrations/` are those of other projects' functions, which have their own order and names.
    """
    lists = house.argument_lists(house.ROOT)
    assert len([place for place in lists if not place.startswith("jit_kernel/integrations/")]) <= 28


def test_functions_are_short_and_fa3_is_not_flat():
    numbers = house.measured(house.ROOT)
    assert numbers["functions over 60 lines"] <= 2
    assert numbers["files flat in fa3/"] <= 9
    assert numbers["median file"] <= 150


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_downwards(name):
    floor, room = room_of(name)
    for target in GRAPH[name]:
        below, other = room_of(target)
        assert below <= floor, f"{name} imports {target}, which stands above it"
        assert other == room or not {room, other} <= APART, f"{name} imports {target}: they must not know each other"


def files_of(places: list[str]) -> set[str]:
    return {place.rpartition(":")[0].removeprefix("jit_kernel/") for place in places}


def test_only_config_reads_or_changes_the_environment():
    assert house.environment_uses(house.ROOT) == []


def test_only_the_engines_runner_starts_processes():
    assert files_of(house.process_starts(house.ROOT)) == {"engine/process.py"}


# Files that call a function that writes files, each with what it writes. The store is written by the first two.
WRITERS = {
    "engine/store.py": "the store",
    "engine/lock.py": "the store's locks and the notes beside them",
    "engine/compiler.py": "the artifact, in the private folder that its caller owns",
    "engine/process.py": "a compiler's output, in the same folder",
    "integrations/counters.py": "a line in the file that JIT_KERNEL_COUNTERS names, when a process ends",
    "engine/record.py": "lines in the profile that JIT_KERNEL_RECORD names",
    "engine/pack.py": "a pack, where the user asks for one",
    "engine/removal.py": "the store: what is removed is renamed first",
    "engine/triton_compiler.py": "a temporary folder as Triton's own cache, removed after each compilation",
}


def test_only_the_named_files_write_files():
    assert files_of(house.file_writes(house.ROOT)) == set(WRITERS)


VIOLATIONS = {
    "environment_uses": [
        "import os\nos.environ['A']",
        "import os as o\no.environ.get('A')",
        "from os import environ\nenviron['A'] = ''",
        "from os import environ as e\nprint(e)",
        "from os import getenv as g",
        "from os import *",
        "import os.path\nos.putenv('A', '')",
        "def f():\n    import os as inner\n    return dict(inner.environ)",
        "import os\ngetattr(os, 'environ')",
    ],
    "process_starts": [
        "import subprocess as s\ns.run(['true'])",
        "from subprocess import Popen as P\nP(['true'])",
        "import os\nos.execlp('a', 'a')",
        "import multiprocessing\nmultiprocessing.get_context('fork')",
        "from concurrent.futures import ProcessPoolExecutor",
        "import concurrent.futures as c\nc.ProcessPoolExecutor()",
    ],
    "file_writes": [
        "from shutil import rmtree as r\nr('a')",
        "import os as o\no.replace('a', 'b')",
        "from pathlib import Path\nPath('a').unlink()",
        "def f(path):\n    path.write_text('a')",
        "open('a', 'w')",
        "def f(path, mode):\n    return path.open(mode)",
        "def f(path):\n    with path.open(mode='ab') as file:\n        return file",
        "import os\nos.open('a', os.O_RDWR | os.O_CREAT)",
        "import tempfile\ntempfile.mkdtemp()",
        "from filelock import FileLock",
    ],
}
HARMLESS = (
    "import os\nos.path.join('a')\nos.open('a', os.O_RDONLY)\nopen('a')\nopen('a', 'rb')\n'a'.replace('a', 'b')\n"
    "environ = {}\nenviron['A'] = 1\ndef run(): ...\nrun()\nopen('a', encoding='utf-8')\nimport subprocess\n"
    "subprocess.TimeoutExpired"
)


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in VIOLATIONS.items() for text in texts])
def test_the_rules_find_what_they_forbid(tmp_path, rule, text):
    (tmp_path / "jit_kernel").mkdir()
    file = tmp_path / "jit_kernel" / "somewhere.py"
    file.write_text(text)
    assert getattr(house, rule)(tmp_path), f"{rule} does not see:\n{text}"
    file.write_text(HARMLESS)
    assert getattr(house, rule)(tmp_path) == []


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


CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "thread_time")


def test_tests_share_helpers_through_support_and_read_no_clock():
    """A test file imports no other test file; only test_timing.py, which other runs leave out, reads a clock."""
    clocks = {f"time.{name}{unit}" for name in CLOCKS for unit in ("", "_ns")}
    for path in sorted((house.ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(house.parsed(path)):
            used: list[str] = []
            if isinstance(node, ast.Import):
                used = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                used = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = [f"{node.value.id}.{node.attr}"]
            where = f"{path.relative_to(house.ROOT)}:{getattr(node, 'lineno', 0)}"
            other = [name for name in used if name.startswith("tests.") and ".test_" in name]
            assert not other, f"{where} imports {other}: what test files share belongs in tests/support"
            read = clocks.intersection(used) if path.name != "test_timing.py" else set()
            assert not read, f"{where} reads {read}: limits on time belong in test_timing.py"


def test_the_quick_tests_are_there_and_of_every_room():
    tests = house.ROOT / "tests"
    for name, functions in QUICK.items():
        there = {node.name for node in house.parsed(tests / name).body if isinstance(node, ast.FunctionDef)}
        assert functions <= there, f"{name} has no {sorted(functions - there)}: tests/support/quick.py names them"
    rooms = {path.parent.name for path in tests.glob("*/test_*.py")}
    assert rooms == {name.partition("/")[0] for name in QUICK if "/" in name}
