"""The cases of benchmarks/ops.py: each op, the same of torch's own operators, and flashinfer's where it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jit_kernel import ops

ROWS, SIZE, HEADS, KV_HEADS, HEAD = 8192, 4096, 32, 8, 128
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """Ours and the same of torch's operators, and flashinfer's; bytes: what must be read and written."""

    name: str
    ours: Callable[[], object]
    torch: Callable[..., object]
    inputs: tuple[Any, ...]
    bytes: int
    flashinfer: Callable[[Any], object] | None = None


def every(rows: int, device: str) -> list[Case]:
    """All cases, with their tensors."""
    return [case for make in (norms, quantizations, attention) for case in make(rows, device)]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (groups / scales).to(E4M3).flatten(-2), scales.squeeze(-1)


def quantize_all(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().max().float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(E4M3), scale


def merge(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    whole = lse.logsumexp(0)
    return ((lse - whole).exp().unsqueeze(-1) * parts.float()).sum(0).to(parts.dtype), whole


def norms(rows: int, device: str) -> Iterator[Case]:
    """The norm and the gate: rows of 4,096."""
    x, residual, out = (torch.randn(rows, SIZE, device=device).to(BF16) for _ in range(3))
    weight, scale = torch.randn(SIZE, device=device).to(BF16), torch.ones(1, device=device)
    wide, small = (
        torch.randn(rows, 2 * SIZE, device=device).to(BF16),
        torch.empty(rows, SIZE, device=device, dtype=E4M3),
    )
    n = rows * SIZE
    yield Case(
        "rms_norm",
        lambda: ops.rms_norm(x, weight, out=out),
        lambda x, w: F.rms_norm(x, (SIZE,), w, 1e-6),
        (x, weight),
        4 * n,
        lambda peer: peer.norm.rmsnorm(x, weight, 1e-6, out=out),
    )

    def added(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (SIZE,), weight, 1e-6)

    yield Case(
        "rms_norm, residual",
        lambda: ops.rms_norm(x, weight, residual=residual, out=out),
        added,
        (x, residual, weight),
        8 * n,
        lambda peer: peer.norm.fused_add_rmsnorm(x, residual, weight, 1e-6),
    )

    def to_e4m3(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), (SIZE,), weight.float(), 1e-6) / scale).to(E4M3)

    yield Case(
        "rms_norm, e4m3", lambda: ops.rms_norm(x, weight, scale=scale, out=small), to_e4m3, (x, weight, scale), 3 * n
    )

    def gate(x: Tensor) -> Tensor:
        return F.silu(x[..., :SIZE]) * x[..., SIZE:]

    yield Case("silu_and_mul", lambda: ops.silu_and_mul(wide, out=out), gate, (wide,), 6 * n,
               lambda peer: peer.activation.silu_and_mul(wide, out=out))  # fmt: skip


def quantizations(rows: int, device: str) -> Iterator[Case]:
    """A scale a token, 128 numbers, the tensor."""
    x, small = torch.randn(rows, SIZE, device=device).to(BF16), torch.empty(rows, SIZE, device=device, dtype=E4M3)
    n, one = rows * SIZE, torch.ones(1, device=device)
    for name, group in (("token", SIZE), ("128", 128)):
        scales = torch.empty(rows, SIZE // group, device=device)
        yield Case(f"quantize_fp8, {name}", lambda g=group, s=scales: ops.quantize_fp8(x, g, out=small, scale_out=s),
                   lambda x, g=group: quantize(x, g), (x,), 3 * n)  # fmt: skip
    yield Case(
        "quantize_fp8, tensor",
        lambda: ops.quantize_fp8(x, "tensor", out=small, scale_out=one),
        quantize_all,
        (x,),
        5 * n,
    )
    yield Case("quantize_fp8, given scale", lambda: ops.quantize_fp8(x, "tensor", scale=one, out=small),
               lambda x, s: (x.float() / s).to(E4M3), (x, one), 3 * n)  # fmt: skip


def attention(rows: int, device: str) -> Iterator[Case]:
    """Rotary embedding, caches of pages of 16, and merges: 32 heads of 128."""
    q, k, out = (torch.randn(rows, HEADS, HEAD, device=device).to(BF16) for _ in range(3))
    turned = 6.3 * torch.rand(ROWS, HEAD // 2, device=device)
    cos, sin = turned.cos(), turned.sin()
    ids = torch.randperm(ROWS, device=device)[:rows]
    weight, n = torch.randn(HEAD, device=device).to(BF16), rows * SIZE
    yield Case("apply_rope", lambda: ops.apply_rope(q, None, cos, sin, ids, q_out=out),
               lambda x, c, s, i: rope(x, c[i].unsqueeze(1), s[i].unsqueeze(1)),
               (q, cos, sin, ids), 4 * n + rows * HEAD * 4)  # fmt: skip

    few = torch.randn(rows, KV_HEADS, HEAD, device=device).to(BF16)
    angles = torch.cat((cos, sin), 1)

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> None:
        for x in (q, k):
            x.copy_(rope(x, cos[ids].unsqueeze(1), sin[ids].unsqueeze(1)))

    yield Case("apply_rope, q and k in place", lambda: ops.apply_rope(q, few, cos, sin, ids, q_out=q, k_out=few),
               both, (q, few, cos, sin, ids), 4 * n + 4 * rows * KV_HEADS * HEAD + rows * HEAD * 4,
               lambda peer: peer.rope.apply_rope_with_cos_sin_cache_inplace(
                   ids, q.view(rows, -1), few.view(rows, -1), HEAD, angles))  # fmt: skip

    def normed(x: Tensor, w: Tensor, c: Tensor, s: Tensor, i: Tensor) -> Tensor:
        return rope(F.rms_norm(x, (HEAD,), w, 1e-6), c[i].unsqueeze(1), s[i].unsqueeze(1))

    yield Case("apply_rope, norm", lambda: ops.apply_rope(q, None, cos, sin, ids, q_weight=weight, q_out=out),
               normed, (q, weight, cos, sin, ids), 4 * n + rows * HEAD * 4)  # fmt: skip
    k_cache, v_cache = (torch.zeros(ROWS // 16, 16, HEADS, HEAD, device=device, dtype=BF16) for _ in range(2))

    def put(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, i: Tensor) -> None:
        k_cache.view(-1, HEADS, HEAD)[i] = k
        v_cache.view(-1, HEADS, HEAD)[i] = v

    yield Case("store_kv", lambda: ops.store_kv(q, k, k_cache, v_cache, ids), put, (q, k, k_cache, v_cache, ids), 8 * n)
    pages = math.ceil(rows / 16)
    table = torch.randperm(ROWS // 16, device=device)[:pages].int().view(1, -1)
    starts, v_out = torch.tensor([0, rows], dtype=torch.int32, device=device), torch.empty_like(out)

    def take(k_cache: Tensor, v_cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(each[table[0]].flatten(0, 1)[:rows] for each in (k_cache, v_cache))

    yield Case("gather_kv", lambda: ops.gather_kv(k_cache, v_cache, table, starts, k_out=out, v_out=v_out),
               take, (k_cache, v_cache, table), 8 * n)  # fmt: skip
    parts, lse = torch.stack((q, k, q, k)), torch.randn(4, rows, HEADS, device=device)
    lse_out = torch.empty(rows, HEADS, device=device)
    yield Case(
        "merge_states, 4 parts", lambda: ops.merge_states(parts, lse, out=out, lse=lse_out), merge, (parts, lse), 10 * n
    )
