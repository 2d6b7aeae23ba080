"""Packs: the same bytes from the same kernels, and every other pack refused by the name of what is wrong in it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jit_kernel import config
from jit_kernel.commands import cache
from jit_kernel.engine import pack, signature, unpack
from jit_kernel.engine.entry import Entry, sha256_of
from jit_kernel.engine.store import Store
from tests.support import children, tiny

KEY = "hex:" + "5a" * 32


def made(folder: Path) -> Path:
    """A store with two kernels, each compiled in a process of its own."""
    for factor in (2, 3):
        environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store")}
        assert children.run(tiny.call, factor, environment=environment, scratch=folder).result["compiled"] == 1
    return folder / "store"


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores under two paths, in which the same was compiled."""
    return made(tmp_path_factory.mktemp("one")), made(tmp_path_factory.mktemp("two"))


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run a cache command with a store, a key or none; answers with its status and what it printed."""

    def command(*words: str, store: Path, key: str = "") -> tuple[int, str]:
        monkeypatch.setenv("JIT_KERNEL_PACK_KEY", key)
        monkeypatch.setenv("JIT_KERNEL_CACHE_DIR", str(store))
        config.reload()
        status = cache.main(words)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    yield command
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def packed(tmp_path, stores, run) -> Path:
    status, said = run("pack", str(tmp_path / "a.pack"), store=stores[0])
    assert status == 0 and "2 entries" in said, said
    return tmp_path / "a.pack"


def test_two_builds_are_byte_equal_and_signed_ones_too(tmp_path, stores, run, packed):
    assert run("pack", str(tmp_path / "b.pack"), store=stores[1])[0] == 0
    assert packed.read_bytes() == (tmp_path / "b.pack").read_bytes()
    for name, store in zip("cd", stores, strict=True):
        assert run("pack", str(tmp_path / name), store=store, key=KEY)[0] == 0
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes() != packed.read_bytes()


def test_what_is_unpacked_is_packed_to_the_same_bytes_and_runs_sealed(tmp_path, run, packed):
    other = tmp_path / "home" / "store"
    assert run("unpack", str(packed), store=other)[0] == 0
    assert run("pack", str(tmp_path / "again"), store=other)[0] == 0
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()
    assert run("unpack", str(packed), store=other)[1].startswith("0 entries unpacked, 2 there already")
    environment: dict[str, str | None] = {
        "JIT_KERNEL_CACHE_DIR": str(other), "JIT_KERNEL_SEALED": "1", "PATH": "", "CXX": None,
    }  # fmt: skip
    outcome = children.run(tiny.both, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == 0, outcome


def test_every_flipped_byte_is_noticed(tmp_path, run, packed):
    """One byte in each block of the file, whatever it belongs to. `unpack` writes nothing then."""
    data = packed.read_bytes()
    flipped = tmp_path / "flipped"
    for offset in range(7, len(data), 512):
        flipped.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        status, said = run("verify", str(flipped), store=tmp_path / "none")
        assert status == 1, f"a flip at byte {offset} was not noticed: {said}"
    status, said = run("unpack", str(flipped), store=tmp_path / "none")
    assert status == 1 and not tiny.entries(tmp_path / "none"), said


def test_verify_names_each_bad_file(tmp_path, run, packed):
    data = bytearray(packed.read_bytes())
    with tarfile.open(packed) as archive:
        members = [member for member in archive if member.name.endswith("kernel.so")]
    for member in members:
        data[member.offset_data + 100] ^= 1
    packed.write_bytes(data)
    status, said = run("verify", str(packed), store=tmp_path / "none")
    assert status == 1 and all(f"bad: {member.name}: it has other bytes" in said for member in members)


def rebuilt(path: Path, change: Callable[[dict[str, bytes]], None], kinds: dict[str, bytes] | None = None) -> None:
    """Write a pack anew whose files `change` has changed, with an index that agrees, as an attacker would."""
    entries: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if member.name.startswith("entries/") and file is not None:
                entries[member.name.removeprefix("entries/")] = file.read()
    change(entries)
    listed: dict[str, dict[str, object]] = {}
    for name, data in sorted(entries.items()):
        place, _, file_name = name.rpartition("/")
        listed.setdefault(place, {})[file_name] = {"size": len(data), "sha256": sha256_of(data)}
    index = pack.canonical({"format": pack.FORMAT, "entries": listed})
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in [(pack.INDEX, index), *((f"entries/{name}", data) for name, data in sorted(entries.items()))]:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            if kinds and name.rpartition("/")[2] in kinds:
                member.type, member.linkname, member.size = kinds[name.rpartition("/")[2]], "/etc/passwd", 0
            archive.addfile(member, io.BytesIO(data))


def first(entries: dict[str, bytes]) -> str:
    return min(name.rpartition("/")[0] for name in entries)


def moved(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    """Every file whose name has `old` in it goes to `new`, in the index too."""

    def change(entries: dict[str, bytes]) -> None:
        for name in list(entries):
            entries[name.replace(old, new)] = entries.pop(name)

    return change


def foreign_library(entries: dict[str, bytes]) -> None:
    name = f"{first(entries)}/kernel.so"
    entries[name] = entries[name][:18] + b"\xb7\x00" + entries[name][20:]  # EM_AARCH64
    manifest = json.loads(entries[f"{first(entries)}/manifest.json"])
    manifest["files"]["kernel.so"]["sha256"] = sha256_of(entries[name])
    entries[f"{first(entries)}/manifest.json"] = json.dumps(manifest).encode()


def under_the_parent(entries: dict[str, bytes]) -> None:
    entries[f"{first(entries)}/../manifest.json"] = b"{}"


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], None], dict[str, bytes], str]] = {
    "a name that leads up": (moved("tiny/", "../../tiny/"), {}, "'../../tiny' is no kernel's name"),
    "a name that leads up inside": (moved("tiny/", "tiny/../up/"), {}, "is no kernel's name"),
    "a folder in a file's name": (under_the_parent, {}, "is no place of an entry"),
    "an absolute name": (moved("tiny/", "/etc/tiny/"), {}, "is no kernel's name"),
    "a hidden name": (moved("tiny/", ".tmp/"), {}, "'.tmp' is no kernel's name"),
    "a symbolic link": (lambda entries: None, {"kernel.so": tarfile.SYMTYPE}, "a symbolic link"),
    "a hard link": (lambda entries: None, {"kernel.so": tarfile.LNKTYPE}, "a hard link"),
    "an unknown target": (moved("/cpu:", "/tpu:"), {}, "target is 'tpu:"),
    "an alias for a target": (moved(f"/{tiny.cpu_target()}/", "/cpu:native/"), {}, "'tiny/cpu:native/"),
    "a place of another target": (moved("/cpu:", "/cpu:any-"), {}, "its target is"),
    "a library for another machine": (foreign_library, {}, "kernel.so: it is for another machine: ELF machine 183"),
    "no manifest": (lambda entries: entries.pop(f"{first(entries)}/manifest.json"), {}, "has no manifest.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pack_is_refused_by_name(tmp_path, run, packed, name):
    change, kinds, words = HOSTILE[name]
    rebuilt(packed, change, kinds)
    status, said = run("unpack", str(packed), store=tmp_path / "deep" / "store")
    assert status == 1 and words in said, said
    assert not (tmp_path / "deep").exists() or not tiny.entries(tmp_path / "deep" / "store")
    assert not (tmp_path / "tiny").exists() and not (tmp_path / "deep" / "tiny").exists()


def test_signatures(tmp_path, stores, run, packed):
    """Required when a key is configured; wrong, missing and another key's are refused, and the command says which."""
    signed, store = tmp_path / "signed", tmp_path / "store"
    assert "signed: " in run("pack", str(signed), store=stores[0], key=KEY)[1]
    status, said = run("unpack", str(packed), store=store, key=KEY)
    assert status == 1 and "it is not signed" in said
    status, said = run("unpack", str(signed), store=store, key="hex:" + "00" * 32)
    assert status == 1 and "index.hmac-sha256 is wrong" in said and not store.exists()
    assert "signed; no JIT_KERNEL_PACK_KEY" in run("verify", str(signed), store=store)[1]
    status, said = run("unpack", str(signed), store=store, key=KEY)
    assert status == 0 and "rightly signed" in said and len(tiny.entries(store)) == 2
    assert KEY not in str(config.given_settings()) and "JIT_KERNEL_PACK_KEY" not in config.child_environment()


