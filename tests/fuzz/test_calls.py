"""Some seconds of the fuzzer: no crash, no hang, no wrong answer, no write before an error, no unnamed error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import house

SEEDS, CALLS = (1, 2), 250


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(seed: int, say: list[str]) -> None:
    """In a process without threads, which alone can be forked."""
    command = [sys.executable, "-m", "tests.fuzz.calls", "--seed", str(seed), "--calls", str(CALLS)]
    ended = subprocess.run(command, cwd=house.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    say.append(f"fuzz seed {seed}: {ended.stdout.splitlines()[-1]}")
