"""jit_kernel.ops beside a copy, torch's own operators and torch.compile, on a CPU or a GPU.

    python benchmarks/ops.py --device cpu|cuda [--folder results] [--quick]

Each op at 8,192 x 4,096 numbers of bfloat16 (`value`: the share of the copy's bandwidth in the same run, by the bytes
that the op must read and write; `asked`: 0.9 on a GPU, 0.8 on a CPU) and, on a GPU, at one row (`value`: its time over
that of an empty kernel, launched the same way; `asked`: 1.1), where calls are replayed from a graph and also counted
as a program makes them. `over_torch` and `over_compile`: theirs over ours, at least 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from jit_kernel import jit, ops  # noqa: E402

ROWS, SIZE, HEADS, HEAD = 8192, 4096, 32, 128
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
ASKED = {"cuda": 0.9, "cpu": 0.8}
EMPTY = 'extern "C" __global__ void empty(const float* x) {}\n'
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Ours and the same of torch's operators; bytes: what must be read and written."""

    name: str
    ours: Callable[[], object]
    torch: Callable[..., object]
    inputs: tuple[Any, ...]
    bytes: int


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
    )

    def to_e4m3(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), (SIZE,), weight.float(), 1e-6) / scale).to(E4M3)

    yield Case(
        "rms_norm, e4m3", lambda: ops.rms_norm(x, weight, scale=scale, out=small), to_e4m3, (x, weight, scale), 3 * n
    )

    def gate(x: Tensor) -> Tensor:
        return F.silu(x[..., :SIZE]) * x[..., SIZE:]

    yield Case("silu_and_mul", lambda: ops.silu_and_mul(wide, out=out), gate, (wide,), 6 * n)


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
    cos, sin = (torch.randn(ROWS, HEAD // 2, device=device) for _ in range(2))
    ids = torch.randperm(ROWS, device=device)[:rows]
    weight, n = torch.randn(HEAD, device=device).to(BF16), rows * SIZE
    yield Case("apply_rope", lambda: ops.apply_rope(q, None, cos, sin, ids, q_out=out),
               lambda x, c, s, i: rope(x, c[i].unsqueeze(1), s[i].unsqueeze(1)),
               (q, cos, sin, ids), 4 * n + rows * HEAD * 4)  # fmt: skip

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


def on_cpu(call: Callable[[], object], rounds: int) -> float:
    """Seconds of a call: the least, because other work on a CPU only adds."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def on_gpu(call: Callable[[], object], rounds: int, calls: int = 1) -> float:
    """Seconds of a call of `calls`: the median by events, with an L2 cache that holds other things."""
    spare = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for started, ended in events:
        if calls == 1:
            spare.zero_()
        started.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(started.elapsed_time(ended) for started, ended in events) / 1e3 / calls


def in_graph(call: Callable[[], object], calls: int = 50) -> float:
    """Seconds of a call of 50 in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return on_gpu(graph.replay, 20, calls)


def large(device: str, rounds: int) -> Iterator[Line]:
    """8,192 rows, beside a copy of as many bytes as an op of two bytes in and two out."""
    timed = on_cpu if device == "cpu" else on_gpu
    source = torch.randn(ROWS, SIZE, device=device).to(BF16)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), rounds)
    bandwidth = 4 * ROWS * SIZE / copy
    yield {"case": "copy", "rows": ROWS, "ms": copy * 1e3, "gb_per_s": bandwidth / 1e9}
    for make in (norms, quantizations, attention):
        for case in make(ROWS, device):
            ours = timed(case.ours, rounds)
            line = {"case": case.name, "rows": ROWS, "ms": ours * 1e3, "gb_per_s": case.bytes / ours / 1e9}
            line |= {"goal": f"{case.name}: share of the copy's bandwidth", "asked": ASKED[device]}
            line["value"] = case.bytes / ours / bandwidth
            yield line | rivals(case, ours, lambda call: timed(call, max(3, rounds // 3)))


def rivals(case: Case, ours: float, timed: Callable[[Callable[[], object]], float]) -> Line:
    """torch's time and torch.compile's over ours."""
    torch._dynamo.reset()
    compiled = torch.compile(case.torch, dynamic=False)
    eager, traced = timed(lambda: case.torch(*case.inputs)), timed(lambda: compiled(*case.inputs))
    return {"over_torch": eager / ours, "over_compile": traced / ours}


def one_row() -> Iterator[Line]:
    """One row on a GPU, replayed from a graph, and as a program calls it."""
    empty = jit.cuda(jit.Sources(text={"empty.cuh": EMPTY}, name="empty"), "empty.cuh", entry="empty")
    x = torch.zeros(4, device="cuda")
    launch = empty[1, 32]
    least, called = in_graph(lambda: launch(x)), on_gpu(lambda: [launch(x) for _ in range(200)], 5, 200)
    yield {"case": "an empty kernel", "rows": 1, "us": least * 1e6, "us_called": called * 1e6}
    for make in (norms, quantizations, attention):
        for case in make(1, "cuda"):
            ours = in_graph(case.ours)
            line = {"case": case.name, "rows": 1, "us": ours * 1e6, "value": ours / least, "asked": 1.1}
            line["goal"] = f"{case.name}: one row over an empty kernel"
            line["us_called"] = on_gpu(lambda call=case.ours: [call() for _ in range(200)], 5, 200) * 1e6
            yield line | rivals(case, ours, in_graph)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()

    def lines() -> Iterator[Line]:
        with torch.no_grad():
            few = one_row() if options.device == "cuda" else ()
            for line in itertools.chain(large(options.device, options.rounds), few):
                print({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()})
                yield line

    record.write("ops", lines(), "cpu" if options.device == "cpu" else "cuda:0", options.folder)


if __name__ == "__main__":
    main()
