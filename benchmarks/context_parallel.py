"""Every form of context parallelism over the GPUs of one host against one GPU, with the exchange that stays exposed.

usage: python benchmarks/context_parallel.py [--world-size 2] [--tokens 32768] [--device cuda|cpu] ...
       torchrun --nproc-per-node 2 benchmarks/context_parallel.py ...

One sequence. In one run: one device alone over all tokens; each form; the calls of ring and all-to-all without any
exchange, which is their limit; the exchange of both alone. Every result is compared with the one device's first.
Appends JSON lines to benchmarks/results/context_parallel.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention import AttentionLayer, backend_name, context_attention, plan_context, plan_ring
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import ring, zigzag
from jit_kernel.attention.parallel.choice import FORMS, choose
from jit_kernel.attention.parallel.heads import HeadShare, Swap
from jit_kernel.attention.parallel.prefix import Parts


def timed(call: Callable[[], Any], device: torch.device, repeats: int, together: bool) -> float:
    """Median milliseconds of a call; `together`: each repeat starts at a barrier."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(repeats):
        if together:
            dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def slowest(milliseconds: float, device: torch.device) -> float:
    """The largest of all ranks' times."""
    value = torch.tensor([milliseconds], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def calls_without_exchange(q: Tensor, k: Tensor, v: Tensor, plan: ring.RingPlan, layer: AttentionLayer) -> None:
    """The ring's own calls and their merge, each on this rank's keys."""
    parts = Parts(q, v.shape[2], len(plan.blocks))
    for block in plan.blocks:
        ring._attend(q, [k, v], block, layer, parts, None)
    parts.merged()


def limits(
    options: argparse.Namespace, mine: list[Tensor], plan: ring.RingPlan, layer: AttentionLayer, size: int,
    device: torch.device,
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """What bounds the ring and all-to-all: their calls without an exchange, and their exchanges alone."""
    heads, kv_heads = options.heads // size, max(1, options.kv_heads // size)
    q, k, v = (torch.randn(options.tokens, h, options.head_dim, device=device).to(mine[0].dtype)
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    cu = torch.tensor([0, options.tokens], dtype=torch.int32, device=device)
    rows = zigzag.rows_of([options.tokens], size, inner=size)

    swap = Swap(HeadShare(options.heads, options.kv_heads, size), tuple(rows), None)

    def heads_alone() -> None:
        joined, _, _ = swap.tokens_for_heads(*mine)
        swap.heads_for_tokens(options.heads, joined)

    def keys_alone() -> None:
        arrivals = ring._Arrivals(communication.transport_of(None, device), mine[1], mine[2], plan, None)
        for step in range(1, size):
            arrivals.take(step)
            arrivals.ask(step + ring._AHEAD)

    tokens = (q, k, v, cu, cu, options.tokens, options.tokens)
    return {
        "ring without exchange": lambda: calls_without_exchange(*mine, plan, layer),
        "ring, exchange alone": keys_alone,
        "all_to_all without exchange": lambda: flash_attention_v3.flash_attn_varlen_func(*tokens, causal=layer.causal),
        "all_to_all, exchange alone": heads_alone,
    }


def measure(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> list[dict[str, Any]]:
    """Every figure, on rank 0."""
    layer, lengths = AttentionLayer(causal=options.causal), [options.tokens]
    random = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, options.dtype)
    q, k, v = (
        torch.randn(options.tokens, heads, options.head_dim, generator=random, device=device).to(dtype)
        for heads in (options.heads, options.kv_heads, options.kv_heads)
    )
    cu = torch.tensor([0, options.tokens], dtype=torch.int32, device=device)

    def alone() -> Tensor:
        out: Tensor = flash_attention_v3.flash_attn_varlen_func(
            q, k, v, cu, cu, options.tokens, options.tokens, causal=options.causal
        )
        return out

    expected, forms, kept = alone(), {}, {}
    choice = choose(lengths, layer, (options.heads, options.kv_heads), options.head_dim, size, inner=options.inner)
    for form in (form for form in FORMS if form not in choice.reasons):
        heads = (options.heads, options.kv_heads)
        plan = plan_context(lengths, layer, heads, options.head_dim, device, form=form, inner=options.inner)
        mine = kept[form] = [plan.shard(x) for x in (q, k, v)]
        forms[form] = functools.partial(context_attention, *mine, plan, layer)
        difference = float((forms[form]().float() - plan.shard(expected).float()).abs().max())
        if difference > 0.02:
            raise RuntimeError(f"{form} on rank {rank} differs from one device by {difference}")
    one = timed(alone, device, options.repeats, together=False) if rank == 0 else 0.0
    dist.barrier()
    ring_plan = plan_ring(lengths, options.causal, device)
    figures = {**forms, **limits(options, kept["ring"], ring_plan, layer, size, device)}
    times = {name: slowest(timed(f, device, options.repeats, together=True), device) for name, f in figures.items()}
    if rank != 0:
        return []
    flops = 4.0 * options.tokens**2 * options.heads * options.head_dim / (2 if options.causal else 1)
    common = {name: getattr(options, name) for name in ("tokens", "heads", "kv_heads", "head_dim", "dtype", "causal")}
    common["exchange"] = communication.transport_of(None, device).name
    lines = [{"case": "one device", "devices": 1, "ms": one, "tflops": flops / one / 1e9, **common}]
    for name, ms in times.items():
        line = {"case": name, "devices": size, "ms": ms, **common, "chosen": name == choice.form}
        if name in forms:
            line |= {"tflops": flops / ms / 1e9, "times_one_device": one / ms}
        if f"{name} without exchange" in times:
            line["exposed_exchange_ms"] = ms - times[f"{name} without exchange"]
            line["exposed_share"] = line["exposed_exchange_ms"] / times[f"{name}, exchange alone"]
        lines.append(line)
    return lines


def run(local_rank: int, options: argparse.Namespace, size: int) -> None:
    """One process."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    os.environ |= {"RANK": str(local_rank), "WORLD_SIZE": str(size)}
    dist.init_process_group(backend_name(device))
    lines = measure(options, local_rank, size, device)
    if local_rank == 0:
        for line in lines:
            print({name: round(x, 4) if isinstance(x, float) else x for name, x in line.items()}, flush=True)
        if not options.dry_run:
            print("wrote", record.write("context_parallel", lines, str(device)))
    dist.destroy_process_group()


def main() -> None:
    """Start the processes, or be one of torchrun's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--inner", type=int, help="neighbouring ranks that share heads in the two-level form")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        run(int(os.environ["LOCAL_RANK"]), options, int(os.environ["WORLD_SIZE"]))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    multiprocessing.spawn(run, (options, options.world_size), nprocs=options.world_size)


if __name__ == "__main__":
    main()
