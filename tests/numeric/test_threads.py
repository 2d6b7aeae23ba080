"""The threads that CPU kernels run on: torch's own, and in a forked process the library's."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from jit_kernel import flash_attn_func
from tests.support.children import Child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")

THREADS = 4


def attend() -> bytes:
    """The bits of an attention that is work for several threads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 512, 4, 64, generator=generator) for _ in "qkv")
    return bytes(flash_attn_func(q, k, v, causal=True).numpy().tobytes())


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def threads_before_and_after() -> tuple[int, int]:
    """Threads after an operator of torch, and after attention."""
    torch.set_num_threads(THREADS)
    torch.ones(1 << 22).exp_()
    before = threads()
    attend()
    return before, threads()


def attend_in_a_fork() -> tuple[bool, int]:
    """Whether a forked process gets the same bits as this one, and how many threads it has then."""
    torch.set_num_threads(THREADS)
    expected = attend()
    process = os.fork()
    if process == 0:
        signal.alarm(300)  # nothing that hangs stays behind
        os._exit(threads() if attend() == expected else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code > 0, code


def test_no_thread_is_started_beside_torchs(tmp_path: Path) -> None:
    before, after = Child(threads_before_and_after, environment={}, scratch=tmp_path).outcome().result
    assert before >= THREADS
    assert after == before


def test_a_forked_process_starts_its_own(tmp_path: Path) -> None:
    """OpenMP would wait there for threads that the fork does not have."""
    same, count = Child(attend_in_a_fork, environment={}, scratch=tmp_path).outcome().result
    assert same
    assert count == THREADS
