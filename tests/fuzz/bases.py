"""Valid calls to start from: `draw(random)` gives a public function's name and its arguments, in guarded memory.

Most come from the generator of tests/support/cases.py; the rest are the calls of malformed_calls.py, calls with sizes
of 0 and 1 and odd head sizes, partial results to combine and to merge, and parameters of scheduler metadata.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import jit_kernel
from tests.support import case_tensors, cases, valid_calls
from tests.support.cases import DENSE, FP8, KVCACHE, VARLEN

COMBINE, MERGE, METADATA = "flash_attn_combine", "merge_state", "get_scheduler_metadata"
SPACE = cases.Space("fuzz", lengths=(7, 24, 150), max_heads=4, max_batch=3, page_sizes=(1, 2, 3, 8, 16, 19, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)
SIZES = (0, 1, 1, 2, 3, 17)
HEAD_SIZES = (1, 2, 3, 5, 7, 8, 16, 31, 33, 64, 65, 127, 129)
GUARD = 192  # bytes on each side of every memory; a read gives NaN and wild indices, a write is seen

Call = dict[str, Any]


def _case(random: Random) -> tuple[str, Call]:
    plan = cases.draw(random.getrandbits(40), SPACE)
    arguments = case_tensors.build(plan).arguments
    if plan.function == KVCACHE and plan.used_k == "tensor" and random.random() < 0.3:
        arguments["scheduler_metadata"] = jit_kernel.get_scheduler_metadata(**metadata_of(arguments))
    return plan.function, arguments


def metadata_of(call: Call) -> Call:
    """The parameters of the scheduler metadata for a call of flash_attn_with_kvcache."""
    q, k, v = call["q"], call["k_cache"], call["v_cache"]
    offsets, new, table = call.get("cu_seqlens_q"), call.get("k"), call.get("page_table")
    starts = [] if offsets is None else offsets.tolist()
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    return {
        "batch_size": q.shape[0] if offsets is None else len(starts) - 1,
        "max_seqlen_q": q.shape[1] if offsets is None else max(longest, call.get("max_seqlen_q") or 0),
        "max_seqlen_k": k.shape[1] * (1 if table is None else table.shape[1]),
        "num_heads_q": q.shape[-2],
        "num_heads_kv": k.shape[-2],
        "headdim": q.shape[-1],
        "headdim_v": v.shape[-1],
        "cache_seqlens": call["cache_seqlens"],
        "qkv_dtype": q.dtype,
        "cu_seqlens_q": offsets,
        "cache_leftpad": call.get("cache_leftpad"),
        "page_size": None if table is None else k.shape[1],
        "max_seqlen_k_new": 0 if new is None else new.shape[-3],
        "has_softcap": call.get("softcap", 0.0) > 0,
        **{name: call[name] for name in ("causal", "window_size", "attention_chunk", "num_splits", "pack_gqa")
           if name in call},
    }  # fmt: skip


def _table(random: Random) -> tuple[str, Call]:
    base = random.choice(list(valid_calls.FUNCTIONS))
    return valid_calls.FUNCTIONS[base].__name__, base()


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _edge(random: Random) -> tuple[str, Call]:
    """Sizes of 0 and 1, odd head sizes."""
    dtype, hk = random.choice(DTYPES), random.choice((1, 1, 2, 3))
    hq, d = hk * random.choice((1, 1, 2, 5)), random.choice(HEAD_SIZES)
    dv = random.choice((d, d, random.choice(HEAD_SIZES)))
    batch, sq, sk = (random.choice(SIZES) for _ in range(3))
    call: Call = {"causal": random.random() < 0.5, "return_softmax_lse": random.random() < 0.5}
    function = random.choice((DENSE, VARLEN, KVCACHE))
    if function == DENSE:
        return function, call | {
            "q": _normal(batch, sq, hq, d, dtype=dtype),
            "k": _normal(batch, sk, hk, d, dtype=dtype),
            "v": _normal(batch, sk, hk, dv, dtype=dtype),
        }
    ints = valid_calls.ints
    if function == VARLEN:
        lengths = [[random.choice(SIZES) for _ in range(batch)] for _ in range(2)]
        starts = [[sum(each[:i]) for i in range(batch + 1)] for each in lengths]
        total_q, total_k = (each[-1] + random.choice((0, 0, 2)) for each in starts)
        return function, call | {
            "q": _normal(total_q, hq, d, dtype=dtype),
            "k": _normal(total_k, hk, d, dtype=dtype),
            "v": _normal(total_k, hk, dv, dtype=dtype),
            "cu_seqlens_q": ints(*starts[0]),
            "cu_seqlens_k": ints(*starts[1]),
        }
    call |= {"q": _normal(batch, sq, hq, d, dtype=dtype), "num_splits": random.choice((0, 1, 3))}
    call["cache_seqlens"] = ints(*(random.randint(0, sk) for _ in range(batch)))
    shape: tuple[int, ...] = (batch, sk)
    if random.random() < 0.5:
        size = random.choice((1, 2, 5))
        width = -(-sk // size)
        shape = (batch * width + 1, size)
        call["page_table"] = torch.randperm(batch * width + 1)[: batch * width].int().reshape(batch, width)
    call |= {"k_cache": _normal(*shape, hk, d, dtype=dtype), "v_cache": _normal(*shape, hk, dv, dtype=dtype)}
    if random.random() < 0.4:
        room = sk if "page_table" not in call else shape[1] * call["page_table"].shape[1]
        new = random.choice((0, 1, 2))
        call["cache_seqlens"] = (call["cache_seqlens"] - new).clamp(0) if room >= new else call["cache_seqlens"]
        if room >= new:
            call |= {"k": _normal(batch, new, hk, d, dtype=dtype), "v": _normal(batch, new, hk, dv, dtype=dtype)}
    return function, _over_fp8(random, call) if dtype in DTYPES[1:3] and random.random() < 0.4 else call


def _over_fp8(random: Random, call: Call) -> Call:
    """The same call of a cache, of 16 bits, with the cache in e4m3, and factors of each kind or none."""
    caches = {name: call[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    shape, factors = call["k_cache"].shape[:-1], {}
    for letter in "kv":
        if random.random() < 0.5:
            factors[f"{letter}_scale"] = 0.25 + torch.rand(*shape)
        if random.random() < 0.5:
            factors[f"{letter}_descale"] = 0.25 + torch.rand(len(call["cache_seqlens"]), shape[-1])
    return call | caches | factors


def _lead(random: Random) -> list[int]:
    return [random.choice((0, 1, 2, 5)) if random.random() < 0.3 else random.randint(1, 6)
            for _ in range(random.choice((1, 2)))]  # fmt: skip


def _partial(random: Random, *lead: int) -> tuple[Tensor, Tensor]:
    """Results over parts of the keys; some over no key, whose out may be anything."""
    dv, dtype = random.choice((1, 3, 8, 16, 40, 64, 127)), random.choice(DTYPES[:3])
    outs, lses = _normal(*lead, dv, dtype=dtype), torch.randn(*lead) * random.choice((1, 20, 1000))
    if random.random() < 0.6:
        empty = torch.rand(*lead) < 0.3
        lses[empty], outs[empty] = -math.inf, math.nan
    return outs, lses


def _combine(random: Random) -> tuple[str, Call]:
    lead = [*_lead(random), random.randint(1, 4)]
    outs, lses = _partial(random, random.choice((1, 2, 3, 17)), *lead)
    call: Call = {"out_partial": outs, "lse_partial": lses}
    if random.random() < 0.4:
        call["out_dtype"] = random.choice(DTYPES[:3])
    if random.random() < 0.4:
        wide = torch.full((*lead, outs.shape[-1] + 3), math.nan, dtype=call.get("out_dtype", outs.dtype))
        call["out"] = wide[..., 2 : 2 + outs.shape[-1]]
    return COMBINE, call


def _merge(random: Random) -> tuple[str, Call]:
    outs, lses = _partial(random, 2, *_lead(random), random.randint(1, 4))
    lse_a, lse_b = (lse.transpose(-1, -2) for lse in lses)
    return MERGE, {"out_a": outs[0], "lse_a": lse_a, "out_b": outs[1], "lse_b": lse_b.contiguous()}


def _metadata(random: Random) -> tuple[str, Call]:
    call = valid_calls.metadata()
    batch = random.choice((0, 1, 2, 7))
    call |= {"batch_size": batch, "cache_seqlens": torch.randint(0, 16, (batch,), dtype=torch.int32)}
    call |= {"num_splits": random.choice((0, 1, 5)), "qkv_dtype": random.choice(DTYPES)}
    if random.random() < 0.3:
        call |= {"cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32), "page_size": 4, "max_seqlen_k_new": 1}
    return METADATA, call


SOURCES: dict[Callable[[Random], tuple[str, Call]], int] = {
    _case: 50, _table: 20, _edge: 12, _combine: 7, _merge: 7, _metadata: 4,
}  # fmt: skip


def draw(random: Random, *, guarded: bool = True, device: str = "cpu") -> tuple[str, Call]:
    """A valid call on a device. torch's own generator is seeded from `random`."""
    torch.manual_seed(random.getrandbits(40))
    source = random.choices(list(SOURCES), list(SOURCES.values()))[0]
    function, call = source(random)
    call = {name: value for name, value in call.items() if value is not None or name.startswith("cu_seqlens")}
    return function, _guarded(call, random, device) if guarded else call


def _guarded(call: Call, random: Random, device: str) -> Call:
    """The same tensors in memory with guards before and behind it; those that shared their memory share it again."""
    moved: dict[int, Tensor] = {}
    made = {}
    for name, value in call.items():
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in moved or storage.nbytes() == 0:
                step = 64 if random.random() < 0.6 else 8
                front = GUARD + step * random.randint(0, 3)
                memory = torch.empty(front + storage.nbytes() + GUARD, dtype=torch.uint8).fill_(0x7F)
                memory[front : front + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
                moved[storage.data_ptr()] = memory.to(device)[front : front + storage.nbytes()]
            room = moved[storage.data_ptr()]
            start = room.storage_offset() // value.element_size() + value.storage_offset()
            empty = torch.empty(0, dtype=value.dtype, device=device)
            value = empty.set_(room.untyped_storage(), start, value.shape, value.stride())
        made[name] = value
    return made
