"""The ways in which a call of each public function can be wrong, and the error that comes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import jit_kernel
from tests.support.malformed_tensors import (
    Malformed,
    of_numbers,
    of_shapes,
    of_tensors,
    wrong_shape,
)
from tests.support.valid_calls import (
    FUNCTIONS,
    Call,
    cache,
    combine,
    dense,
    ints,
    merge,
    metadata,
    paged,
    paged_cache,
    plain_cache,
    plain_dense,
    plain_paged_cache,
    plain_varlen,
    planned,
    varlen,
    wide,
)

INT32_MAX = 2**31 - 1


def of_indices() -> Iterator[Malformed]:
    """Index tensors of the right shape that hold wrong numbers."""

    def holds(base: Callable[[], Call], named: str, says: str, numbers: Tensor | None, **more: Any) -> Malformed:
        new = more if numbers is None else {named: numbers, **more}
        return Malformed(base, named, lambda _: new, ValueError, says)

    for name, last in (("cu_seqlens_q", 9), ("cu_seqlens_k", 12)):
        yield holds(varlen, name, "must be 0", ints(1, 4, last))
        yield holds(varlen, name, "must be 0", ints(-1, 4, last))
        yield holds(varlen, name, "decreases from 6 to 5", ints(0, 6, 5))
        yield holds(varlen, name, "decreases", ints(0, -3, last))
        yield holds(varlen, name, f"must be at most {last}", ints(0, 4, last + 1))
        yield holds(varlen, name, f"must be at most {last}", ints(0, 4, INT32_MAX))
        yield holds(varlen, name, "an int32 holds", torch.tensor([0, 4, last + 2**32]))
    for name in ("seqused_q", "seqused_k"):
        yield holds(varlen, name, "an int32 holds", torch.tensor([-(2**32) + 3, 5]))
        for numbers in (ints(-1, 2), ints(2, INT32_MAX), ints(6, 2), ints(-INT32_MAX, 2)):
            yield holds(varlen, name, "must be between 0 and", numbers)
    for numbers in (ints(13, 8), ints(8, INT32_MAX)):
        yield holds(paged, "page_table", "too narrow", paged()["page_table"], seqused_k=numbers)
    yield holds(paged, "seqused_k", "must be between 0 and 12", ints(-1, 3))
    for page in (-1, 6, INT32_MAX, -INT32_MAX):
        yield holds(
            paged,
            "page_table[0, 2]",
            "must be between 0 and 5",
            None,
            page_table=ints(0, 1, page, 3, 4, 5).reshape(2, 3),
        )
    yield holds(paged, "page_table[1, 2]", "must be between 0 and 5", None, seqused_k=ints(12, 9))
    for page in (-1, 600):
        table = torch.arange(600, dtype=torch.int32).reshape(2, 300)
        table[1, 298] = page
        yield holds(wide, "page_table[1, 298]", "must be between 0 and 599", None, page_table=table)
    for numbers in (ints(-1, 3), ints(3, 17), ints(INT32_MAX, 3)):
        yield holds(cache, "cache_seqlens", "must be between 0 and 16", numbers)
    yield holds(cache, "cache_seqlens", "k_cache is too short", ints(4, 14))
    for numbers in (ints(-1, 0), ints(5, 0), ints(0, INT32_MAX)):
        yield holds(cache, "cache_leftpad", "must be between 0 and", numbers)
    for numbers in (ints(-1, 0), ints(3, 0), ints(0, INT32_MAX)):
        yield holds(cache, "cache_batch_idx", "a row of k_cache", numbers)
    yield holds(cache, "cache_batch_idx", "must differ", ints(1, 1))
    yield holds(cache, "rotary_seqlens", "at least 0", ints(-1, 3))
    yield holds(cache, "rotary_cos", "at least 21", cache()["rotary_cos"], rotary_seqlens=ints(0, 18))
    yield holds(cache, "rotary_cos", "at least", cache()["rotary_cos"], rotary_seqlens=ints(0, INT32_MAX))
    yield holds(
        cache, "rotary_cos", "at least 16", torch.randn(15, 8), rotary_sin=torch.randn(15, 8), rotary_seqlens=None
    )
    yield holds(paged_cache, "page_table", "too narrow", paged_cache()["page_table"], cache_seqlens=ints(7, 6))
    yield holds(paged_cache, "cache_seqlens", "too narrow", ints(9, 0))
    yield holds(paged_cache, "cu_seqlens_k_new", "decreases", ints(0, 3, 2))
    yield holds(paged_cache, "cu_seqlens_k_new", "at most 4", ints(0, 1, 5))
    yield holds(paged_cache, "page_table[0, 1]", "between 0 and 7", None, page_table=ints(1, 8, 3, 4).reshape(2, 2))
    yield holds(paged_cache, "cache_batch_idx", "a row of page_table", ints(0, 2))


def of_plain_calls() -> Iterator[Malformed]:
    """What malforms a call of dense() or varlen() malforms the plain one, too; and the same for caches."""
    for plain, full in ((plain_dense, dense), (plain_varlen, varlen)):
        known = plain()
        for case in (*of_shapes(), *of_indices()):
            if case.base is full and case.named in known:
                yield replace(case, base=plain)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        for value in (-1, 0, 1, 4, 2**31):
            yield wrong_shape(plain_varlen, name, f"is {value};", **{name: value})
        yield Malformed(plain_varlen, name, lambda _, n=name: {n: 5.0}, TypeError, "must be an int")
    three = {"q": torch.randn(2, 5, 3, 32), "v": torch.randn(2, 7, 2, 32), "out": None}
    yield wrong_shape(plain_dense, "q", "multiple of k's 2 heads", **three)
    yield wrong_shape(plain_dense, "k", "dtype int32", k=torch.ones(2, 7, 2, 32, dtype=torch.int32))
    yield wrong_shape(plain_dense, "out", "dv", out=torch.randn(2, 4, 4, 16))
    for sequences in (1, 3):
        k = torch.randn(sequences, 7, 2, 32)
        yield wrong_shape(plain_dense, "k", "b = 2", k=k, v=k[..., :16])
    yield wrong_shape(plain_varlen, "cu_seqlens_k", "with page_table", page_table=torch.zeros(2, 8).int())
    yield wrong_shape(plain_varlen, "cu_seqlens_k", "must be at most 12", cu_seqlens_k=ints(0, 5, 13), seqused_k=None)
    yield wrong_shape(plain_varlen, "seqused_k", "(b,)", seqused_k=ints(1, 2, 3))
    yield wrong_shape(plain_varlen, "cu_seqlens_q", "dtype float32", cu_seqlens_q=torch.tensor([0.0, 4.0, 9.0]))
    for numbers in (ints(-1, 3), ints(3, 17), ints(INT32_MAX, 3)):
        yield wrong_shape(plain_cache, "cache_seqlens", "must be between 0 and 16", cache_seqlens=numbers)
    yield wrong_shape(plain_cache, "cache_seqlens", "(b,)", cache_seqlens=ints(1, 2, 3))
    yield wrong_shape(plain_cache, "k_cache", "b = 2", k_cache=torch.randn(3, 16, 2, 32))
    yield wrong_shape(plain_cache, "v_cache", "(b, sk, hk, dv)", v_cache=torch.randn(2, 15, 2, 32))
    yield wrong_shape(plain_cache, "q", "multiple of k_cache's 2 heads", q=torch.randn(2, 2, 3, 32))
    for value in (-1, 0, 1, 2**31):
        yield wrong_shape(plain_cache, "max_seqlen_q", f"is {value};", max_seqlen_q=value)
    yield wrong_shape(plain_paged_cache, "cache_seqlens", "too narrow", cache_seqlens=ints(9, 0))
    yield wrong_shape(plain_paged_cache, "cache_seqlens", "with page_table", cache_seqlens=None)
    yield wrong_shape(plain_paged_cache, "page_table", "max_pages", page_table=ints(1, 2, 3, 4).reshape(1, 4))
    for page in (-1, 8, INT32_MAX):
        table = ints(1, page, 3, 4).reshape(2, 2)
        yield wrong_shape(plain_paged_cache, "page_table[0, 1]", "between 0 and 7", page_table=table)
    yield wrong_shape(plain_paged_cache, "cu_seqlens_q", "decreases", cu_seqlens_q=ints(0, 4, 3))
    yield wrong_shape(plain_paged_cache, "v_cache", "(pages, page_size, hk, dv)", v_cache=torch.randn(7, 4, 2, 32))


def of_gradients() -> Iterator[Malformed]:
    for base in FUNCTIONS:
        for name, value in base().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield Malformed(
                    base,
                    name,
                    lambda call, name=name: {name: call[name].detach().clone().requires_grad_()},
                    NotImplementedError,
                    "requires grad",
                )


def of_metadata() -> Iterator[Malformed]:
    """get_scheduler_metadata itself, and metadata that belongs to another call."""
    for name in ("batch_size", "num_heads_q", "num_heads_kv", "headdim", "headdim_v", "page_size"):
        for value in (-1, 2**31):
            yield Malformed(metadata, name, lambda _, n=name, v=value: {n: v}, ValueError, f"is {value};")
        yield Malformed(metadata, name, lambda _, n=name: {n: 2.0}, TypeError, "must be an int")
    for name in ("max_seqlen_q", "max_seqlen_k", "max_seqlen_k_new", "attention_chunk", "sm_margin", "num_splits"):
        yield Malformed(metadata, name, lambda _, n=name: {n: -1}, ValueError, "is -1;")
        yield Malformed(metadata, name, lambda _, n=name: {n: "2"}, TypeError, "must be an int")
    for name in ("causal", "has_softcap", "pack_gqa"):
        yield Malformed(metadata, name, lambda _, n=name: {n: 1}, TypeError, "must be a bool")
    yield Malformed(metadata, "num_heads_q", lambda _: {"num_heads_q": 3}, ValueError, "multiple of num_heads_kv")
    yield Malformed(metadata, "qkv_dtype", lambda _: {"qkv_dtype": torch.int8}, ValueError, "must be one of")
    yield Malformed(metadata, "window_size", lambda _: {"window_size": (-3, 0)}, ValueError, "between -1")
    yield Malformed(metadata, "cache_seqlens", lambda _: {"cache_seqlens": ints(1, 2, 3)}, ValueError, "(batch_size,)")
    yield Malformed(metadata, "cu_seqlens_q", lambda _: {"cu_seqlens_q": ints(1, 2)}, ValueError, "(batch_size + 1,)")
    yield Malformed(metadata, "cache_leftpad", lambda _: {"cache_leftpad": ints(1)}, ValueError, "(batch_size,)")
    for name, value in (
        ("num_heads_q", 8),
        ("num_heads_kv", 1),
        ("headdim", 64),
        ("headdim_v", 64),
        ("qkv_dtype", torch.bfloat16),
        ("page_size", 4),
        ("max_seqlen_q", 3),
        ("causal", False),
        ("attention_chunk", 4),
        ("num_splits", 3),
        ("pack_gqa", True),
        ("sm_margin", 1),
        ("cu_seqlens_q", ints(0, 1, 2)),
        ("cache_leftpad", ints(0, 0)),
    ):
        yield Malformed(
            planned, "scheduler_metadata", lambda _, n=name, v=value: _other_plan(n, v), ValueError, f"{name} ="
        )
    smaller = metadata() | {"batch_size": 1, "cache_seqlens": ints(4)}
    made = jit_kernel.get_scheduler_metadata(**smaller)
    yield Malformed(planned, "scheduler_metadata", lambda _: {"scheduler_metadata": made}, ValueError, "batch_size = 1")
    short = {"scheduler_metadata": made[:16]}
    yield Malformed(planned, "scheduler_metadata", lambda _: short, ValueError, "must hold at least")
    blank = torch.zeros(4096, dtype=torch.int32)
    yield Malformed(
        planned, "scheduler_metadata", lambda _: {"scheduler_metadata": blank}, ValueError, "must come from"
    )
    ragged = metadata() | {"num_splits": 2, "max_seqlen_q": 1, "cu_seqlens_q": ints(0, 2, 4)}
    new = {"q": torch.randn(4, 4, 32), "cu_seqlens_q": ints(0, 2, 4), "out": None}
    new |= {"scheduler_metadata": jit_kernel.get_scheduler_metadata(**ragged)}
    yield Malformed(planned, "scheduler_metadata", lambda _: new, ValueError, "must be at least 2")


def _other_plan(name: str, value: Any) -> Call:
    parameters = metadata() | {"num_splits": 2, name: value}
    return {"scheduler_metadata": jit_kernel.get_scheduler_metadata(**parameters)}


def of_results() -> Iterator[Malformed]:
    """flash_attn_combine and merge_state."""
    yield wrong_shape(combine, "lse_partial", "without dv", lse_partial=torch.randn(2, 2, 5, 4))
    yield wrong_shape(combine, "out", "without splits", out=torch.randn(2, 5, 4, 8))
    yield wrong_shape(combine, "out", "expanded", out=torch.randn(1, 5, 4, 16).expand(2, 5, 4, 16))
    none = {"out_partial": torch.randn(0, 2, 5, 4, 16), "lse_partial": torch.randn(0, 2, 5, 4)}
    yield wrong_shape(combine, "out_partial", "between 1 and 256", **none)
    yield wrong_shape(combine, "out_partial", "splits", out_partial=torch.randn(2, 5, 16))
    yield wrong_shape(combine, "out_dtype", "must be one of", out_dtype=torch.int8)
    yield wrong_shape(combine, "out_dtype", "must be one of", out_dtype="bf16")
    yield wrong_shape(combine, "out", "out_dtype", out_dtype=torch.bfloat16)
    memory = torch.randn(3 * 2 * 5 * 4 * 16)
    shared = {"out_partial": memory.view(3, 2, 5, 4, 16), "out": memory[: 2 * 5 * 4 * 16].view(2, 5, 4, 16)}
    yield wrong_shape(combine, "out", "shares its memory", **shared)
    yield wrong_shape(merge, "out_a", "must be (total_q, hq, dv)", out_a=torch.randn(6, 16))
    yield wrong_shape(merge, "out_b", "out_a's shape", out_b=torch.randn(5, 4, 16))
    yield wrong_shape(merge, "lse_a", "(hq, total_q)", lse_a=torch.randn(6, 4))
    batched = {"out_a": torch.randn(2, 3, 4, 16), "out_b": torch.randn(2, 3, 4, 16)}
    yield wrong_shape(merge, "lse_b", "(b, hq, sq)", **batched, lse_a=torch.randn(2, 4, 3), lse_b=torch.randn(2, 3, 4))


def of_devices() -> Iterator[Malformed]:
    """What the CPU cannot do."""
    for d, dv in ((513, 16), (16, 520)):
        call = {"q": torch.randn(1, 1, 1, d), "k": torch.randn(1, 1, 1, d), "v": torch.randn(1, 1, 1, dv)}
        call |= {"out": torch.randn(1, 1, 1, dv)}
        for base in (dense, plain_dense):
            without = call | ({"sinks": None} if base is dense else {})
            yield Malformed(base, f"{d}/{dv}", lambda _, c=without: c, NotImplementedError, "head sizes up to 512")


INDEX_CASES = list(of_indices())
CASES = [
    *of_tensors(),
    *of_numbers(),
    *of_shapes(),
    *INDEX_CASES,
    *of_plain_calls(),
    *of_gradients(),
    *of_metadata(),
    *of_results(),
    *of_devices(),
]
