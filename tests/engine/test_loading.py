"""The bytes that were verified are the bytes that run, on whatever file system they lie."""

from __future__ import annotations

import contextlib
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit
from jit_kernel.device import Target
from jit_kernel.engine import build, library
from jit_kernel.engine import store as stores
from jit_kernel.engine.entry import Entry
from jit_kernel.engine.store import Store
from tests.support import children, tiny


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str | None]:
    return {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}


def damage_after_verifying(damage: str) -> None:
    """From now on damage every entry in the moment between its verification and its use."""
    verify = stores.verify

    def verify_and_damage(folder: Path, key: str, *root: Path) -> Any:
        found = verify(folder, key, *root)
        for path in folder.glob("*"):
            if damage == "removed":
                path.unlink()
            elif damage == "truncated":
                os.truncate(path, 100)
            else:
                path.write_bytes(bytes(len(path.read_bytes())))
        return found

    stores.verify = verify_and_damage


def swapped_between(damage: str) -> dict[str, Any]:
    damage_after_verifying(damage)
    return tiny.call()


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "removed"])
def test_an_artifact_that_is_changed_after_it_was_verified(tmp_path, environment, damage):
    """No SIGBUS, no foreign code: the bytes were read once."""
    assert children.run(tiny.call, environment=environment, scratch=tmp_path).result["compiled"] == 1
    child = children.Child(swapped_between, damage, environment=environment, scratch=tmp_path)
    child.process.join(60)
    assert child.process.exitcode == 0, "the process died"
    outcome = child.outcome(10)
    assert outcome.error == "" and outcome.result == {"found": 42, "right": True, "compiled": 0}, outcome


def publish_cubin(image: bytes, launch: bytes) -> None:
    """Put an entry of a cubin into the store, as Triton's compilation would."""
    from jit_kernel import config
    from jit_kernel.engine import build, identity

    store = stores.Store(config.cache_dir())
    assert store.writable()
    private = store.private_folder()
    (private / "kernel.cubin").write_bytes(image)
    (private / "launch.json").write_bytes(launch)
    spec, target = jit.KernelSpec("tiny", '{"module": "none"}', "triton"), Target("cuda", "sm_80")
    key = build.key_of(spec, target)[0]
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in private.iterdir()
    }
    stores.write_manifest(private, {"key": key, "artifact": "kernel.cubin", "files": files})
    store.publish(private, "tiny", "cuda:sm_80", f"{key}-{identity.present('triton', store)}")


def cubin_work(image: bytes, launch: bytes) -> tuple[bytes, dict[str, Any]]:
    publish_cubin(image, launch)
    damage_after_verifying("overwritten")
    found = jit.load_cubin(jit.KernelSpec("tiny", '{"module": "none"}', "triton"), Target("cuda", "sm_80"))
    return found.image, found.metadata