def test_the_key_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("ab" * 32 + "\n")
    monkeypatch.setenv("JIT_KERNEL_PACK_KEY", str(path))
    config.reload()
    assert signature.key() == b"ab" * 32
    path.chmod(0o666)
    with pytest.raises(pack.CacheError, match=r"key file .* is refused: .*can be written by other users"):
        signature.key()
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(pack.CacheError, match="a file of 5 bytes; it must have 32"):
        signature.key()
    monkeypatch.undo()
    config.reload()


def test_a_pack_for_several_targets_and_one_that_is_chosen(tmp_path, stores, run):
    """A cubin's entry beside a library's: a machine without a GPU packs both, and takes what it wants."""
    both = tmp_path / "both"
    shutil.copytree(stores[0], both)
    key = "c" * 32
    cubin = both / "tiny" / "cuda:sm_80" / f"{key}-00000000"
    cubin.mkdir(parents=True)
    (cubin / "kernel.cubin").write_bytes(b"cubin")
    (cubin / "manifest.json").write_text(json.dumps({
        "kernel": "tiny", "target": "cuda:sm_80", "variant": {}, "key": key, "inputs": {"target": "cuda:sm_80"},
        "artifact": "kernel.cubin", "files": {"kernel.cubin": {"size": 5, "sha256": sha256_of(b"cubin")}},
    }))  # fmt: skip
    path, store = tmp_path / "both.pack", tmp_path / "store"
    status, said = run("pack", str(path), store=both)
    assert status == 0 and f"3 entries for {tiny.cpu_target()}, cuda:sm_80" in said
    assert run("unpack", str(path), "--target", "cuda:sm_80", store=store)[0] == 0
    assert [path.parent.name for path in tiny.entries(store)] == ["cuda:sm_80"]
    status, said = run("unpack", str(path), "--target", "cuda:sm_90a", store=store)
    assert status == 1 and "holds nothing for cuda:sm_90a" in said


