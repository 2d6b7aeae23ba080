"""The first call compiles, the next process loads: attention on this machine, start to finish.

A ragged batch with grouped heads and a causal mask (a prefill), then one decode step over a paged cache; what was
compiled or loaded and in how long; the largest error against float64; and the time beside torch's own attention.
"""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as torch_nn
from torch import Tensor

from jit_kernel import flash_attn_varlen_func, flash_attn_with_kvcache, jit
from jit_kernel.device import detect_device, device_target

LENGTHS = (7, 512, 130, 300)  # tokens of each sequence
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
PAGE_SIZE = 16


def main() -> int:
    """Run both processes; the exit status says whether the answers were right."""
    if "--second" in sys.argv:
        return second_process()
    device = detect_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    print(f"Device: {device} ({device_target(device)}), PyTorch {torch.__version__}, {str(dtype)[6:]}")
    tokens = ", ".join(map(str, LENGTHS))
    print(f"Sequences of {tokens} tokens; {HEADS} query heads share {KV_HEADS} key/value heads of {HEAD_DIM}")
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    right = True
    for name, make in (("Prefill: ragged, causal", prefill), ("Decode: one token each, pages of 16", decode)):
        ours, theirs, exact = make(device, dtype)
        print(f"\n{name}")
        known = len(jit.events())
        seconds, out = timed(ours)
        print(f"  first call          {seconds * 1e3:10.2f} ms   {described(known)}")
        error = float((out.double().cpu() - exact).abs().max())
        right &= error <= allowed
        print(f"  largest error       {error:10.1e}      against float64; allowed {allowed:.0e}")
        print(f"  each call after     {usual(ours) * 1e3:10.3f} ms")
        print(f"  torch's attention   {usual(theirs) * 1e3:10.3f} ms   one sequence after the other, keys contiguous")
    print("\nA second process, same call:", flush=True)
    right &= subprocess.run([sys.executable, __file__, "--second"], check=False).returncode == 0
    print("\nRight." if right else "\nWRONG: an error above what is allowed, or the second process failed.")
    return 0 if right else 1


def second_process() -> int:
    """The prefill alone, in a process that finds everything compiled."""
    device = detect_device()
    ours, _, _ = prefill(device, torch.float32 if device == "cpu" else torch.bfloat16)
    seconds, _ = timed(ours)
    print(f"  first call          {seconds * 1e3:10.2f} ms   {described(0)}; the rest is imports and the call itself")
    return 0 if all(event.action != "compiled" for event in jit.events()) else 1


def described(known: int) -> str:
    """What the loader did since it had done `known` things."""
    done = [f"{event.action} {event.spec.kernel} in {event.seconds * 1e3:,.1f} ms" for event in jit.events()[known:]]
    return "; ".join(done) or "nothing to compile or load: the kernel of the first call serves this one, too"


def attend_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula: q (sq, hq, d), k and v (sk, hk, d), causal with the last query at the last key."""
    q, k, v = (x.double().cpu().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
    scores = q @ k.mT / math.sqrt(HEAD_DIM)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
    return (scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v).transpose(0, 1)


def attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention on one sequence; a single query sees every key."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return torch_nn.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


Attend = Callable[[], Tensor]


def prefill(device: str, dtype: torch.dtype) -> tuple[Attend, Attend, Tensor]:
    """Our call, torch's calls, and the answer in float64."""
    torch.manual_seed(0)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    q, k, v = (torch.randn(sum(LENGTHS), heads, HEAD_DIM).to(device, dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    rows = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]
    cu_seqlens = starts.to(device)
    exact = torch.cat([attend_float64(q[r], k[r], v[r]) for r in rows])
    return (
        lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(LENGTHS), max(LENGTHS), causal=True),
        lambda: [attend_torch(q[r], k[r], v[r]) for r in rows][-1],
        exact,
    )


def decode(device: str, dtype: torch.dtype) -> tuple[Attend, Attend, Tensor]:
    """The same for one new token of each sequence, whose keys lie in shuffled pages."""
    torch.manual_seed(1)
    pages_each = [-(-n // PAGE_SIZE) for n in LENGTHS]
    shuffled = torch.randperm(sum(pages_each), dtype=torch.int32)
    table = torch.zeros(len(LENGTHS), max(pages_each), dtype=torch.int32)
    for row, pages in zip(table, shuffled.split(pages_each), strict=True):
        row[: len(pages)] = pages
    q = torch.randn(len(LENGTHS), 1, HEADS, HEAD_DIM).to(device, dtype)
    k_cache, v_cache = (torch.randn(sum(pages_each), PAGE_SIZE, KV_HEADS, HEAD_DIM).to(device, dtype) for _ in range(2))
    contiguous = [
        tuple(cache[row[:pages].long().to(device)].flatten(0, 1)[:n] for cache in (k_cache, v_cache))
        for row, pages, n in zip(table, pages_each, LENGTHS, strict=True)
    ]
    page_table, seqlens = table.to(device), torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    exact = torch.stack([attend_float64(one, k, v) for one, (k, v) in zip(q, contiguous, strict=True)])
    return (
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, page_table=page_table, causal=True),
        lambda: [attend_torch(one, k, v) for one, (k, v) in zip(q, contiguous, strict=True)][-1],
        exact,
    )


def timed(call: Attend) -> tuple[float, Tensor]:
    """(seconds, answer), waiting for a GPU to finish."""
    began = time.perf_counter()
    out = call()
    if out.device.type != "cpu":
        getattr(torch, out.device.type).synchronize()
    return time.perf_counter() - began, out


def usual(call: Attend) -> float:
    """The median seconds of 30 calls after 5 for warming up."""
    return statistics.median([timed(call)[0] for _ in range(35)][5:])


if __name__ == "__main__":
    sys.exit(main())
