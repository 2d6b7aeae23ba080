"""The loader on good days and bad: keys, look-ups, errors and folders that a user may have."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest

from jit_kernel import config
from jit_kernel.engine.store import Store
from tests.support import children, loader_work
from tests.support.compilers import compilations, counting_compiler

SMALL = loader_work.tiny_call
REAL = loader_work.small_call
SOURCES = config.kernel_sources_dir()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def environment(store: Path) -> dict[str, str | None]:
    return {"JIT_KERNEL_CACHE_DIR": str(store)}


def built_by(work: object, folder: Path) -> Path:
    outcome = children.run(work, environment={"JIT_KERNEL_CACHE_DIR": str(folder / "store")}, scratch=folder)
    assert outcome.error == "" and outcome.result["right"], outcome
    return folder / "store"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the smallest kernel, to be copied."""
    return built_by(SMALL, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path, children.Outcome]:
    """A store that holds an attention kernel, the compiler that counted its starts, their file, and the first call."""
    folder = tmp_path_factory.mktemp("attention")
    compiler, starts = counting_compiler(folder / "bin")
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store"), "CXX": compiler}
    cold = children.run(loader_work.attention_call, environment=environment, scratch=folder)
    assert cold.error == "" and cold.result["right"] and compilations(starts) == 1, cold
    return folder / "store", compiler, starts, cold


def entry_of(store: Path) -> Path:
    """The one entry of a store."""
    (folder, _), *rest = Store(store).manifests()
    assert not rest
    return folder


def test_first_call_compiles_and_the_next_process_loads(tmp_path, store, environment):
    compiler, starts = counting_compiler(tmp_path / "bin")
    environment["CXX"] = compiler
    first = children.run(REAL, environment=environment, scratch=tmp_path)
    assert first.error == "", first
    assert first.result["right"] and len(first.result["compiled"]) == 1 and compilations(starts) == 1
    assert first.result["peak_bytes"] < 1.5e9
    starts.write_text("")
    second = children.run(REAL, environment=environment, scratch=tmp_path)
    assert second.result["right"] and second.result["compiled"] == [] and len(second.result["loaded"]) == 1
    assert starts.read_text() == "", "the second process started the compiler"
    assert second.warnings == []


def test_loads_with_no_compiler_and_an_empty_path(tmp_path, built, environment, store):
    shutil.copytree(built, store)
    environment.update(PATH="", CXX=None)
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == []


def test_a_missing_compiler_names_the_package(tmp_path, environment):
    environment.update(PATH="", CXX=None)
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "CompilerNotFoundError" and "apt-get install g++" in outcome.message
    environment.update(CXX="no-such-compiler")
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "CompilerNotFoundError" and "'no-such-compiler'" in outcome.message


def test_a_compile_error_is_short_and_can_be_repeated(tmp_path, environment):
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    header = sources / "flash_attention_v3" / "cpu" / "entry" / "combine.h"
    header.write_text('#error "this line is wrong"\n' + header.read_text())
    outcome = children.run(loader_work.with_sources, str(sources), REAL, environment=environment, scratch=tmp_path)
    assert outcome.error == "CompileError" and "this line is wrong" in outcome.message
    assert len(outcome.message.splitlines()) < 12
    paths = {line.rpartition(": ")[0]: Path(line.rpartition(": ")[2]) for line in outcome.message.splitlines()[-2:]}
    assert "this line is wrong" in paths["log"].read_text()
    repeated = subprocess.run([paths["repeat it with"]], capture_output=True, text=True, check=False)
    assert repeated.returncode != 0 and "this line is wrong" in repeated.stderr
    assert not list((tmp_path / "store" / ".tmp").iterdir())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.99])
def test_a_truncated_artifact_is_rebuilt(tmp_path, built, store, environment, share):
    shutil.copytree(built, store)
    artifact = entry_of(store) / "kernel.so"
    os.truncate(artifact, int(artifact.stat().st_size * share))
    _rebuilt(tmp_path, environment, "kernel.so has")


def test_flipped_bytes_are_rebuilt(tmp_path, built, store, environment):
    shutil.copytree(built, store)
    artifact = entry_of(store) / "kernel.so"
    data = bytearray(artifact.read_bytes())
    for place in range(0, len(data), len(data) // 16):
        data[place] ^= 0xFF
    artifact.write_bytes(data)
    _rebuilt(tmp_path, environment, "other bytes than were compiled")


def test_a_missing_manifest_is_rebuilt(tmp_path, built, store, environment):
    shutil.copytree(built, store)
    (entry_of(store) / "manifest.json").unlink()
    _rebuilt(tmp_path, environment, "manifest is missing")


def test_a_manifest_of_another_key_is_rebuilt(tmp_path, built, store, environment):
    shutil.copytree(built, store)
    manifest = entry_of(store) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"key": "', '"key": "0'))
    _rebuilt(tmp_path, environment, "names another key")


def _rebuilt(tmp_path: Path, environment: dict[str, str | None], reason: str) -> None:
    """The next call compiles with one WARNING, and the one after it loads without a word."""
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and len(outcome.result["compiled"]) == 1
    assert len(outcome.warnings) == 1 and reason in outcome.warnings[0], outcome.warnings
    again = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert again.result["compiled"] == [] and again.warnings == []


def test_a_damaged_attention_kernel_is_rebuilt(tmp_path, store, environment, attention):
    built, environment["CXX"], _, first = attention
    shutil.copytree(built, store)
    for folder, _ in list(Store(store).manifests()):
        os.truncate(folder / "kernel.so", 4096)
    again = children.run(loader_work.attention_call, environment=environment, scratch=tmp_path)
    assert again.error == "" and again.result["right"]
    assert len(again.warnings) == len(again.result["compiled"]) == len(first.result["compiled"])


def test_what_changes_the_key(tmp_path, store, environment):
    built_by(REAL, tmp_path)
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)

    def stored(*flags: str) -> bool:
        arguments = (str(sources), flags)
        outcome = children.run(loader_work.is_stored, *arguments, environment=environment, scratch=tmp_path)
        assert outcome.error == "", outcome
        return bool(outcome.result)

    assert stored()
    assert not stored("-DOTHER=1")
    header = sources / "flash_attention_v3" / "cpu" / "entry" / "combine.h"
    text, times = header.read_text(), header.stat()
    header.write_text(text.replace("namespace", "namespace ", 1))
    os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not stored(), "a header edited with its mtime kept was not seen"
    header.write_text(text)
    assert stored()
    (sources / "include" / "jit_kernel" / "another.h").write_text("\n")
    assert stored(), "a header that the kernel does not include changed its key"
    indirect = sources / "include" / "jit_kernel" / "cpu" / "element.h"
    indirect.write_text(indirect.read_text() + "\n")
    assert not stored(), "a header that the kernel includes by way of another was not seen"


