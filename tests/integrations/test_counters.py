"""Counters of served and passed on calls: what they hold, by host and reason, and that no count of a thread is lost."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from jit_kernel.integrations import counters


@pytest.fixture(autouse=True)
def _cleared():
    counters.clear()
    yield
    counters.clear()


def test_counts_are_kept_by_host_and_reason():
    for _ in range(3):
        counters.count("sdpa", "served")
    counters.count("sdpa", "passed on", "dropout")
    counters.count("diffusers", "passed on", "a mask")
    counters.count("diffusers", "passed on", "a mask")
    assert counters.read() == {
        "diffusers": {"served": 0, "passed_on": {"a mask": 2}},
        "sdpa": {"served": 3, "passed_on": {"dropout": 1}},
    }


def test_what_is_read_is_a_copy_and_clear_forgets():
    counters.count("sdpa", "passed on", "dropout")
    counters.read()["sdpa"]["passed_on"]["dropout"] = 9
    assert counters.read()["sdpa"]["passed_on"] == {"dropout": 1}
    counters.clear()
    assert counters.read() == {}


@pytest.mark.parametrize(
    ("outcome", "reason", "named"),
    [("refused", "", "outcome is 'refused'"), ("passed on", "", "reason is ''"), ("served", "x", "reason is 'x'")],
)
def test_a_count_without_a_meaning_is_refused_by_name(outcome, reason, named):
    with pytest.raises(ValueError, match=named):
        counters.count("sdpa", outcome, reason)
    assert counters.read() == {}


def test_threads_lose_no_count():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: [counters.count("sdpa", "served") for _ in range(5000)], range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert counters.read()["sdpa"]["served"] == 40000
