"""The backward pass on a GPU: ours, FlashAttention 2 and cuDNN as PyTorch carries them, in one run.

    python benchmarks/gradients_gpu.py [--folder results] [--quick]

TFLOP/s of the backward pass alone and of forward and backward together: 2.5 and 3.5 times the forward pass's
4 * b * hq * sq * sk * d, half with a causal mask; 16,384 tokens in all, hidden size 2048, bf16. Ragged: 32 sequences of
lognormal lengths. cuDNN's backward pass alone is what is left of both without its forward pass.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from jit_kernel.fa3.decision import Accepted  # noqa: E402
from jit_kernel.fa3.gradients.call import Backward  # noqa: E402
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func  # noqa: E402

Line = dict[str, Any]
TOKENS, HIDDEN, SEQUENCES = 16384, 2048, 32
GOAL = 1.0  # of FlashAttention 2's rate, for the portable kernels


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def median_ms(work: Callable[[], object], repeats: int = 9) -> float:
    """Median time of one run on the device, after two that warm up."""
    work(), work()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]


@dataclass(frozen=True)
class Case:
    """One shape; lengths of a ragged batch, else one length for all sequences."""

    head_dim: int
    causal: bool
    lengths: tuple[int, ...]
    ragged: bool = False

    @property
    def billions(self) -> float:
        """Operations of the forward pass."""
        squares = sum(length**2 for length in self.lengths)
        return 4 * HIDDEN * squares * (0.5 if self.causal else 1) / 1e9


def lognormal() -> tuple[int, ...]:
    """Lengths of 16,384 tokens in all, the longest some twenty times the shortest."""
    weights = torch.exp(torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(0)) * 0.8)
    lengths = [max(1, int(w)) for w in (weights / weights.sum() * TOKENS).tolist()]
    lengths[0] += TOKENS - sum(lengths)
    return tuple(lengths)


def cases(quick: bool) -> Iterator[Case]:
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for length in (4096,) if quick else (1024, 4096, 16384):
                yield Case(head_dim, causal, (length,) * (TOKENS // length))
            yield Case(head_dim, causal, lognormal(), ragged=True)


def arguments(case: Case) -> tuple[Backward, Callable[[], object]]:
    """The backward pass with our forward pass's out and lse, and the forward pass."""
    heads, scale = HIDDEN // case.head_dim, 1 / math.sqrt(case.head_dim)
    longest = max(case.lengths)
    if case.ragged:
        q, k, v, grad_out = (normal(TOKENS, heads, case.head_dim) for _ in range(4))
        starts = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        ragged = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}

        def forward() -> Any:
            return flash_attn_varlen_func(
                q, k, v, starts, starts, longest, longest, causal=case.causal, return_softmax_lse=True
            )
    else:
        q, k, v, grad_out = (normal(len(case.lengths), longest, heads, case.head_dim) for _ in range(4))
        ragged = {}

        def forward() -> Any:
            return flash_attn_func(q, k, v, causal=case.causal, return_softmax_lse=True)

    out, lse = forward()
    bounds = {"left": -1, "right": 0 if case.causal else -1, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return Backward(grad_out, q, k, v, out, lse, scale, **bounds, **ragged), forward


def torch_flash(call: Backward) -> tuple[Callable[[], object], Callable[[], object]]:
    """FlashAttention 2's passes in torch."""
    q, k, v, causal, none = call.q, call.k, call.v, call.right == 0, torch.empty((), dtype=torch.uint64, device="cuda")
    offsets = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    named = {"scale": call.softmax_scale}

    def forward() -> Any:
        return torch.ops.aten._flash_attention_forward(q, k, v, *offsets, 0.0, causal, False, **named)

    seed = torch.empty(2, dtype=torch.uint64, device="cuda")

    def backward() -> Any:
        return torch.ops.aten._flash_attention_backward(
            call.grad_out, q, k, v, call.out, call.lse, *offsets, 0.0, causal, seed, none, **named
        )

    return forward, backward


def cudnn(call: Backward) -> tuple[float, float]:
    """Milliseconds of cuDNN's forward pass, and of both."""
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (call.q, call.k, call.v))
    grad_out = call.grad_out.transpose(1, 2)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=call.right == 0)

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v), grad_out)

    return median_ms(forward), median_ms(both)


def implementations() -> list[tuple[str, Any]]:
    """Ours that have a backward pass."""
    found = []
    for name in ("hopper", "portable"):
        try:
            found.append((name, importlib.import_module(f"jit_kernel.fa3.{name}.backward")))
        except ModuleNotFoundError as error:
            if error.name != f"jit_kernel.fa3.{name}.backward":
                raise
    return found


def measured(case: Case) -> Iterator[Line]:
    call, our_forward = arguments(case)
    shape = {
        "case": "ragged" if case.ragged else "dense", "head_dim": case.head_dim, "heads": HIDDEN // case.head_dim,
        "seqlen": max(case.lengths), "sequences": len(case.lengths), "causal": case.causal, "tokens": TOKENS,
    }  # fmt: skip

    def line(name: str, forward_ms: float, backward_ms: float, **more: Any) -> Line:
        rates = (2.5 * case.billions / backward_ms, 3.5 * case.billions / (forward_ms + backward_ms))
        return shape | {
            "implementation": name, "backward_ms": round(backward_ms, 3), "tflops": round(rates[0], 1),
            "both_ms": round(forward_ms + backward_ms, 3), "both_tflops": round(rates[1], 1), **more,
        }  # fmt: skip

    forward, backward = torch_flash(call)
    reference, peer_ms = backward(), median_ms(backward)
    yield line("FA2 in torch", median_ms(forward), peer_ms)
    if not case.ragged and case.head_dim <= 128:
        alone, both = cudnn(call)
        yield line("cuDNN in torch", alone, both - alone)
    forward_ms = median_ms(our_forward)
    for name, implementation in implementations():
        if not isinstance(implementation.decide(call), Accepted):
            continue
        found = implementation.gradients(call)
        errors = [
            float((x.float() - y.float()).norm() / y.float().norm())
            for x, y in zip(found[:3], reference[:3], strict=True)
        ]
        ms = median_ms(lambda run=implementation.gradients: run(call))
        goal = {"goal": GOAL, "value": round(peer_ms / ms, 3)} if name == "portable" else {"of_fa2": peer_ms / ms}
        yield line(name, forward_ms, ms, distance_from_fa2=round(max(errors), 5), **goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--quick", action="store_true", help="sequences of 4,096 and ragged ones alone")
    options = parser.parse_args()

    def lines() -> Iterator[Line]:
        for case in cases(options.quick):
            for line in measured(case):
                print(" ".join(f"{name}={value}" for name, value in line.items()), flush=True)
                yield line
            torch.cuda.empty_cache()

    print(record.write("gradients", lines(), "cuda:0", options.folder))


if __name__ == "__main__":
    main()
