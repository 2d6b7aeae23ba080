"""Marks for devices and for timing, and a place for what a test run has to say at its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Threads that wait give way: on a busy machine a spinning one holds the core that another needs. OpenMP reads this when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from tests.support.quick import QUICK

TESTS = Path(__file__).resolve().parent
_LINES = pytest.StashKey[list[str]]()


def _missing(mark: str) -> str | None:
    """Why tests with this mark cannot run here, None when they can."""
    if mark == "gpu" and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if mark == "musa" and not (hasattr(torch, "musa") and torch.musa.is_available()):
        return "torch sees no Moore Threads GPU"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []
    config.addinivalue_line(
        "markers", "timing: judges by a clock, for a quiet machine; left out unless asked for by -m"
    )
    config.addinivalue_line("markers", "hosts: one of the tests of make test-hosts; left out unless asked for by -m")
    config.addinivalue_line("markers", "emulated: CUDA kernels on a CPU, 2 s each; left out unless asked for by -m")
    config.addinivalue_line("markers", "quick: one of the tests of make test-quick, which support/quick.py names")
    # Neither a slow example nor a slow generator is a failure: no test judges by a clock.
    hypothesis.settings.register_profile(
        "no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("no clock")


@pytest.hookimpl(tryfirst=True)  # marks have to be there when -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", item.name)
        if item.path.is_relative_to(TESTS) and name in QUICK.get(item.path.relative_to(TESTS).as_posix(), ()):
            item.add_marker(pytest.mark.quick)
    for mark in ("timing", "hosts", "emulated"):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(mark)]
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
    for mark in ("gpu", "musa"):
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = _missing(mark) if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its lines on."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["lines"] = session.config.stash[_LINES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The process that workers report to takes their lines; one that was killed has none."""
    node.config.stash[_LINES].extend(getattr(node, "workeroutput", {}).get("lines", []))


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> list[str]:
    """Lines appended here are printed after the last test: worst shares, counts, durations."""
    return pytestconfig.stash[_LINES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_LINES]:
        terminalreporter.section("measured")
        for line in config.stash[_LINES]:
            terminalreporter.write_line(line)
