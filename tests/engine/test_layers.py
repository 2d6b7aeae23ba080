"""Read-only layers under the user's store: looked up in order, never written, whoever compiled what is in them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit
from tests.support import children, tiny
from tests.support.compilers import counting_compiler


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the kernel of factor 2, made by another compiler than this machine's."""
    folder = tmp_path_factory.mktemp("layer")
    compiler, _ = counting_compiler(folder / "bin", version="another one")
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store"), "CXX": compiler}
    outcome = children.run(tiny.call, environment=environment, scratch=folder)
    assert outcome.error == "" and outcome.result["compiled"] == 1, outcome
    return folder / "store"


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*"))


def call_and_layers(factor: int = 2) -> dict[str, Any]:
    return {**tiny.call(factor), "layers": jit.stats()["layers"]}


def environment_of(tmp_path: Path, *layers: Path, **more: str) -> dict[str, str | None]:
    joined = os.pathsep.join(map(str, layers))
    return {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "own"), "JIT_KERNEL_CACHE_LAYERS": joined, **more}


def test_a_hit_in_a_layer_writes_nothing_and_starts_no_compiler(tmp_path, filled):
    before = listing(filled)
    compiler, starts = counting_compiler(tmp_path / "bin")
    environment = environment_of(tmp_path, tmp_path / "absent", filled, CXX=compiler)
    outcome = children.run(call_and_layers, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == 0, outcome
    assert outcome.result["layers"] == {str(filled): 1}
    assert listing(filled) == before and not (tmp_path / "own").exists() and starts.read_text() == ""
    assert len(outcome.warnings) == 1 and f"{tmp_path / 'absent'} is not there" in outcome.warnings[0]


def test_the_order_is_store_then_layers_and_misses_go_to_the_store(tmp_path, filled):
    second = tmp_path / "second"
    shutil.copytree(filled, second)
    environment = environment_of(tmp_path, second, filled)
    first = children.run(call_and_layers, environment=environment, scratch=tmp_path)
    assert first.result["layers"] == {str(second): 1}
    missed = children.run(call_and_layers, 3, environment=environment, scratch=tmp_path)
    assert missed.result["right"] and missed.result["compiled"] == 1
    assert len(tiny.entries(tmp_path / "own")) == 1 == len(tiny.entries(second))
    again = children.run(call_and_layers, 3, environment=environment, scratch=tmp_path)
    assert again.result["layers"] == {str(tmp_path / "own"): 1}


def test_a_damaged_entry_of_a_layer_is_passed_over_and_stays(tmp_path, filled):
    bad = tmp_path / "bad"
    shutil.copytree(filled, bad)
    (entry,) = tiny.entries(bad)
    os.truncate(entry / "kernel.so", 100)
    outcome = children.run(call_and_layers, environment=environment_of(tmp_path, bad, filled), scratch=tmp_path)
    assert outcome.result["right"] and outcome.result["layers"] == {str(filled): 1}, outcome
    assert len(outcome.warnings) == 1 and "kernel.so has 100 bytes" in outcome.warnings[0]
    assert (entry / "kernel.so").stat().st_size == 100, "a layer was written"


def test_an_entry_of_a_layer_that_cannot_be_loaded_is_compiled_into_the_store(tmp_path, filled):
    """As one that was built against a newer C library."""
    bad = tmp_path / "bad"
    shutil.copytree(filled, bad)
    (entry,) = tiny.entries(bad)
    tiny.rewrite(entry, b"\x7fELF of nothing")
    outcome = children.run(call_and_layers, environment=environment_of(tmp_path, bad), scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == 1, outcome
    assert tiny.entries(bad) == [entry] and len(tiny.entries(tmp_path / "own")) == 1


def test_a_layer_that_others_can_write_is_refused(tmp_path, filled):
    open_one = tmp_path / "open"
    shutil.copytree(filled, open_one)
    open_one.chmod(0o777)
    outcome = children.run(tiny.call, environment=environment_of(tmp_path, open_one), scratch=tmp_path)
    assert outcome.error == "CacheError" and f"chmod go-w '{open_one}'" in outcome.message


def test_an_installed_wheels_own_layer_is_the_last(monkeypatch, tmp_path):
    monkeypatch.setenv("JIT_KERNEL_CACHE_LAYERS", str(tmp_path / "first"))
    monkeypatch.setattr(config, "package_dir", lambda: tmp_path / "package")
    config.reload()
    assert config.cache_layers() == (tmp_path / "first",)
    (tmp_path / "package" / "kernel_cache").mkdir(parents=True)
    assert config.cache_layers() == (tmp_path / "first", tmp_path / "package" / "kernel_cache")
    monkeypatch.undo()
    config.reload()
