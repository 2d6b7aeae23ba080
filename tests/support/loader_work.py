"""What the children of the loader's tests do: calls that need one small real kernel, or the attention kernel."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

from jit_kernel import config, jit
from jit_kernel.device import cpu_target
from jit_kernel.engine import build as builds
from jit_kernel.fa3 import cpu
from tests.support import tiny

# The combine library: a real kernel that compiles in a few seconds.
SMALL = cpu.kernels.combine_spec()


def small_call() -> dict[str, Any]:
    """Merge two attention states with the small kernel and compare with the formula."""
    import torch

    started = time.perf_counter()
    module = jit.load(SMALL, cpu_target())
    loaded = time.perf_counter() - started
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = torch.randn(2, 5, 3, 16, generator=generator).unbind(0)
    lse_a, lse_b = torch.randn(2, 5, 3, generator=generator).unbind(0)
    out, lse = torch.full((5, 3, 16), float("nan")), torch.full((5, 3), float("nan"))
    module["merge_state"](out_a, lse_a, out_b, lse_b, out, lse)
    total = torch.logaddexp(lse_a.double(), lse_b.double())
    weight_a, weight_b = ((part - total).exp()[..., None] for part in (lse_a, lse_b))
    expected = weight_a * out_a + weight_b * out_b
    right = torch.allclose(out.double(), expected, atol=1e-5) and torch.allclose(lse.double(), total, atol=1e-5)
    return summary(loaded, right)


def tiny_call() -> dict[str, Any]:
    """Multiply two numbers with the smallest kernel, which compiles in 0.05 s."""
    started = time.perf_counter()
    right = int(jit.load(tiny.spec(), cpu_target())["times"](21)) == 42
    return summary(time.perf_counter() - started, right)


def attention_call() -> dict[str, Any]:
    """One attention call through the public function, compared with float64."""
    import torch

    from jit_kernel import flash_attn_func

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 7, 2, 64, generator=generator) for _ in range(3))
    started = time.perf_counter()
    out = flash_attn_func(q, k, v)
    seconds = time.perf_counter() - started
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    return summary(seconds, torch.allclose(out.double(), expected, atol=1e-5))


def summary(seconds: float, right: bool) -> dict[str, Any]:
    """What a call did, as plain data."""
    events = jit.events()
    return {
        "seconds": seconds,
        "right": right,
        "compiled": [str(event.spec) for event in events if event.action == "compiled"],
        "loaded": [str(event.spec) for event in events if event.action == "loaded"],
        "loader_seconds": sum(event.seconds for event in events),
        "reasons": [event.reason for event in events],
        "peak_bytes": max((event.peak_bytes for event in events), default=0),
    }


def small_call_at(barrier: Any) -> tuple[dict[str, Any], float, float]:
    """Meet the others, then make the small call; answers with the monotonic times of start and end too."""
    barrier.wait(600)
    started = time.monotonic()
    result = small_call()
    return result, started, time.monotonic()


def small_calls_in_threads(count: int) -> dict[str, Any]:
    """Make the small call from `count` threads at once; the summary is the process's."""
    barrier = threading.Barrier(count)
    right: list[bool] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            barrier.wait(600)
            right.append(small_call()["right"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return summary(time.perf_counter() - started, len(right) == count and all(right))


def with_sources(folder: str, work: Any) -> Any:
    """Run `work` with another copy of the kernel sources."""
    config.kernel_sources_dir = lambda: Path(folder)
    return work()


def is_stored(folder: str, flags: tuple[str, ...] = ()) -> bool:
    """Whether the small kernel of a copy of the sources is stored, with these flags."""
    config.kernel_sources_dir = lambda: Path(folder)
    spec = dataclasses.replace(SMALL, flags=(*SMALL.flags, *flags))
    return jit.is_stored(spec, cpu_target())


def key_of_small(folder: str) -> str:
    """The small kernel's key for a copy of the sources."""
    config.kernel_sources_dir = lambda: Path(folder)
    return builds.key_of(SMALL, cpu_target())[0]


def without_privileges(work: Any) -> Any:
    """Run `work` after giving up every capability, so that file modes bind root as well."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
            raise OSError(ctypes.get_errno(), "capset")
    return work()


def on_small_disk(folder: str, kilobytes: int, work: Any, then: str) -> Any:
    """Run `work` with `folder` on a file system of `kilobytes`, then grow it and run it again."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespaces = 0x00020000 | (0 if os.geteuid() == 0 else 0x10000000)
    if libc.unshare(new_namespaces) != 0:
        return "unshare is not permitted"
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: nothing leaks out
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={kilobytes}k,mode=700".encode()) != 0:
        return "mount is not permitted"
    try:
        work()
        first = ("", "")
    except Exception as error:
        first = (type(error).__name__, str(error))
    left = sorted(str(path) for path in Path(folder).glob(".tmp/*"))
    libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0x20, then.encode())  # MS_REMOUNT
    return first, left, work()
