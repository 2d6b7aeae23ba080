"""What is damaged in a store is quarantined with one WARNING and compiled again: never an error for ever."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from jit_kernel.commands import cache
from jit_kernel.engine.store import Store
from tests.support import children, tiny


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the tiny kernel, to be copied."""
    folder = tmp_path_factory.mktemp("built")
    outcome = children.run(tiny.call, environment={"JIT_KERNEL_CACHE_DIR": str(folder / "store")}, scratch=folder)
    assert outcome.error == "" and outcome.result["right"], outcome
    return folder / "store"


@pytest.fixture
def store(tmp_path: Path, built: Path) -> Path:
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


def manifest_with(**changes: Any) -> Callable[[Path], None]:
    """Damage: fields of the manifest set to something else."""

    def damage(entry: Path) -> None:
        path = entry / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def text(content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda entry: (entry / "manifest.json").write_bytes(data) and None


def replaced(which: Callable[[Path], Path], kind: str) -> Callable[[Path], None]:
    """Damage: a file or folder becomes something else."""

    def damage(entry: Path) -> None:
        path = which(entry)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "file":
            path.write_text("what is this")
        elif kind == "dangling link":
            path.symlink_to("nowhere")
        elif kind == "link to itself":
            path.symlink_to(path.name)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()

    return damage


def one_file(name: str, **fields: Any) -> dict[str, Any]:
    return {"files": {name: {"size": 1, "sha256": "0" * 64, **fields}}, "artifact": name}


DAMAGES: dict[str, Callable[[Path], None]] = {
    "200,000 brackets": text("[" * 200_000),
    "200,000 objects": text('{"files":' * 200_000),
    "an empty manifest": text(""),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 300),
    "a list": text("[]"),
    "null": text("null"),
    "no UTF-8": text(b"\xff\xfe\x00"),
    "a number of 10,000 digits": text('{"files": ' + "9" * 10_000 + "}"),
    "NUL in a name": manifest_with(**one_file("kernel\0.so")),
    "a lone surrogate in a name": manifest_with(**one_file("kernel\ud800.so")),
    "a name of 5,000 letters": manifest_with(**one_file("k" * 5000)),
    "a name that leads out": manifest_with(**one_file("../../../../etc/passwd")),
    "an absolute name": manifest_with(**one_file("/etc/passwd")),
    "an empty name": manifest_with(**one_file("")),
    "a size that is none": manifest_with(**one_file("kernel.so", size="1")),
    "a negative size": manifest_with(**one_file("kernel.so", size=-1)),
    "a sum that is none": manifest_with(**one_file("kernel.so", sha256=7)),
    "files as a list": manifest_with(files=["kernel.so"]),
    "files of nothing": manifest_with(files={"kernel.so": None}),
    "no files": manifest_with(files={}),
    "an artifact that is a list": manifest_with(artifact=["kernel.so"]),
    "the manifest is a folder": replaced(lambda entry: entry / "manifest.json", "folder"),
    "the manifest is a pipe": replaced(lambda entry: entry / "manifest.json", "pipe"),
    "the artifact is a pipe": replaced(lambda entry: entry / "kernel.so", "pipe"),
    "the artifact is a folder": replaced(lambda entry: entry / "kernel.so", "folder"),
    "the artifact is a dangling link": replaced(lambda entry: entry / "kernel.so", "dangling link"),
    "the entry is empty": replaced(lambda entry: entry, "folder"),
    "the entry is a file": replaced(lambda entry: entry, "file"),
    "the entry is a pipe": replaced(lambda entry: entry, "pipe"),
    "the entry is a dangling link": replaced(lambda entry: entry, "dangling link"),
    "the entry is a link to itself": replaced(lambda entry: entry, "link to itself"),
    "the target is a file": replaced(lambda entry: entry.parent, "file"),
    "the target is a dangling link": replaced(lambda entry: entry.parent, "dangling link"),
    "the kernel is a file": replaced(lambda entry: entry.parent.parent, "file"),
}


