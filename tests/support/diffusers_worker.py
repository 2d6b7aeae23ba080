"""One rank of diffusers' context parallelism: attention through the dispatcher beside the same on one rank alone."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from jit_kernel.integrations import diffusers as host


def run(rank: int, world_size: int, store: str, folder: str) -> None:
    """The body of one process; an error is written to its own file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    host.register()
    try:
        for kind in ("ring", "ulysses", "ulysses with a mask"):
            check(kind, rank, world_size)
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def check(kind: str, rank: int, world_size: int) -> None:
    """A rank's rows of the result and its gradients are those of the whole."""
    torch.manual_seed(0)
    whole = [torch.randn(2, 12 * world_size, 4, 32, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(whole[0])
    mask = None
    if kind == "ulysses with a mask":
        mask = torch.ones(2, 1, 1, 12 * world_size, dtype=torch.bool)
        mask[0, 0, 0, 5:14] = False
    rows = slice(12 * rank, 12 * (rank + 1))
    out = dispatch_attention_fn(*whole, attn_mask=mask, backend=host.NAME)
    wanted = (out, *torch.autograd.grad(out, whole, grad))
    part = [each.detach()[:, rows].requires_grad_() for each in whole]
    config = parallel_config(kind, rank, world_size)
    of_rank = None if mask is None else mask[..., rows].contiguous()
    ours = dispatch_attention_fn(*part, attn_mask=of_rank, backend=host.NAME, parallel_config=config)
    found = (ours, *torch.autograd.grad(ours, part, grad[:, rows]))
    for name, each, right in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        need_near(f"{kind}, rank {rank}, {name}", each, right[:, rows])


def parallel_config(kind: str, rank: int, world_size: int) -> Any:
    degree = {"ring_degree" if kind == "ring" else "ulysses_degree": world_size}
    config = ContextParallelConfig(**degree)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config.setup(rank, world_size, torch.device("cpu"), mesh)
    return SimpleNamespace(context_parallel_config=config)


def need_near(name: str, ours: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