def test_what_is_damaged_or_absent_is_not_packed(tmp_path, stores, run):
    store = tmp_path / "store"
    shutil.copytree(stores[0], store)
    os.truncate(tiny.entries(store)[0] / "kernel.so", 3)
    status, said = run("pack", str(tmp_path / "x.pack"), store=store)
    assert status == 1 and str(tiny.entries(store)[0]) in said and not list(tmp_path.glob("x.pack*"))
    with pytest.raises(pack.PackError, match=r"not compiled, so not packed.*\nsome kernel"):
        pack.collect([Store(stores[0])], {"tiny/cpu:any/" + "0" * 32: "some kernel"}, ())


def test_an_entry_that_is_damaged_is_replaced(tmp_path, stores, run, packed):
    store = tmp_path / "store"
    shutil.copytree(stores[0], store)
    os.truncate(tiny.entries(store)[0] / "kernel.so", 3)
    status, said = run("unpack", str(packed), store=store)
    assert status == 0 and said.startswith("1 entries unpacked, 1 there already")
    assert run("verify", store=store)[0] == 0


def test_a_pack_that_changes_while_it_is_unpacked(tmp_path, stores, packed, monkeypatch):
    """Between the check and the writing another process writes to the file: nothing of that entry is published."""
    data = packed.read_bytes()

    def check_and_change(found: unpack.Pack, targets: object) -> list[str]:
        assert problems(found, ()) == []
        packed.write_bytes(data[:-2000] + bytes(len(data[-2000:])))
        return []

    problems = unpack.problems
    monkeypatch.setattr(unpack, "problems", check_and_change)
    store = Store(tmp_path / "store")
    with (
        pytest.raises(pack.PackError, match="was changed after it was checked"),
        unpack.open_pack(packed, None) as found,
    ):
        unpack.unpack(found, store, (), lambda holder, waited: None)
    assert all(isinstance(entry, Entry) for _, entry in store.verified()) and not list((store.root / ".tmp").iterdir())
