"""Whose code is loaded: what root publishes all may read, and what another user may change nobody loads."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from jit_kernel.engine import ownership
from tests.support import children, tiny

USER = 12345
NO_COMPILER: dict[str, str | None] = {"PATH": "", "CXX": None}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or give a file away")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="jit_kernel-users-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def store(folder: Path) -> Path:
    """A store in two folders that do not exist yet."""
    return folder / "above" / "further" / "store"


@pytest.fixture
def environment(store: Path) -> dict[str, str | None]:
    return {"JIT_KERNEL_CACHE_DIR": str(store)}


def ran(work: object, environment: dict[str, str | None], folder: Path) -> children.Outcome:
    return children.Child(work, environment=environment, scratch=folder).outcome(60)


@needs_root
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_root_warms_up_and_another_user_loads(folder, store, environment, mask):
    """Whatever root's umask; the other user has no compiler and cannot write the store."""
    first = ran(partial(tiny.with_umask, mask, tiny.call), environment, folder)
    assert first.error == "" and first.result["compiled"] == 1, first
    second = ran(partial(tiny.as_user, USER, tiny.call), environment | NO_COMPILER, folder)
    assert second.error == "" and second.result == {"found": 42, "right": True, "compiled": 0}, second
    assert second.warnings == []


@needs_root
def test_a_store_that_cannot_be_read_says_so(folder, store, environment):
    """One that root made private, or a kernel's folder in it: not "no compiler was found"."""
    assert ran(tiny.call, environment, folder).error == ""
    for place in (store, store / "tiny", tiny.entries(store)[0], tiny.entries(store)[0] / "manifest.json"):
        mode = stat.S_IMODE(place.stat().st_mode)
        place.chmod(0o700 if place.is_dir() else 0o600)
        for without in (NO_COMPILER, {}):
            outcome = ran(partial(tiny.as_user, USER, tiny.call), environment | without, folder)
            assert outcome.error == "CacheError" and "cannot be read by user 12345" in outcome.message, outcome
            assert f"chmod -R go+rX '{store}'" in outcome.message and str(place) in outcome.message
        place.chmod(mode)


