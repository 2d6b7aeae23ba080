"""The portable kernels under Triton's interpreter, on the CPU: run as a program with seeds, print one line a case.

`InterpretedKernels` stands in for a GPU that this machine has not, as a double named so: everything else, from the
public signature down to the argument list of each kernel, is the implementation's own.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernel_sources"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flash_attention_v3.portable.append import append  # noqa: E402
from flash_attention_v3.portable.combine import combine  # noqa: E402
from flash_attention_v3.portable.forward import forward  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from jit_kernel import flash_attention_v3  # noqa: E402
from jit_kernel.device import Target  # noqa: E402
from jit_kernel.fa3 import dispatch, portable  # noqa: E402
from jit_kernel.fa3.portable import forward as portable_forward  # noqa: E402
from jit_kernel.fa3.portable import kernels as portable_kernels  # noqa: E402
from jit_kernel.fa3.portable import tiles as portable_tiles  # noqa: E402
from jit_kernel.fa3.portable.tiles import Tile, padded  # noqa: E402
from tests.support import case_run, cases, drafts, hidden, large_scores, reference  # noqa: E402
from tests.support.absorbed import with_qv  # noqa: E402

SPACE = cases.Space(
    "portable-interpreted",
    dtypes=(torch.bfloat16, torch.float16, cases.FP8),
    features=cases.FEATURES | cases.FP8_CACHES,
    any_head_dim=512,
    head_dims=((64, 64), (32, 32), (96, 96), (40, 24), (192, 128)),
    lengths=(24, 50, 90),
    max_heads=6,
    max_batch=3,
)
ABSORBED = 8  # every so many cases has qv
# Small, so that a small case has full, masked and partly empty tiles on both sides.
TILES = {"prefill": Tile(32, 16, 1, 1), "short": Tile(64, 32, 1, 1), "decode": Tile(16, 16, 1, 1, lead=4)}
TILES["unaligned"] = TILES["draft"] = TILES["prefill"]
FUNCTIONS = {"forward": forward, "combine": combine, "append": append}


class InterpretedKernels:
    """Double of DeviceKernels: a handle is a function and its constants, a launch interprets the grid."""

    target = Target("cuda", "sm_80")
    multiprocessors = 4

    native = True  # whether e4m3 is a type of the device, as from compute capability 8.9 on

    def __init__(self) -> None:
        self.plans: dict[object, Any] = {}
        self.launched: list[str] = []

    def handle(self, key: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
        name, *fields = key
        if name == "forward":
            dtype, d, dv, kind, paged, local, softcap, aligned, draft, kv_dtype, qv, token_scales, whole = fields
            tile = TILES[kind]
            constants = portable_kernels.forward_constants(dtype, kv_dtype, d, dv, aligned)
            constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PAGED": paged + whole}
            constants |= {"LEAD": tile.lead, "LOCAL": local}
            constants |= {"SOFTCAP": softcap, "DRAFT": draft, "QV": qv, "TOKEN_SCALES": token_scales}
            constants |= {"NATIVE": self.native, "STAGED": False, "INTERPRETED": True}
        elif name == "append":
            constants = portable_kernels.append_constants(*fields)
        else:
            _, _, dv, aligned, splits, _ = fields
            constants = {"HEAD_DIM_V": dv, "HEAD_DIM_V_PADDED": padded(dv), "STRIDE_UNIT": 8 if aligned else 1}
            constants |= {
                "BLOCK_M": portable_kernels.combine_rows(dv, splits),
                "BLOCK_SPLITS": {2: 2, 8: 4, 32: 8}[splits],
            }
        return name, constants

    def launch(self, handle: tuple[str, dict[str, Any]], grid: int, *arguments: Any) -> None:
        name, constants = handle
        self.launched.append(name)
        # The interpreter has no null pointer; a flag keeps an absent tensor from being read.
        given = [torch.zeros(1, dtype=torch.int32) if value is None else value for value in arguments]
        if name != "forward" or not self.native:
            given = [_bytes_of(value) for value in given]
        FUNCTIONS[name][(grid,)](*given, **constants)


def _bytes_of(value: Any) -> Any:
    is_e4m3 = isinstance(value, torch.Tensor) and value.dtype == cases.FP8
    return value.view(torch.uint8) if is_e4m3 else value


def _mend_interpreter() -> None:
    """Faults of Triton 3.6's interpreter: it truncates float32 to bf16, where every GPU rounds to nearest; e4m3's NaN
    is 480 to it; it makes an int of an array of one element, which NumPy 2.4 refuses; its products depend on where a
    row lies in a tile."""
    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(source) == "fp32" and str(target) == "bf16":
            values = torch.from_numpy(np.ascontiguousarray(data))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if str(source) == "fp8e4nv":
            wide = torch.from_numpy(np.ascontiguousarray(data)).view(cases.FP8).float()
            if str(target) == "bf16":
                return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
            return wide.half().numpy() if str(target) == "fp16" else wide.numpy()
        return convert(data, source, target, mode)

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        # BLAS sums a row in an order of where it lies in the tile; in float64 the sums of these products are exact.
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, patched
    interpreter.InterpreterBuilder.create_dot = dot


def install() -> InterpretedKernels:
    """Let the public functions, which check their arguments, reach the interpreted kernels."""
    _mend_interpreter()
    kernels = InterpretedKernels()
    portable_forward.kernels_of = lambda device: kernels  # type: ignore[assignment, return-value]
    portable_tiles.tile = lambda architecture, d, dv, kind, qv=0, kv_dtype=None: TILES[kind]
    served = dispatch.Dispatcher(Target("cuda", "sm_90a"), (portable,))
    dispatch.dispatcher = lambda device: served  # type: ignore[assignment]
    return kernels


def check_joining(seed: int) -> None:
    """flash_attn_combine and merge_state against the formula in float64; a part over no key may hold NaN."""
    random = torch.Generator().manual_seed(seed)
    for lead in ((5, 3), (2, 5, 3), (200, 3)):  # the last: enough rows for the tiles of two long partial results
        for splits, dtype in ((2, torch.bfloat16), (11, torch.float32)):
            outs = torch.randn(splits, *lead, 24, generator=random).to(dtype)
            lses = torch.randn(splits, *lead, generator=random) * 9
            empty = torch.rand(splits, *lead, generator=random) < 0.3
            outs[empty], lses[empty] = math.nan, -math.inf
            lses[empty & (torch.rand(splits, *lead, generator=random) < 0.5)] = math.inf  # FlashAttention-2's mark
            near(*flash_attention_v3.flash_attn_combine(outs, lses), outs, lses)
            if splits == 2:
                by_head = lses.transpose(-1, -2)
                out, lse = flash_attention_v3.merge_state(outs[0], by_head[0], outs[1], by_head[1])
                near(out, lse.transpose(-1, -2), outs, lses)


def near(out: torch.Tensor, lse: torch.Tensor, outs: torch.Tensor, lses: torch.Tensor) -> None:
    """Within one rounding of the joined value."""
    lses = lses.masked_fill(lses == math.inf, -math.inf)
    ref_lse = torch.logsumexp(lses.double(), 0)
    weights = torch.exp(lses.double() - ref_lse).nan_to_num(nan=0.0)
    ref = (weights[..., None] * outs.double().nan_to_num()).sum(0)
    slack = (2.0**-8 if out.dtype == torch.bfloat16 else 1e-6) * (ref.abs() + 1)
    require(bool(((out.double() - ref).abs() <= slack).all()), "joined out")
    empty = ref_lse == -math.inf
    require(torch.equal(lse == -math.inf, empty), "joined lse of nothing")
    require(bool(((lse.double() - ref_lse).abs() <= 1e-5)[~empty].all()), "joined lse")


def check_not_finite(seed: int) -> None:
    """A query that is NaN gives NaN in its own row, in one piece and in splits."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 2, 32, generator=random).half() for n in (5, 90, 90))
    q[0, 3, 1, 7] = math.nan
    rows = torch.zeros(1, 5, 2, dtype=torch.bool)
    rows[0, 3, 1] = True
    for splits in (1, 3):
        out, lse = flash_attention_v3.flash_attn_with_kvcache(q, k, v, num_splits=splits, return_softmax_lse=True)
        require(torch.equal(out.isnan().all(-1), rows), f"out of a query that is NaN, {splits} splits")
        require(torch.equal(out.isnan().any(-1), rows), f"out beside a query that is NaN, {splits} splits")
        require(torch.equal(lse.transpose(1, 2).isnan(), rows), f"lse of a query that is NaN, {splits} splits")


