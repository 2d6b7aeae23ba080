"""Some seconds of the fuzzer: no crash, no hang, no wrong answer, no write before an error, no unnamed error."""

from __future__ import annotations

import subprocess
import sys

from tests.support import house

SEED, CALLS = 1, 400


def test_random_calls(say: list[str]) -> None:
    """In a process without threads, which alone can be forked."""
    command = [sys.executable, "-m", "tests.fuzz.calls", "--seed", str(SEED), "--calls", str(CALLS)]
    ended = subprocess.run(command, cwd=house.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    say.append(f"fuzz seed {SEED}: {ended.stdout.splitlines()[-1]}")