@pytest.mark.parametrize("mask", [0o000, 0o002])
def test_nothing_that_others_can_write_is_left(folder, store, environment, mask):
    """After a compilation, a failure, a damaged entry and a compilation outside: no bit lets others write."""
    environment["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir(mode=0o755)
    for factor in (2, 3):
        assert ran(partial(tiny.with_umask, mask, partial(tiny.call, factor)), environment, folder).error == ""
    os.truncate(tiny.entries(store)[0] / "kernel.so", 10)
    assert ran(partial(tiny.with_umask, mask, tiny.both), environment, folder).result == 1
    assert ran(partial(tiny.with_umask, mask, tiny.broken), environment, folder).error == "CompileError"
    written = [path for path in folder.rglob("*") if not path.name.startswith("stderr")]
    assert {path.name for path in written} >= {
        "above",
        "store",
        ".tmp",
        ".locks",
        ".quarantine",
        ".failed",
        "repeat.sh",
    }
    for path in written:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & 0o022, f"{path} has mode {mode:04o}"
        own = any(part.startswith(".") for part in path.relative_to(folder).parts) and path.name != ".compilers.json"
        if path.is_dir():
            inside = own and path.parent.name.startswith(".")
            assert mode == (0o700 if own and not inside else 0o755) or inside, f"{path} has mode {mode:04o}"
        elif not own:
            assert mode == 0o644, f"{path} has mode {mode:04o}"


PLACES = {
    "parent": lambda store: store.parent,
    "ancestor": lambda store: store.parent.parent,
    "store": lambda store: store,
    "kernel": lambda store: store / "tiny",
    "target": lambda store: tiny.entries(store)[0].parent,
    "entry": lambda store: tiny.entries(store)[0],
    "artifact": lambda store: tiny.entries(store)[0] / "kernel.so",
    "manifest": lambda store: tiny.entries(store)[0] / "manifest.json",
}


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("place", PLACES)
def test_what_others_can_write_is_refused(folder, store, environment, place, mode):
    assert ran(tiny.call, environment, folder).error == ""
    path = PLACES[place](store)
    before = stat.S_IMODE(path.stat().st_mode)
    if os.geteuid() == 0:
        os.chown(path, -1, USER)  # a group that is not root's own
    elif mode == 0o775 and place in ("parent", "ancestor"):
        pytest.skip("only root can give a folder to a group that it is not in")
    path.chmod(mode)
    outcome = ran(tiny.call, environment, folder)
    assert outcome.error == "CacheError" and f"chmod go-w '{path}'" in outcome.message, outcome
    path.chmod(mode & ~0o022 if path.is_dir() else before)
    assert ran(tiny.call, environment, folder).result["compiled"] == 0


def test_an_owners_own_group_may_write_above_the_store(folder, store, environment):
    """What a umask of 002 makes of every folder; nobody else is in that group."""
    user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(os.getegid())
    if user.pw_gid != group.gr_gid or user.pw_name != group.gr_name or {*group.gr_mem} - {user.pw_name}:
        pytest.skip("this user has no group of its own")
    assert ran(tiny.call, environment, folder).error == ""
    store.parent.chmod(0o775)
    assert ran(tiny.call, environment, folder).result["compiled"] == 0
    store.chmod(0o775)
    assert ran(tiny.call, environment, folder).error == "CacheError"


def test_the_sticky_bit_protects_above_the_store_alone(folder, store, environment):
    assert ran(tiny.call, environment, folder).error == ""
    store.parent.chmod(0o1777)
    assert ran(tiny.call, environment, folder).result["compiled"] == 0
    store.chmod(0o1777)
    assert ran(tiny.call, environment, folder).error == "CacheError"


@needs_root
@pytest.mark.parametrize("place", PLACES)
def test_what_belongs_to_another_user_is_refused(folder, store, environment, place):
    assert ran(tiny.call, environment, folder).error == ""
    path = PLACES[place](store)
    os.chown(path, USER, USER)
    for without in ({}, NO_COMPILER):
        outcome = ran(tiny.call, environment | without, folder)
        assert outcome.error == "CacheError", outcome
        assert f"{path} belongs to user {USER}" in outcome.message and "chown" in outcome.message


@needs_root
@pytest.mark.parametrize("depth", ["store", "parent"])
def test_a_link_of_another_user_is_refused(folder, store, environment, depth):
    """Its owner may point it elsewhere at any time; one's own and root's are followed."""
    assert ran(tiny.call, environment, folder).error == ""
    common = folder / "common"
    common.mkdir()
    common.chmod(0o1777)
    link = common / "link"
    link.symlink_to(store if depth == "store" else store.parent)
    environment["JIT_KERNEL_CACHE_DIR"] = str(link if depth == "store" else link / "store")
    assert ran(tiny.call, environment, folder).result["compiled"] == 0
    os.chown(link, USER, USER, follow_symlinks=False)
    outcome = ran(tiny.call, environment, folder)
    assert outcome.error == "CacheError" and f"{link} belongs to user {USER}" in outcome.message, outcome


@needs_root
def test_a_foreign_folder_that_appears_later_is_refused(folder, environment):
    """A process that saw nothing there must look again before it makes its store in it."""
    common = folder / "common"
    common.mkdir()
    common.chmod(0o1777)
    environment["JIT_KERNEL_CACHE_DIR"] = str(common / "mine" / "store")
    outcome = ran(partial(tiny.appears, str(common / "mine"), USER), environment, folder)
    assert outcome.error == "CacheError" and "belongs to user" in outcome.message, outcome
    assert not (common / "mine" / "store").exists()


@needs_root
def test_a_user_publishes_for_himself_and_root_does_not_load_it(folder, environment):
    home = folder / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    environment["JIT_KERNEL_CACHE_DIR"] = str(home / "store")
    assert ran(partial(tiny.as_user, USER, tiny.call), environment, folder).result["compiled"] == 1
    assert ran(partial(tiny.as_user, USER, tiny.call), environment | NO_COMPILER, folder).result["compiled"] == 0
    assert ran(tiny.call, environment, folder).error == "CacheError"


def test_a_sandbox_of_one_user(folder, store, environment):
    """Where the system's own folders belong to nobody, because only this user has a number, the store still works."""
    outcome = ran(partial(tiny.in_sandbox, tiny.call), environment, folder)
    if isinstance(outcome.result, str):
        pytest.skip(outcome.result)
    assert outcome.error == "" and outcome.result["right"], outcome


@needs_root
def test_a_group_that_is_anothers_first_one_is_no_own_group(tmp_path, monkeypatch):
    """The system names such a member in its list of users alone."""
    status = tmp_path.stat()
    assert ownership._is_own_group(status)
    users = [*pwd.getpwall(), pwd.struct_passwd(("other", "x", USER, 0, "", "/", "/bin/sh"))]
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    assert not ownership._is_own_group(status)


@needs_root
@pytest.mark.parametrize("place", [".locks", ".tmp", "tiny", "target"])
def test_what_root_made_in_a_users_store_is_not_written(folder, environment, place):
    """After one call as root, say: the user's next kernel is compiled for that process alone, with one WARNING."""
    home = folder / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    store = home / "store"
    environment["JIT_KERNEL_CACHE_DIR"] = str(store)
    assert ran(partial(tiny.as_user, USER, tiny.call), environment, folder).error == ""
    path = tiny.entries(store)[0].parent if place == "target" else store / place
    path.mkdir(exist_ok=True)
    os.chown(path, 0, 0)
    outcome = ran(partial(tiny.as_user, USER, partial(tiny.call, 3)), environment, folder)
    assert outcome.error == "" and outcome.result["right"] and len(outcome.warnings) == 1, outcome
