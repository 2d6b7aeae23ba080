"""A short run of the store's fault campaign; `make fuzz` runs it for as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys

from jit_kernel import config

ROUNDS = 8


def test_a_short_campaign(say):
    command = [sys.executable, "-m", "tests.fuzz.store_campaign", "--rounds", str(ROUNDS), "--seconds", "600"]
    done = subprocess.run(
        [*command, "--seed", "18", "--processes", "4"],
        cwd=config.package_dir().parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["rounds"] == ROUNDS and counts["wrong"] == 0
    assert counts["faults"] > 2 * ROUNDS and counts["answered"] > 2 * ROUNDS
    say.append(f"store campaign: {counts['faults']} faults, {counts['calls']} calls, {counts['answered']} answered")