def test_another_compiler_behind_the_same_path(tmp_path, environment):
    compiler, starts = counting_compiler(tmp_path / "bin", version="compiler one")
    environment["CXX"] = compiler
    assert children.run(SMALL, environment=environment, scratch=tmp_path).result["compiled"]
    counting_compiler(tmp_path / "bin", version="compiler two")
    second = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert second.result["compiled"] and "the compiler" in second.result["reasons"][0]
    assert compilations(starts) == 2
    counting_compiler(tmp_path / "bin", version="compiler one")
    assert not children.run(SMALL, environment=environment, scratch=tmp_path).result["compiled"]


def test_a_read_only_store_hits_and_writes_nothing(tmp_path, built, store, environment):
    shutil.copytree(built, store)
    before = _make_read_only(store)
    outcome = children.run(loader_work.without_privileges, SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == []
    assert outcome.warnings == []
    assert _listing(store) == before


def test_a_read_only_store_without_the_entry_compiles_for_this_process(tmp_path, store, environment):
    store.mkdir(mode=0o700)
    before = _make_read_only(store)
    outcome = children.run(loader_work.without_privileges, SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and len(outcome.result["compiled"]) == 1
    assert len(outcome.warnings) == 1 and "cannot be written" in outcome.warnings[0]
    assert _listing(store) == before


def _make_read_only(store: Path) -> list[tuple[str, int, int]]:
    for path in [store, *store.rglob("*")]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    return _listing(store)


def _listing(store: Path) -> list[tuple[str, int, int]]:
    paths = [store, *sorted(store.rglob("*"))]
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_mode) for path in paths]


@pytest.mark.parametrize(("call", "kilobytes"), [(SMALL, 4), (SMALL, 12), (SMALL, 24), (REAL, 40)])
def test_a_full_disk_is_a_clear_error_and_heals(tmp_path, store, environment, call, kilobytes):
    store.mkdir(mode=0o700)
    work = partial(loader_work.on_small_disk, str(store), kilobytes, call, "size=64m")
    outcome = children.run(work, environment=environment, scratch=tmp_path)
    assert outcome.error == "", outcome
    if isinstance(outcome.result, str):
        pytest.skip(f"a small file system cannot be made here: {outcome.result}")
    (error, message), left, then = outcome.result
    assert error == "CacheError" and "is full" in message and "JIT_KERNEL_CACHE_DIR" in message
    assert left == [], "something was left of the failed compilation"
    assert then["right"] and len(then["compiled"]) == 1


@pytest.mark.parametrize("name", ["with a space", "mit-Umläuten-日本"])
def test_unusual_cache_paths(tmp_path, name):
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / name)}
    assert children.run(SMALL, environment=environment, scratch=tmp_path).result["compiled"]
    again = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert again.result["right"] and again.result["compiled"] == []


def test_a_cache_path_through_a_symlink(tmp_path, built):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    shutil.copytree(built, tmp_path / "real" / "store")
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "link" / "store")}
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.result["right"] and outcome.result["compiled"] == []


def test_home_unset(tmp_path, built, store, environment):
    shutil.copytree(built, store)
    environment["HOME"] = None
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == []


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_store_that_others_can_write_is_refused(tmp_path, built, store, environment, mode):
    shutil.copytree(built, store)
    store.chmod(mode)
    outcome = children.run(SMALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "CacheError" and f"chmod go-w '{store}'" in outcome.message
    store.chmod(mode & ~0o022)
    assert children.run(SMALL, environment=environment, scratch=tmp_path).result["compiled"] == []


def test_a_new_store_is_written_by_its_user_alone(tmp_path, environment, store):
    assert children.run(SMALL, environment=environment, scratch=tmp_path).error == ""
    assert stat.S_IMODE(store.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.glob(".*") if path.is_dir()} == {0o700}


def test_what_the_attention_kernel_costs(tmp_path, attention):
    """Cold one compilation in at most 1.5 GB; a second process starts no compiler."""
    store, compiler, starts, cold = attention
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store), "CXX": compiler}
    assert len(cold.result["compiled"]) == 1
    assert cold.result["peak_bytes"] <= 1.5e9
    before = starts.read_text()
    loaded = children.run(loader_work.attention_call, environment=environment, scratch=tmp_path)
    assert loaded.result["right"] and loaded.result["compiled"] == []
    assert starts.read_text() == before
    environment.update(PATH="", CXX=None)
    bare = children.run(loader_work.attention_call, environment=environment, scratch=tmp_path)
    assert bare.error == "" and bare.result["right"] and bare.result["compiled"] == []
