"""One rank of the distributed tests: random cases of ring and all-gather attention, held against the numeric rule.

Every rank draws the same cases from the same seeds. The worst share of each function is written to a file by rank 0, or
the error of a rank to its own.
"""

from __future__ import annotations

import itertools
import json
import traceback
from datetime import timedelta
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist

from jit_kernel.attention import (
    AttentionLayer,
    all_gather_attention,
    backend_name,
    plan_ring,
    ring_attention,
    shard,
    unshard,
)
from jit_kernel.attention.parallel import exchange as communication
from tests.support import reference


def case(seed: int) -> tuple[list[int], AttentionLayer, reference.Problem, tuple[torch.Tensor, ...]]:
    """Lengths of packed sequences, the layer, the exact problem, and q, k, v of the whole."""
    dice, random = Random(seed), torch.Generator().manual_seed(seed)
    lengths = [dice.choice([0, 1, dice.randint(2, 70)]) for _ in range(dice.choice([1, 1, 2, 3]))]
    lengths[0] = lengths[0] or 33
    dtype, hk = dice.choice([torch.float32, torch.bfloat16, torch.float16]), dice.choice([1, 2])
    hq, total = hk * dice.choice([1, 2, 4]), sum(lengths)
    q, k, v = (torch.randn(total, heads, 64, generator=random).to(dtype) for heads in (hq, hk, hk))
    causal, softcap = dice.random() < 0.7, dice.choice([0.0, 0.0, 4.0])
    sinks = torch.randn(hq, generator=random) if dice.random() < 0.3 else None
    sequences, at = [], 0
    for n in lengths:
        sequences.append(reference.Sequence(q[at : at + n], k[at : at + n], v[at : at + n]))
        at += n
    problem = reference.Problem(sequences, causal=causal, softcap=softcap, sinks=sinks)
    return lengths, AttentionLayer(causal=causal, softcap=softcap, sinks=sinks), problem, (q, k, v)


def judged(out: torch.Tensor, lse: torch.Tensor, lengths: list[int], problem: reference.Problem) -> float:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    shares = reference.check([out[r] for r in rows], [lse[:, r] for r in rows], problem)
    if not shares.worst <= 1.0:
        raise AssertionError(f"lengths {lengths}: {shares}")
    return shares.worst


def run(rank: int, world_size: int, store: str, cases: int, folder: str) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend_name("cpu"),
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),
        )
        worst = {"ring_attention": 0.0, "all_gather_attention": 0.0}
        for seed in range(cases):
            lengths, layer, problem, whole = case(seed)
            parts = [shard(x, lengths, rank, world_size) for x in whole]
            rows = [shard(torch.zeros(sum(lengths)), lengths, r, world_size).shape[0] for r in range(world_size)]
            plan = plan_ring(lengths, layer.causal, parts[0].device) if seed % 2 else None
            for name, options in (("ring_attention", {"plan": plan}), ("all_gather_attention", {})):
                function = {"ring_attention": ring_attention, "all_gather_attention": all_gather_attention}[name]
                out, lse = function(*parts, lengths, layer, return_softmax_lse=True, **options)
                out, lse = (communication.gather(x, rows, None) for x in (out, lse.t().contiguous()))
                if rank == 0:
                    found = judged(unshard(out, lengths), unshard(lse, lengths).t(), lengths, problem)
                    worst[name] = max(worst[name], found)
        dist.barrier()
        if rank == 0:
            Path(folder, "worst.json").write_text(json.dumps(worst))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise
