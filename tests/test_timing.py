"""Limits on time, for a quiet machine: `make test-timing`. Left out of every other run, because a busy one fails them.

`make bench` measures the same and more, and records it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jit_kernel import config, flash_attn_func
from tests.support import children, loader_work
from tests.support.compilers import compilations, counting_compiler, processes_inside
from tests.support.hopper_variants import NAMED, compile_variant
from tests.support.meetings import CALLERS, cold_call, processes_that_meet, threads_that_meet

pytestmark = pytest.mark.timing

CALLS, ROUNDS = 2_000, 10
MOST_US = 10.0
# Where MOST_US was set torch's SDPA takes 4.2 us and ours 5.1. On a slower machine the limit is this many times torch's
# time in the same round.
MOST_TIMES_SDPA = 2.0


def round_of_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> tuple[float, float]:
    """Medians in microseconds of our call and of torch's SDPA, taken in turns."""
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    ours, theirs = [], []
    for _ in range(CALLS):
        begin = time.perf_counter_ns()
        flash_attn_func(q, k, v, out=out)
        middle = time.perf_counter_ns()
        torch.nn.functional.scaled_dot_product_attention(*heads_first)
        ours.append(middle - begin)
        theirs.append(time.perf_counter_ns() - middle)
    return statistics.median(ours) / 1e3, statistics.median(theirs) / 1e3


def test_the_smallest_call(say: list[str]) -> None:
    """b = 1, s = 1, one head, d = 64, fp32, out given: within the limit in one of ten rounds after the first."""
    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    out = torch.empty_like(q)
    with torch.no_grad():
        round_of_calls(q, k, v, out)
        for _ in range(ROUNDS):
            mine, sdpa = round_of_calls(q, k, v, out)
            if mine <= MOST_US:
                break
    say.append(f"smallest call {mine:.1f} us, torch SDPA {sdpa:.1f} us")
    assert mine <= max(MOST_US, MOST_TIMES_SDPA * sdpa)


PUBLIC = """
import torch, tvm_ffi, time
started = time.perf_counter()
from jit_kernel import flash_attn_varlen_func
print(time.perf_counter() - started)
"""


def test_the_public_names_import_quickly(tmp_path: Path, say: list[str]) -> None:
    """With torch and tvm_ffi imported, a public name costs at most 20 ms."""
    environment = {"PYTHONPATH": str(config.package_dir().parent), "HOME": str(tmp_path), "PATH": ""}
    times = []
    for _ in range(5):
        answer = subprocess.run(
            [sys.executable, "-c", PUBLIC], env=environment, capture_output=True, text=True, check=True
        )
        times.append(float(answer.stdout))
    say.append(f"import of a public name: {min(times) * 1e3:.1f} ms")
    assert min(times) <= 0.020


def test_a_first_call(tmp_path: Path, say: list[str]) -> None:
    """Cold at most 12 s; in a second process the loader takes at most 10 ms."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    cold, *warm = (
        children.run(loader_work.attention_call, environment=environment, scratch=tmp_path).result for _ in range(4)
    )
    loads = [result["loader_seconds"] for result in warm]
    say.append(f"cold first call {cold['seconds']:.1f} s; loader in a second process {min(loads) * 1e3:.1f} ms")
    assert cold["seconds"] <= 12
    assert min(loads) <= 0.010


@pytest.mark.parametrize("meet", [processes_that_meet, threads_that_meet])
def test_callers_that_meet_wait_for_one_compilation(
    tmp_path: Path, meet: Callable[[Path], float], say: list[str]
) -> None:
    """All have their answer in at most 1.3 times one cold call, in one of three tries."""
    ratios = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        before, met = cold_call(folder), meet(folder)
        ratios.append(met / max(before, cold_call(folder)))
        if ratios[-1] <= 1.3:
            break
    say.append(f"{CALLERS} {meet.__name__}: {min(ratios):.2f} times one cold call")
    assert min(ratios) <= 1.3, ratios


@pytest.mark.parametrize("fields", NAMED, ids=str)
def test_a_hopper_variant_compiles_fast(fields: tuple[str, int, int, bool, bool], say: list[str]) -> None:
    """At most 3 s of processor time, in one of three tries."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        compile_variant(fields)
        seconds.append(time.process_time() - started)
        if seconds[-1] <= 3.0:
            break
    say.append(f"hopper {fields}: compiled in {min(seconds):.2f} s of processor time")
    assert min(seconds) <= 3.0


def test_a_dead_holders_lock_is_taken_over_at_once(tmp_path: Path) -> None:
    """Within 1 s of the holder's end a waiting process has begun to compile."""
    slow = 'case "$*" in *unit.cpp*) sleep 600;; esac'
    compiler, starts = counting_compiler(tmp_path / "bin", before=slow, version="one")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    holder = children.Child(loader_work.small_call, environment=environment, scratch=tmp_path)
    while compilations(starts) == 0:
        time.sleep(0.02)
    counting_compiler(tmp_path / "bin", version="one")
    waiter = children.Child(loader_work.small_call, environment=environment, scratch=tmp_path)
    while "waiting for" not in waiter.stderr():
        time.sleep(0.02)
    holder.kill()
    killed = time.monotonic()
    while compilations(starts) == 1:
        time.sleep(0.01)
    taken = time.monotonic() - killed
    assert waiter.outcome().result["right"]
    assert taken < 1


def test_a_killed_callers_compiler_ends_at_once(tmp_path: Path) -> None:
    """Within 2 s of its caller's end it is gone."""
    compiler, starts = counting_compiler(tmp_path / "bin", before='case "$*" in *unit.cpp*) sleep 600;; esac')
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    caller = children.Child(loader_work.small_call, environment=environment, scratch=tmp_path)
    while compilations(starts) == 0:
        time.sleep(0.02)
    caller.kill()
    killed = time.monotonic()
    while processes_inside(tmp_path / "store"):
        time.sleep(0.02)
    assert time.monotonic() - killed < 2