def check_large_scores() -> None:
    """A huge scale and huge products, dense and in pages, in one piece and in splits."""
    for case in large_scores.INTERPRETED_CASES:
        wrong = large_scores.faults(case, torch.float16, 20, 50, paged=False, d=32, splits=1)
        require(not wrong, f"{case}: {wrong}")
        if case.scale < 1e38:  # else an lse is infinite, and says no more which split has the largest score
            wrong = large_scores.faults(case, torch.bfloat16, 1, 50, paged=True, d=32, splits=3)
            require(not wrong, f"{case} in splits: {wrong}")


def check_batch_invariance(seed: int) -> None:
    """With num_splits = 1 a sequence gives the same bits alone, in company, and whatever max_seqlen is said to be."""
    random = torch.Generator().manual_seed(seed)
    lengths = [(7, 61), (40, 40), (1, 33)]
    q, k, v = ([torch.randn(n[i > 0], (4, 2)[i > 0], 32, generator=random).half() for n in lengths] for i in range(3))
    for settings in ({"causal": True}, {"window_size": (20, 3)}, {"attention_chunk": 24, "softcap": 9.0}):
        together = varlen(q, k, v, 64, settings)
        for i, (sq, _) in enumerate(lengths):
            alone = varlen(q[i : i + 1], k[i : i + 1], v[i : i + 1], sq, settings)
            require(torch.equal(alone[0], together[i]), f"sequence {i} with {settings} depends on its neighbours")