def heals(tmp_path: Path, words: str = "") -> None:
    """The next call compiles with one WARNING and is right; the one after it loads without a word."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    first = children.Child(tiny.call, environment=environment, scratch=tmp_path).outcome(60)
    assert first.error == "" and first.result == {"found": 42, "right": True, "compiled": 1}, first
    assert len(first.warnings) == 1 and words in first.warnings[0], first.warnings
    again = children.Child(tiny.call, environment=environment, scratch=tmp_path).outcome(60)
    assert again.error == "" and again.result["compiled"] == 0 and again.warnings == [], again


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again(tmp_path, store, damage, monkeypatch, capsys):
    """And `cache verify` and `cache list` count and name it before."""
    (entry,) = tiny.entries(store)
    DAMAGES[damage](entry)
    if os.path.lexists(entry):
        monkeypatch.setattr(config, "cache_dir", lambda: store)
        for action in ("verify", "list"):
            assert cache.main([action]) == 1
            printed = capsys.readouterr()
            assert f"damaged: {entry}: " in printed.out and "1 damaged" in printed.out + printed.err
    heals(tmp_path, "is unusable")


def test_a_missing_manifest_is_counted_too(tmp_path, store, monkeypatch, capsys):
    (entry,) = tiny.entries(store)
    shutil.copytree(entry, entry.with_name("0" * 32 + "-00000000"))
    (entry / "manifest.json").unlink()
    monkeypatch.setattr(config, "cache_dir", lambda: store)
    assert cache.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {entry}: its manifest is missing" in out and "names another key" in out and "2 damaged" in out


@pytest.mark.parametrize("kind", ["file", "dangling link", "pipe"])
@pytest.mark.parametrize("name", [".tmp", ".locks"])
def test_the_stores_own_folders_that_are_none(tmp_path, store, name, kind):
    """Such a thing is moved away, and named in the one WARNING."""
    shutil.rmtree(tiny.entries(store)[0])
    replaced(lambda entry: store / name, kind)(store)
    heals(tmp_path, str(store / name))
    assert (store / name).is_dir() and not (store / name).is_symlink()


@pytest.mark.parametrize("kind", ["file", "dangling link", "folder", "pipe"])
@pytest.mark.parametrize("name", [".quarantine", ".failed", ".compilers.json", "lock", "holder"])
def test_other_things_that_are_in_the_way(tmp_path, store, name, kind):
    """A damaged entry heals whatever stands where the store keeps its notes."""
    place = store / name if name.startswith(".") else next((store / ".locks").glob(f"*.{name}"))
    if not os.path.lexists(place):
        place.touch()
    replaced(lambda entry: place, kind)(store)
    os.truncate(tiny.entries(store)[0] / "kernel.so", 100)
    heals(tmp_path, "is unusable")


def test_the_newest_damaged_entries_are_kept(tmp_path, store):
    for _ in range(10):
        entry = tiny.entries(store)[0]
        Store(store).quarantine(entry)
        entry.mkdir()
        (entry / "kernel.so").touch()
    kept = list((store / ".quarantine").iterdir())
    assert len(kept) == 8 and all((each / "kernel.so").exists() for each in kept)


MINE = {
    "notes.txt": "file",
    "compilers.json": "file",
    "manifest.json": "file",
    "cpu:any/manifest.json": "file",
    "projects/cpu:any/build/manifest.json": "file",
    "projects/x/y/z/cpu:any/" + "0" * 32 + "-abcdef01": "file",
    "0" * 32 + "-abcdef01/manifest.json": "file",
    "projects/" + "0" * 32 + "-abcdef01/manifest.json": "file",
    ".tmp/mine": "file",
    ".locks/" + "0" * 31 + ".lock": "file",
    ".quarantine/notes": "file",
    ".failed/notes": "file",
    ".ssh/id": "file",
}


def test_clear_in_a_home_folder_removes_entries_alone(tmp_path, store):
    """A store in the place of someone's home: files of all names stay, links are not followed, entries go."""
    home = tmp_path / "store"
    elsewhere = tmp_path / "elsewhere"
    (entry,) = tiny.entries(home)
    shutil.copytree(store / "tiny", elsewhere / "tiny")
    for name in MINE:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    (home / "other").symlink_to(elsewhere)
    (home / "tiny" / "cpu:linked").symlink_to(next((elsewhere / "tiny").iterdir()))
    (entry.parent / ("1" * 32 + "-abcdef01")).symlink_to(tiny.entries(elsewhere)[0])
    before = sorted(elsewhere.rglob("*"))
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(home)}
    outcome = children.run(cache.main, ["clear"], environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == 0, outcome
    assert {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and not path.is_symlink()} == set(
        MINE
    )
    assert sorted(elsewhere.rglob("*")) == before
    assert not entry.parent.exists() and (home / "other").is_symlink()


@pytest.mark.parametrize("value", ["~no-such-user-here/x", "relative", "~no-such-user-here"])
def test_a_cache_folder_that_cannot_be_understood(tmp_path, value):
    outcome = children.run(tiny.call, environment={"JIT_KERNEL_CACHE_DIR": value}, scratch=tmp_path)
    assert outcome.error == "ConfigError" and f"JIT_KERNEL_CACHE_DIR is {value!r}" in outcome.message, outcome


@pytest.mark.parametrize(
    "value", ["/dev/null", "/dev/null/store", "/proc/nothing/store", "/" + "x" * 300, "{file}/store"]
)
def test_a_cache_folder_that_is_none(tmp_path, value):
    """A clear error, or a compilation for this process alone with one WARNING."""
    (tmp_path / "file").touch()
    chosen = value.replace("{file}", str(tmp_path / "file"))
    outcome = children.run(tiny.call, environment={"JIT_KERNEL_CACHE_DIR": chosen}, scratch=tmp_path)
    if outcome.error:
        assert outcome.error == "CacheError" and "JIT_KERNEL_CACHE_DIR" in outcome.message, outcome
    else:
        assert outcome.result["right"] and len(outcome.warnings) == 1, outcome