def test_cubins_and_launch_metadata_are_the_verified_bytes(tmp_path, environment):
    image, launch = os.urandom(5000), b'{"name": "k", "threads": 128}'
    outcome = children.run(cubin_work, image, launch, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == (image, {"name": "k", "threads": 128}), outcome


def on_noexec(folder: str) -> Any:
    return tiny.mounted(folder, "size=16m,mode=700", True, tiny.twice)


def test_a_store_that_is_mounted_noexec(tmp_path, environment):
    """It compiles once and runs: what is loaded lies in memory."""
    (tmp_path / "store").mkdir()
    outcome = children.run(on_noexec, str(tmp_path / "store"), environment=environment, scratch=tmp_path)
    if isinstance(outcome.result, str):
        pytest.skip(outcome.result)
    assert outcome.error == "" and outcome.result == [True, True], outcome
    assert outcome.stderr.count("compiling tiny") == 1


def without_memory_files(work: Any) -> Any:
    """Run `work` as on a system that has no files in memory: without /proc they have no path."""

    def hidden() -> Any:
        assert not os.path.exists("/proc/self")
        return work()

    return tiny.mounted("/proc", "size=1m,mode=755", False, hidden)


def test_without_files_in_memory_a_private_copy_is_loaded(tmp_path, environment):
    environment["TMPDIR"] = str(tmp_path / "tmp")
    (tmp_path / "tmp").mkdir()
    for count in (1, 0):
        outcome = children.run(without_memory_files, tiny.call, environment=environment, scratch=tmp_path)
        if isinstance(outcome.result, str):
            pytest.skip(outcome.result)
        assert outcome.error == "" and outcome.result == {"found": 42, "right": True, "compiled": count}, outcome
        assert list((tmp_path / "tmp").iterdir()) == [], "the private copy stays"


def noexec_everywhere(folder: str) -> Any:
    return tiny.mounted(folder, "size=16m,mode=700", True, partial(without_memory_files, tiny.twice))


@pytest.mark.parametrize("store", ["noexec", "usual"])
def test_where_no_code_can_be_run_one_error_says_so(tmp_path, environment, store):
    """It names noexec and the mend, for a kernel that is found as for one that is compiled, once each."""
    place = tmp_path / "noexec"
    place.mkdir()
    environment["TMPDIR"] = str(place)
    if store == "noexec":
        environment["JIT_KERNEL_CACHE_DIR"] = str(place / "store")
    outcome = children.run(noexec_everywhere, str(place), environment=environment, scratch=tmp_path)
    if isinstance(outcome.result, str):
        pytest.skip(outcome.result)
    assert outcome.error == "", outcome
    for error, message in outcome.result:
        assert error == "CacheError" and "noexec" in message and "TMPDIR" in message and str(place) in message
    assert outcome.stderr.count("compiling tiny") == 1, "a kernel was compiled again though no byte of it was wrong"


def many(count: int) -> list[bool]:
    """Load several kernels of the same functions, closing what the loader opened, as a new daemon does."""
    right = []
    for factor in range(2, 2 + count):
        right.append(tiny.call(factor)["right"])
        for number in range(3, 256):
            target = ""
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{number}")
            if "memfd:tiny" in target:
                os.close(number)
    return right + [tiny.call(factor)["right"] for factor in range(2, 2 + count)]


def test_a_descriptors_number_that_serves_twice_is_not_the_first_library(tmp_path, environment):
    """The dynamic loader answers a path that it knows with the library that it loaded from there."""
    outcome = children.run(many, 4, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == [True] * 8, outcome


def sealed() -> list[str]:
    """Try to change the file that a library was loaded from."""
    assert tiny.call()["right"]
    tried = []
    for number in range(3, 256):
        path, target = f"/proc/self/fd/{number}", ""
        with contextlib.suppress(OSError):
            target = os.readlink(path)
        if "memfd:tiny" in target:
            for change in (lambda p: os.truncate(p, 10), lambda p: os.pwrite(os.open(p, os.O_RDWR), b"x", 0)):
                try:
                    change(path)
                    tried.append("changed")
                except OSError:
                    tried.append("refused")
    return tried


def test_what_is_loaded_is_sealed_and_has_the_kernels_name(tmp_path, environment):
    outcome = children.run(sealed, environment=environment, scratch=tmp_path)
    assert outcome.result == ["refused", "refused"], outcome


def test_bytes_that_are_no_library_say_why():
    with pytest.raises(library.UnloadableError, match="too short"):
        library.load(b"\x7fELF and nothing more", "tiny", set())


def test_a_stored_library_that_cannot_be_loaded_here_is_compiled_again_once(tmp_path, environment):
    """As one built against a newer C library: its bytes are those of the manifest."""
    assert children.run(tiny.call, environment=environment, scratch=tmp_path).result["compiled"] == 1
    (entry,) = tiny.entries(tmp_path / "store")
    data = (entry / "kernel.so").read_bytes()
    tiny.rewrite(entry, data.replace(b"__tvm_ffi_times", b"__tvm_ffi_gone_"))
    outcome = children.run(tiny.call, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == 1, outcome
    assert len(outcome.warnings) == 1 and "times" in outcome.warnings[0]
    again = children.run(tiny.call, environment=environment, scratch=tmp_path)
    assert again.result == {"found": 42, "right": True, "compiled": 0} and again.warnings == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list descriptors")
def test_bytes_that_cannot_be_loaded_leave_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(library.UnloadableError):
            library.load(b"no library", "broken", set())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), OSError(30, "read-only"), stores.CacheError("others")]
)
def test_a_library_that_cannot_be_taken_out_of_the_store_says_why_it_cannot_be_loaded(tmp_path, monkeypatch, error):
    """Neither the store's state, nor a compiler that is gone, nor a manifest without a command hides it."""

    def quarantine(self: Store, place: Path) -> None:
        raise error

    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(Store, "quarantine", quarantine)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    entry = Entry(tmp_path / "tiny" / "cpu:any" / "key-compiler", {}, {}, fresh=True)
    found = build.unloadable(tiny.spec(), Target("cpu", "any"), entry, "wrong ELF class")
    assert "cannot be loaded: wrong ELF class" in str(found) and "stays in the store" in str(found)
    assert str(error) in str(found) and "CXX" in str(found)