def check_deterministic(seed: int) -> None:
    """A sequence over a cache gives the same bits alone and in company, where splits are free but for that."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, n, heads, 32, generator=random).half() for n, heads in ((2, 4), (600, 2), (600, 2)))
    lengths = torch.tensor([600, 33, 300], dtype=torch.int32)
    for splits in (0, 3):
        options = {"causal": True, "num_splits": splits, "deterministic": True, "return_softmax_lse": True}
        together = flash_attention_v3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)
        for i in range(3):
            one = slice(i, i + 1)
            alone = flash_attention_v3.flash_attn_with_kvcache(
                q[one], k[one], v[one], cache_seqlens=lengths[one], **options
            )
            same = all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))
            require(same, f"sequence {i} of a deterministic call with num_splits={splits} depends on its neighbours")


def check_draft_chains(seed: int) -> None:
    """The bits of a chain of draft tokens give those of a causal call; a mask of another bit fails the rule."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, heads, 32, generator=random).half() for n, heads in ((5, 4), (90, 2), (90, 2)))
    options = {"cache_seqlens": torch.tensor([90, 41], dtype=torch.int32), "return_softmax_lse": True}
    seen = drafts.chain(5, 2)
    for splits in (0, 3):
        causal = flash_attention_v3.flash_attn_with_kvcache(q, k, v, causal=True, num_splits=splits, **options)
        for bits, equal in ((seen, True), (seen.roll(1, 1), False)):
            mask = drafts.pack(bits).repeat(2, 1)
            chain = flash_attention_v3.flash_attn_with_kvcache(q, k, v, draft_mask=mask, num_splits=splits, **options)
            require(all(map(torch.equal, chain, causal)) is equal, f"a chain of draft tokens, {splits} splits")
    for bits, right in ((seen, True), (seen.roll(1, 1), False)):
        mask = drafts.pack(bits).repeat(2, 1)
        out, lse = flash_attention_v3.flash_attn_with_kvcache(q, k, v, draft_mask=mask, num_splits=1, **options)
        sequences = [reference.Sequence(q[i], k[i, :n], v[i, :n]) for i, n in enumerate((90, 41))]
        problem = reference.Problem(sequences, causal=True)
        require((reference.check(list(out), list(lse), problem).worst <= 1) is right, "the rule and a draft mask")


def varlen(q: list, k: list, v: list, max_seqlen_q: int, settings: dict[str, Any]) -> list[torch.Tensor]:
    """Ragged attention over lists of sequences."""

    def starts(tensors: list) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(len(x) for x in tensors)], dtype=torch.int32)

    out = flash_attention_v3.flash_attn_varlen_func(
        torch.cat(q), torch.cat(k), torch.cat(v), starts(q), starts(k), max_seqlen_q, 64, num_splits=1, **settings
    )
    return list(out.split([len(x) for x in q]))


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def main(first: int, count: int) -> None:
    kernels = install()
    functions = {name: getattr(flash_attention_v3, name) for name in SPACE.functions}
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        kernels.native = seed % 3 > 0
        plan = cases.draw(seed, SPACE)
        if seed % ABSORBED == 0:
            plan = with_qv(plan, 256, only_qv=seed % (4 * ABSORBED) == 0)
        shares = case_run.judge(plan, functions)
        print(f"case {seed} {shares.row:.4f} {shares.largest:.4f} {shares.lse:.4f}", flush=True)
    counts = [hidden.differ(hidden.draw(seed, SPACE), functions) for seed in range(first, first + count // 4)]
    print(f"hidden {len(counts)} {sum(n > 0 for n in counts)}")
    check_joining(first)
    check_batch_invariance(first)
    check_deterministic(first)
    check_not_finite(first)
    check_large_scores()
    check_draft_chains(first)
    for name in sorted(set(kernels.launched)):
        print(f"launched {name} {kernels.launched.count(name)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
