"""The smallest kernels: each multiplies an integer by its own factor, compiles in 0.05 s, and tells a swapped one."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jit_kernel import jit
from jit_kernel.device import cpu_target

# tvm-ffi's calling convention by hand: a value is its type's number (1: an integer) and the value, 8 bytes each.
_UNIT = """
extern "C" __attribute__((visibility("default")))
int __tvm_ffi_times(void*, const void* values, int, void* result) {
  static_cast<long*>(result)[0] = 1;
  static_cast<long*>(result)[1] = %d * static_cast<const long*>(values)[1];
  return 0;
}
"""
NEW_MOUNTS, NEW_PROCESSES, NEW_USERS = 0x00020000, 0x20000000, 0x10000000
_PRIVATE, _NOEXEC = 0x44000, 8
_LIBC = ctypes.CDLL(None, use_errno=True)


def spec(factor: int = 2) -> jit.KernelSpec:
    """The kernel that multiplies by `factor`."""
    return jit.KernelSpec("tiny", _UNIT % factor, "host", (("factor", factor),))


def call(factor: int = 2) -> dict[str, Any]:
    """Call a kernel; answers with its result, whether it is right, and how many were compiled in this process."""
    found = int(jit.load(spec(factor), cpu_target())["times"](21))
    return {"found": found, "right": found == 21 * factor, "compiled": compiled()}


def compiled() -> int:
    """How many kernels this process compiled."""
    return sum(event.action == "compiled" for event in jit.events())


def entries(store: Path) -> list[Path]:
    """The folders of the entries of a store, without a look at what is in them."""
    return sorted(path for path in store.glob("[!.]*/*:*/*-*"))


def twice() -> list[Any]:
    """Two calls in one process, with what was raised in the place of an answer."""
    answers: list[Any] = []
    for _ in range(2):
        try:
            answers.append(call()["right"])
        except Exception as error:
            answers.append((type(error).__name__, str(error)))
    return answers


def as_user(user: int, work: Callable[[], Any]) -> Any:
    """Run `work` as another user, without root's rights, for the rest of this process."""
    for name in ("tvm_ffi.libinfo", "resource", "platformdirs", "filelock"):
        importlib.import_module(name)  # while it can be read: the interpreter may lie in root's home

    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return work()


def with_umask(mask: int, work: Callable[[], Any]) -> Any:
    """Run `work` under a umask."""
    os.umask(mask)
    return work()


def mounted(folder: str, options: str, noexec: bool, work: Callable[[], Any]) -> Any:
    """Run `work` with a new file system on `folder`; answers with a str where that is not permitted."""
    if not _unshared(NEW_MOUNTS):
        return "unshare is not permitted"
    if _LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", _NOEXEC if noexec else 0, options.encode()) != 0:
        return "mount is not permitted"
    return work()


def _unshared(what: int) -> bool:
    user = 0 if os.geteuid() == 0 else NEW_USERS
    return _LIBC.unshare(what | user) == 0 and _LIBC.mount(None, b"/", None, _PRIVATE, None) == 0


def in_container(work: Callable[[], Any], before: int = 0) -> Any:
    """Run `work` in a process namespace of its own under the same host name, where `before` processes ran before it."""
    if _LIBC.unshare(NEW_PROCESSES) != 0:
        return "unshare is not permitted"

    def first() -> Any:
        for _ in range(before):
            forked(lambda: None)
        return forked(work)

    return forked(first)


def forked(work: Callable[[], Any]) -> Any:
    """Run `work` in a child by os.fork; answers with its result (plain data), or with what it raised as a text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = json.dumps(work())
        except BaseException as error:
            text = json.dumps(f"{type(error).__name__}: {error}")
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    return json.loads(text)


def with_children_ignored(work: Callable[[], Any]) -> Any:
    """Run `work` where the system keeps no ended child's status."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return work()


def beside_a_reaper(work: Callable[[], Any]) -> Any:
    """Run `work` beside a thread that takes the status of every child that ends."""
    done = threading.Event()

    def reap() -> None:
        while not done.is_set():
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                done.wait(0.0005)

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        return work()
    finally:
        done.set()
        thread.join()


def broken() -> None:
    """Ask for a kernel that does not compile."""
    jit.load(jit.KernelSpec("tiny", "this is no C++\n", "host"), cpu_target())


def both() -> int:
    """Call two kernels; answers with how many had to be compiled."""
    assert call(2)["right"] and call(3)["right"]
    return compiled()


def appears(folder: str, user: int) -> None:
    """Look at a store that is not there, make a folder on the way that belongs to `user`, then call."""
    from jit_kernel import config
    from jit_kernel.engine.store import Store

    Store(config.cache_dir()).check()
    os.mkdir(folder)
    os.chown(folder, user, user)
    call()


def in_sandbox(work: Callable[[], Any]) -> Any:
    """Run `work` in a user namespace that knows this user alone, under another number."""
    user = 12345 if os.geteuid() == 0 else os.geteuid()
    mapping = f"{user} {os.geteuid()} 1"
    if _LIBC.unshare(NEW_USERS) != 0:
        return "unshare is not permitted"
    Path("/proc/self/uid_map").write_text(mapping)
    return work()


def rewrite(entry: Path, data: bytes) -> None:
    """Put other bytes in the place of an entry's artifact, and let its manifest say that they were compiled."""
    (entry / "kernel.so").write_bytes(data)
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["files"]["kernel.so"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (entry / "manifest.json").write_text(json.dumps(manifest))
