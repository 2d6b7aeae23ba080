"""Distributed context parallelism on gloo with 1, 2 and 4 processes, and the sharding that it rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import jit_kernel
from jit_kernel.attention import AttentionLayer, all_gather_attention, backend_name, plan_ring, ring_attention
from jit_kernel.attention.parallel import zigzag
from tests.support import ring_worker


@pytest.mark.parametrize(("world_size", "cases"), [(2, 300), (4, 80)])
def test_processes_give_what_one_call_gives(world_size: int, cases: int, tmp_path: Path, say: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # compiled here, once, and not by every process
        x = torch.zeros(1, 1, 1, 64, dtype=dtype)
        jit_kernel.flash_attn_func(q=x, k=x, v=x, softmax_scale=1.0)
    context = multiprocessing.spawn(
        ring_worker.run,
        (world_size, str(tmp_path / "store"), cases, str(tmp_path)),
        nprocs=world_size,
        join=False,
    )
    try:
        ended = False
        while not ended:  # join() returns as soon as one process has ended
            ended = context.join(timeout=300)
    except Exception as error:
        output = "\n".join(path.read_text() for path in tmp_path.glob("rank*.txt"))
        raise AssertionError(output or str(error)) from error
    worst = json.loads((tmp_path / "worst.json").read_text())
    say.append(f"context parallelism, {world_size} processes, {cases} cases: worst shares {worst}")
    assert 0.0 < worst["ring_attention"] <= 1.0


@pytest.fixture
def alone(tmp_path: Path):
    """A group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("function", [ring_attention, all_gather_attention])
def test_one_rank_alone(alone, function) -> None:
    for seed in range(20):
        lengths, layer, problem, (q, k, v) = ring_worker.case(seed)
        # A rank's share of [prev | next] is the whole sequence in order.
        out, lse = function(q, k, v, lengths, layer, return_softmax_lse=True)
        ring_worker.judged(out, lse, lengths, problem)


def test_what_cannot_be_split_is_refused(alone) -> None:
    q = torch.zeros(8, 2, 64)
    for layer in (AttentionLayer(window_size=(4, 0)), AttentionLayer(attention_chunk=4)):
        with pytest.raises(NotImplementedError, match="a rank's keys are not one run of the sequence"):
            ring_attention(q, q, q, [8], layer)
    with pytest.raises(ValueError, match=r"q has 8 tokens; rank 0 holds 9 of sequences of \[9\]"):
        ring_attention(q, q, q, [9])
    with pytest.raises(ValueError, match="plan was made for lengths"):
        ring_attention(q, q, q, [8], plan=plan_ring([4, 4], True, q.device))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[0], [1], [7], [64], [5, 0, 33], [128, 1]])
def test_shares_are_a_partition_of_equal_work(world_size: int, lengths: list[int]) -> None:
    whole = torch.arange(sum(lengths))
    parts = [zigzag.shard(whole, lengths, rank, world_size) for rank in range(world_size)]
    assert torch.equal(zigzag.unshard(parts, lengths), whole)
    shares = [zigzag.share_of(lengths, rank, world_size) for rank in range(world_size)]
    assert [share.total for share in shares] == [len(part) for part in parts]
    work = [sum(sum(range(a + 1, b + 1)) for half in (s.prev, s.next) for a, b in half) for s in shares]
    longest = max(lengths)
    # Chunks differ by one token at most, so a rank's causal work differs by less than two rows a sequence.
    assert max(work) - min(work) <= 2 * len(lengths) * max(longest, 1)


def test_backends_by_name() -> None:
    assert [backend_name(kind) for kind in ("cpu", "cuda:1", "musa:0")] == ["gloo", "nccl", "mccl"]
    assert backend_name(torch.device("cuda", 0)) == "nccl"
    with pytest.raises(ValueError, match="it must be one of cpu, cuda, musa"):
        backend_name("xpu")
