"""What is built for the index, the wheel and the source distribution, and the files that packaging names."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from jit_kernel import config
from tests.support import children, tiny

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = config.checkout_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="not a checkout")


def built(kind: str, folder: Path) -> Path:
    """A distribution that is built from the checkout."""
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (path,) = folder.iterdir()
    return path


def test_the_wheel_is_small_and_whole(tmp_path):
    """The wheel holds the kernel sources, is at most 1 MB, and works from where it is unpacked."""
    wheel = built("wheel", tmp_path / "dist")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB")
    assert wheel.stat().st_size <= 1_000_000
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    probe = (
        "from jit_kernel import config; print(config.checkout_root(), config.kernel_sources_dir(), config.cache_dir())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(site), "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    sources = site / "jit_kernel" / "kernel_sources"
    assert answer.stdout.split() == ["None", str(sources), str(tmp_path / "home" / ".cache" / "jit_kernel")]
    assert (sources / "flash_attention_v3" / "cpu" / "entry" / "forward.h").exists()
    assert (site / "jit_kernel" / "py.typed").exists()
    for backend in ("cpu", "cuda"):  # in a folder "build", which .gitignore names
        variant = site / "jit_kernel" / "integrations" / "local_kernels" / "build" / f"torch-{backend}"
        assert {path.name for path in variant.iterdir()} == {"__init__.py", "metadata.json"}
    (scripts,) = site.glob("*.dist-info/entry_points.txt")
    assert "jit-kernel = jit_kernel.__main__:main" in scripts.read_text()
    for group, engine in (("sglang.srt.plugins", "sglang"), ("vllm.general_plugins", "vllm")):
        assert f"[{group}]\njit_kernel = jit_kernel.integrations.{engine}:plugin" in scripts.read_text()


def platform_wheel() -> dict[str, Any]:
    """The names of the tool."""
    code = (ROOT / "tools" / "platform_wheel.py").read_text()
    tool: dict[str, Any] = {"__name__": "tool"}
    exec(compile(code, "platform_wheel.py", "exec"), tool)
    return tool


def elf(path: Path) -> tuple[int, set[str]]:
    """The ELF machine of a library and what it exports, by this test's own reading of the file."""
    data = path.read_bytes()
    return int.from_bytes(data[18:20], "little"), set(re.findall(r"__tvm_ffi_times\b", data.decode("latin-1")))


def test_another_machines_launchers_are_of_its_machine_and_export_the_same(tmp_path):
    """A compiler that makes something else ends `make wheels`; an entry's hashes are those of its new library."""
    tool, folder = platform_wheel(), tmp_path / "store"
    children.run(tiny.call, environment={"JIT_KERNEL_CACHE_DIR": str(folder)}, scratch=tmp_path)
    (place,) = folder.rglob("kernel.so")
    before, own = place.read_bytes(), platform.machine()
    other = next(name for name in tool["ELF_MACHINES"] if name != own)
    tool["CROSS_FLAGS"] = ("-Wl,-s",)  # g++ stands for a compiler that makes code for the machine that is asked for
    store = tool["crossed"](folder, config.package_dir().parent, tmp_path / "same", own, "g++ -DANOTHER")
    (made,) = store.rglob("kernel.so")
    assert elf(made) == (tool["ELF_MACHINES"][own], {"__tvm_ffi_times"}) and made.read_bytes() != before
    manifest = json.loads(made.with_name("manifest.json").read_text())
    assert manifest["files"]["kernel.so"]["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    wheel = tool["with_layer"](built("wheel", tmp_path / "dist"), store, tmp_path, other)
    assert re.fullmatch(rf".*-py3-none-manylinux_2_\d+_{other}\.whl", wheel.name)
    with pytest.raises(SystemExit, match=rf"made a library for ELF machine .*; it must be .*, {other}"):
        tool["crossed"](folder, config.package_dir().parent, tmp_path / "other", other, "g++")
    with pytest.raises(SystemExit, match="the machine must be one of x86_64, aarch64"):
        tool["crossed"](folder, config.package_dir().parent, tmp_path / "none", "mips", "g++")


def test_a_platform_wheel_has_a_layer_that_is_used_without_a_compiler(tmp_path):
    """Entries of a store become the installed package's last layer; the tag and RECORD are what an installer reads."""
    wheel = built("wheel", tmp_path / "dist")
    store = str(tmp_path / "store")
    assert (
        children.run(tiny.call, environment={"JIT_KERNEL_CACHE_DIR": store}, scratch=tmp_path).result["compiled"] == 1
    )
    tool = platform_wheel()
    made = tool["with_layer"](wheel, Path(store), tmp_path)
    assert re.fullmatch(rf"jit_kernel-[\d.]+-py3-none-manylinux_2_\d+_{platform.machine()}\.whl", made.name)
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
        (record,) = [name for name in archive.namelist() if name.endswith("/RECORD")]
        lines = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
        assert {name for name, _, _ in lines} == set(archive.namelist())
        for name, digest, size in lines:
            data = archive.read(name)
            right = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert name == record or (digest, size) == (f"sha256={right}", str(len(data))), name
    probe = (
        "from tests.support import tiny; from jit_kernel import config, jit; print(tiny.call(), config.cache_layers())"
    )
    (tmp_path / "site" / "tests").symlink_to(ROOT / "tests")
    answer = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path / "site", capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "home"), "JIT_KERNEL_SEALED": "1"},
    )  # fmt: skip
    assert "'right': True, 'compiled': 0" in answer.stdout and "site/jit_kernel/kernel_cache" in answer.stdout
    assert not (tmp_path / "home").exists()


def test_the_source_distribution_can_be_worked_with(tmp_path):
    """It holds every file that the Makefile and pyproject.toml name."""
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "pyproject.toml", "jit_kernel/py.typed"} <= names
    for name in named_in_the_makefile():
        assert any(each == name or each.startswith(f"{name}/") for each in names), name


def named_in_the_makefile() -> set[str]:
    """The files and folders of the project that the Makefile's commands name."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"\b(?:tests|benchmarks|examples|tools)/[\w./-]*\w", text))


def test_the_makefile_names_files_that_exist():
    names = named_in_the_makefile()
    assert "tests/musa" in names and len(names) > 5
    for name in names:
        assert (ROOT / name).exists(), name
    assert list((ROOT / "tests" / "musa").glob("test_*.py"))


def test_every_python_has_constraints():
    """What is pinned is pinned for each Python that is promised, but for what cannot be had there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for name in ("test", "lint", "transformers", "diffusers", "cuda13") for text in extras[name]
    ]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": python}
        pinned = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
        assert len(pinned) == len(set(pinned)), f"a package is pinned twice for Python {python}"
        expected = {pin.name for pin in pins} - ({"transformers", "diffusers"} if python == "3.10" else set())
        assert set(pinned) == expected, python
        for requirement in wanted:
            if requirement.name != "tomli" and (requirement.marker is None or requirement.marker.evaluate(here)):
                assert requirement.name in pinned, f"{requirement} is not pinned for Python {python}"


def test_a_commit_is_checked_as_make_lint_does():
    """The hooks run the commands of `make lint`."""
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    entries = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert lint is not None and len(entries) == len(lint[1].splitlines())
    for line, entry in zip(lint[1].splitlines(), entries, strict=True):
        assert line.endswith(f"$(BIN)/{entry}"), (line, entry)
