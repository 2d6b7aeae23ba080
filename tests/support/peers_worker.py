"""One of several processes of one GPU: random cases by peers' copies, or a rank that never comes.

usage: python -m tests.support.peers_worker RANK WORLD_SIZE STORE
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from jit_kernel.attention import AttentionLayer, context_attention, plan_context
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel.choice import FORMS
from tests.support import ring_worker

DEVICE = torch.device("cuda", 0)


def begin(rank: int, world_size: int, store: str, seconds: float) -> None:
    """A group by gloo, as NCCL takes one process of a GPU alone; tensors go by peers' copies."""
    torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds)
    )
    way = communication.transport_of(None, DEVICE)
    if way.name != "peers":
        raise AssertionError(f"the way is {way.name}, because {way.reason}")


def run(rank: int, world_size: int, store: str, cases: int, folder: str) -> None:
    """The body of one process."""
    try:
        begin(rank, world_size, store, 300)
        worst = dict.fromkeys(FORMS, 0.0)
        for seed in range(cases):
            form, share = ring_worker.attend(seed, DEVICE)
            worst[form] = max(worst[form], share)
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 0:
            Path(folder, "worst.json").write_text(json.dumps(worst))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def wait_for_nobody(rank: int, world_size: int, store: str) -> None:
    """A call on all ranks, then one without rank 1."""
    logging.basicConfig(level=logging.INFO)
    begin(rank, world_size, store, 4)
    layer = AttentionLayer()
    plan = plan_context([96], layer, (2, 2), 64, DEVICE, form="ring")
    x = plan.shard(torch.ones(96, 2, 64, dtype=torch.bfloat16, device=DEVICE))
    context_attention(x, x, x, plan, layer)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        time.sleep(8)
        os._exit(0)
    context_attention(x, x, x, plan, layer)
    torch.cuda.synchronize()  # until the process ends


if __name__ == "__main__":
    wait_for_nobody(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
