"""Gradients through context parallelism, in every form, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jit_kernel.attention import Prefix, all_gather_attention, all_to_all_attention, ring_attention
from tests.support import ring_worker
from tests.support.ring_worker import CASES, spawned


@pytest.mark.parametrize(("world_size", "cases"), [(2, 24), (3, 16)])
def test_processes_give_the_gradients_of_the_formula(
    world_size: int, cases: int, tmp_path: Path, say: list[str]
) -> None:
    cases = CASES or cases
    spawned(ring_worker.run_gradients, world_size, cases, folder=tmp_path)
    worst = json.loads((tmp_path / "worst.json").read_text())
    say.append(f"gradients of context parallelism, {world_size} processes, {cases} cases: worst shares {worst}")
    assert all(0.0 < share <= 1.0 for share in worst.values())


@pytest.mark.parametrize("function", [ring_attention, all_gather_attention, all_to_all_attention])
def test_a_prefix_has_no_gradient(function, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        q, cache = torch.zeros(8, 2, 64, requires_grad=True), torch.zeros(1, 4, 2, 64)
        before = Prefix(cache, cache, torch.tensor([4], dtype=torch.int32))
        with pytest.raises(NotImplementedError, match="prefix is given, and q, k, v or sinks requires grad"):
            function(q, q, q, [8], prefix=before)
    finally:
        dist.destroy_process_group()
