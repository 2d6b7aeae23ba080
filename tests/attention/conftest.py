"""What several tests of the attention layer start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jit_kernel.engine import progress
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.musa_device import Machine, machine, on_path, write_distribution, write_package


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    progress._warned.clear()
    yield
    progress._warned.clear()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU) as found:
        yield found


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Any]:
    entered = []

    def put(text: str, version: str = "1.0.6") -> None:
        folder = tmp_path / f"sage{len(entered)}"
        folder.mkdir()
        write_package(folder, "sageattention", __init__=text)
        write_distribution(folder, "sageattention", version)
        entered.append(on_path(folder))
        entered[-1].__enter__()

    yield put
    for context in reversed(entered):
        context.__exit__(None, None, None)
