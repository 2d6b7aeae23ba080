"""The exchange by copy engines: several processes of one GPU map each other's memory, as those of several GPUs do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import peers_worker
from tests.support.ring_worker import CASES, spawned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between processes' memory need a CUDA GPU"),
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_give_what_one_call_gives(world_size: int, tmp_path: Path, say: list[str]) -> None:
    cases = CASES or 40
    spawned(peers_worker.run, world_size, cases, folder=tmp_path)
    worst = json.loads((tmp_path / "worst.json").read_text())
    say.append(f"peers' copies, {world_size} processes of one GPU, {cases} cases: worst shares {worst}")
    assert all(0.0 < share <= 1.0 for share in worst.values())


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.peers_worker", str(rank), "3", str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert workers[1].returncode == 0, told[1]
    for rank in (0, 2):
        assert f"rank {rank} got nothing from rank 1 in context parallelism" in told[rank], told[rank]
        assert workers[rank].returncode != 0
