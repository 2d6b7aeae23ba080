"""A place to put the packages of a Moore Threads machine, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jit_kernel import moore_threads as musa
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.musa_device import RUNTIME, Machine, machine, on_path


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[Callable[[Path], None]], musa.Report]]:
    """Puts packages on sys.path and looks at them."""
    stack = []

    def look(write: Callable[[Path], None]) -> musa.Report:
        RUNTIME.__init__()  # type: ignore[misc]
        folder = tmp_path / f"site{len(stack)}"
        folder.mkdir()
        write(folder)
        stack.append(on_path(folder))
        stack[-1].__enter__()
        return musa.probe()

    yield look
    for entered in reversed(stack):
        entered.__exit__(None, None, None)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU) as found:
        yield found
