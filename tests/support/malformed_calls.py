"""Valid calls of every public function, and the ways in which each one of them can be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import jit_kernel

Call = dict[str, Any]
INT32_MAX = 2**31 - 1


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def dense() -> Call:
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 7, 2, 32), torch.randn(2, 7, 2, 16)
    return {"q": q, "k": k, "v": v, "sinks": torch.randn(4), "out": torch.randn(2, 5, 4, 16)}


def varlen() -> Call:
    q, k, v = torch.randn(9, 4, 32), torch.randn(12, 2, 32), torch.randn(12, 2, 16)
    offsets = {"cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 5, 12)}
    used = {"seqused_q": ints(3, 5), "seqused_k": ints(5, 6)}
    return {"q": q, "k": k, "v": v, **offsets, **used, "out": torch.randn(9, 4, 16)}


def paged() -> Call:
    q, k, v = torch.randn(2, 3, 4, 32), torch.randn(6, 4, 2, 32), torch.randn(6, 4, 2, 32)
    table = ints(0, 1, 2, 3, 4, 99).reshape(2, 3)
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return {
        "q": q,
        "k": k,
        "v": v,
        **none,
        "seqused_k": ints(12, 8),
        "page_table": table,
        "out": torch.randn(2, 3, 4, 32),
    }


def wide() -> Call:
    """Pages enough for the check of a whole table at once."""
    table = torch.arange(600, dtype=torch.int32).reshape(2, 300)
    pages = torch.randn(600, 1, 1, 16)
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return {"q": torch.randn(2, 1, 1, 16), "k": pages, "v": pages.clone(), **none, "seqused_k": ints(300, 299)} | {
        "page_table": table
    }


def cache() -> Call:
    """Every argument that a dense cache takes: append, rotary, batch index and left padding."""
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(3, 16, 2, 32), "v_cache": torch.randn(3, 16, 2, 32)}
    call |= {"k": torch.randn(2, 3, 2, 32), "v": torch.randn(2, 3, 2, 32), "cache_seqlens": ints(4, 13)}
    call |= {"rotary_cos": torch.randn(20, 8), "rotary_sin": torch.randn(20, 8), "rotary_seqlens": ints(5, 17)}
    call |= {"cache_batch_idx": ints(2, 0), "cache_leftpad": ints(1, 2), "causal": True, "num_splits": 0}
    return call | {
        "out": torch.randn(2, 2, 4, 32),
        "sinks": torch.randn(4),
        "draft_mask": ints(1, 2, 3, -1, 5, 6, 7, -8).reshape(4, 2),
    }


def paged_cache() -> Call:
    """Ragged queries and new keys over pages."""
    call = {"q": torch.randn(3, 4, 32), "k_cache": torch.randn(8, 4, 2, 32), "v_cache": torch.randn(8, 4, 2, 32)}
    call |= {"k": torch.randn(4, 2, 32), "v": torch.randn(4, 2, 32), "cu_seqlens_k_new": ints(0, 1, 4)}
    call |= {"cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 2, "cache_seqlens": ints(7, 5)}
    return call | {"page_table": ints(1, 2, 3, 4).reshape(2, 2), "draft_mask": ints(*range(6)).reshape(3, 2)}


def planned() -> Call:
    """A cache with scheduler_metadata."""
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(2, 16, 2, 32), "v_cache": torch.randn(2, 16, 2, 32)}
    call |= {"cache_seqlens": ints(4, 13), "causal": True, "num_splits": 2, "out": torch.randn(2, 2, 4, 32)}
    made = jit_kernel.get_scheduler_metadata(**metadata() | {"num_splits": 2})
    return call | {"scheduler_metadata": made}


def fp8() -> Call:
    q, k, v = (torch.randn(2, 4, heads, 32).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    scales = {f"{name}_descale": torch.rand(2, 2) for name in "qkv"}
    return {"q": q, "k": k, "v": v, **scales, "out": torch.randn(2, 4, 4, 32).bfloat16()}


def mla() -> Call:
    q, qv = torch.randn(1, 2, 4, 64).bfloat16(), torch.randn(1, 2, 4, 256).bfloat16()
    k, v = torch.randn(1, 8, 1, 64).bfloat16(), torch.randn(1, 8, 1, 256).bfloat16()
    return {"q": q, "k": k, "v": v, "qv": qv, "cu_seqlens_q": None, "cu_seqlens_k": None, "only_qv": True}


def metadata() -> Call:
    sizes = {"batch_size": 2, "max_seqlen_q": 2, "max_seqlen_k": 16, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 32}
    return sizes | {"cache_seqlens": ints(4, 13), "qkv_dtype": torch.float32, "causal": True}


def combine() -> Call:
    return {"out_partial": torch.randn(3, 2, 5, 4, 16), "lse_partial": torch.randn(3, 2, 5, 4)} | {
        "out": torch.randn(2, 5, 4, 16)
    }


def merge() -> Call:
    a, b = torch.randn(6, 4, 16), torch.randn(6, 4, 16)
    return {"out_a": a, "lse_a": torch.randn(4, 6), "out_b": b, "lse_b": torch.randn(4, 6)}


def plain_dense() -> Call:
    """What the CPU library checks for itself: the calls above ask for more (sinks, seqused_q, new keys)."""
    return {name: value for name, value in dense().items() if name != "sinks"}


def plain_varlen() -> Call:
    return {name: value for name, value in varlen().items() if name != "seqused_q"}


def plain_cache() -> Call:
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(2, 16, 2, 32), "v_cache": torch.randn(2, 16, 2, 32)}
    return call | {"cache_seqlens": ints(4, 13), "causal": True, "out": torch.randn(2, 2, 4, 32)}


def plain_paged_cache() -> Call:
    call = {"q": torch.randn(3, 4, 32), "k_cache": torch.randn(8, 4, 2, 32), "v_cache": torch.randn(8, 4, 2, 32)}
    call |= {"cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 2, "cache_seqlens": ints(7, 5)}
    return call | {"page_table": ints(1, 2, 3, 4).reshape(2, 2)}


FUNCTIONS: dict[Callable[[], Call], Callable[..., Any]] = {
    dense: jit_kernel.flash_attn_func,
    varlen: jit_kernel.flash_attn_varlen_func,
    paged: jit_kernel.flash_attn_varlen_func,
    wide: jit_kernel.flash_attn_varlen_func,
    cache: jit_kernel.flash_attn_with_kvcache,
    paged_cache: jit_kernel.flash_attn_with_kvcache,
    planned: jit_kernel.flash_attn_with_kvcache,
    fp8: jit_kernel.flash_attn_func,
    mla: jit_kernel.flash_attn_varlen_func,
    metadata: jit_kernel.get_scheduler_metadata,
    combine: jit_kernel.flash_attn_combine,
    merge: jit_kernel.merge_state,
    plain_dense: jit_kernel.flash_attn_func,
    plain_varlen: jit_kernel.flash_attn_varlen_func,
    plain_cache: jit_kernel.flash_attn_with_kvcache,
    plain_paged_cache: jit_kernel.flash_attn_with_kvcache,
}
# Arguments that an earlier one answers for: of q's own errors, another argument is named.
_OWNERS = {"q", "out_partial", "out_a", "cache_seqlens of metadata"}


@dataclass(frozen=True)
class Malformed:
    """A valid call, what replaces some of its arguments, and the error that must come of it."""

    base: Callable[[], Call]
    named: str
    change: Callable[[Call], Call]
    error: type[Exception]
    says: str

    def __str__(self) -> str:
        return f"{self.base.__name__}-{self.named}-{self.says}".replace(" ", "_")

    def make(self) -> Call:
        call = self.base()
        return call | self.change(call)


def _strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps in the last dimension."""
    wider = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
    wider[..., ::2] = tensor
    return wider[..., ::2]


def _put(name: str, new: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: {name: new(call[name])}


def of_tensors() -> Iterator[Malformed]:
    """Every tensor of every call: not a tensor, sparse, elsewhere, of another dtype, shape and stride."""
    for base in FUNCTIONS:
        call = base()
        for name, value in call.items():
            if not isinstance(value, Tensor):
                continue

            number = name == "cache_seqlens" and base is not metadata
            yield Malformed(
                base,
                name,
                _put(name, lambda _: "text"),
                TypeError,
                "must be an int" if number else "must be a torch.Tensor",
            )
            if value.dim() > 1 and value.dtype != torch.float8_e4m3fn:
                yield Malformed(base, name, _put(name, Tensor.to_sparse), TypeError, "dense")
            if name not in _OWNERS and base is not metadata:
                yield Malformed(base, name, _put(name, lambda t: t.to("meta")), ValueError, "device")
            wrong = torch.int16 if value.dtype == torch.int32 else torch.float64
            yield Malformed(base, name, _put(name, lambda t, wrong=wrong: t.to(wrong)), ValueError, "dtype")
            yield Malformed(base, name, _put(name, lambda t: t[None]), ValueError, "shape")
            if "lse" not in name and "descale" not in name:
                yield Malformed(base, name, _put(name, _strided), ValueError, "stride")


def of_numbers() -> Iterator[Malformed]:
    """Numbers of the wrong type, out of range, not finite, huge."""
    for base in (dense, varlen, cache, plain_dense, plain_varlen, plain_cache):
        for name in ("causal", "return_softmax_lse"):
            yield Malformed(base, name, lambda _, name=name: {name: 1}, TypeError, "must be a bool")
        yield Malformed(base, "pack_gqa", lambda _: {"pack_gqa": 0}, TypeError, "must be a bool")
        for value in (0.0, -1.0, math.nan, math.inf, 1e39, 1e-300):
            yield Malformed(base, "softmax_scale", lambda _, v=value: {"softmax_scale": v}, ValueError, f"{value}")
        for value in (-1.0, math.nan, math.inf, 1e39, 1e-300):
            yield Malformed(base, "softcap", lambda _, v=value: {"softcap": v}, ValueError, f"{value}")
        for name in ("softmax_scale", "softcap"):
            yield Malformed(base, name, lambda _, n=name: {n: 10**5000}, ValueError, "an int of")
        for name, value in (("softmax_scale", "8"), ("softmax_scale", True), ("softcap", None), ("softcap", "50")):
            yield Malformed(base, name, lambda _, n=name, v=value: {n: v}, TypeError, "must be a float")
        for name, values in {
            "attention_chunk": (-1, 2**31, 10**30),
            "num_splits": (-1, 257, 2**40),
            "sm_margin": (-1, 2**31),
        }.items():
            for value in values:
                yield Malformed(base, name, lambda _, n=name, v=value: {n: v}, ValueError, f"{value}; it must be")
            yield Malformed(base, name, lambda _, n=name: {n: 1.0}, TypeError, "must be an int")
            for value in (True, torch.tensor(1.0), torch.tensor([1]), torch.tensor(True)):
                yield Malformed(base, name, lambda _, n=name, v=value: {n: v}, TypeError, "must be an int")
            yield Malformed(base, name, lambda _, n=name: {n: 10**5000}, ValueError, "an int of")
        for window in (3, "ab", torch.zeros(2), torch.ones(3).int(), torch.ones(2).bool(), (1,), (1, 2, 3)):
            yield Malformed(base, "window_size", lambda _, w=window: {"window_size": w}, TypeError, "pair")
        for window in ((-2, 0), (0, -2), (2**31, 0), (0, 2**40)):
            yield Malformed(base, "window_size", lambda _, w=window: {"window_size": w}, ValueError, "between -1")
        for window in ((1.0, 0), (0, "1"), (True, 1), (-1.0, -1), (0, torch.tensor(1.0)), (0, torch.tensor([1]))):
            yield Malformed(base, "window_size", lambda _, w=window: {"window_size": w}, TypeError, "must be an int")
    for base, name in ((varlen, "max_seqlen_q"), (varlen, "max_seqlen_k"), (cache, "max_seqlen_q")):
        for value in (-1, 0, 1, 2**31):
            yield Malformed(base, name, lambda _, n=name, v=value: {n: v}, ValueError, f"is {value};")
        yield Malformed(base, name, lambda _, n=name: {n: 4.0}, TypeError, "must be an int")
    yield Malformed(dense, "deterministic", lambda _: {"deterministic": None}, TypeError, "must be a bool")
    yield Malformed(cache, "rotary_interleaved", lambda _: {"rotary_interleaved": 1}, TypeError, "must be a bool")
    yield Malformed(mla, "only_qv", lambda _: {"only_qv": 1}, TypeError, "must be a bool")
    for value in (-1, 17, 2**40):
        yield Malformed(cache, "cache_seqlens", lambda _, v=value: {"cache_seqlens": v}, ValueError, f"is {value};")
    yield Malformed(cache, "cache_seqlens", lambda _: {"cache_seqlens": True}, TypeError, "must be an int")
    yield Malformed(cache, "cache_seqlens", lambda _: {"cache_seqlens": 14}, ValueError, "too short")


def _shape(base: Callable[[], Call], named: str, says: str, **new: Any) -> Malformed:
    return Malformed(base, named, lambda _: new, ValueError, says)


def of_shapes() -> Iterator[Malformed]:
    """Arguments that are well formed each and do not go together."""
    yield _shape(dense, "q", "multiple of k's 2 heads", q=torch.randn(2, 5, 3, 32))
    yield _shape(dense, "q", "at least 1", q=torch.randn(2, 5, 0, 32))
    yield _shape(dense, "k", "at least 1", k=torch.randn(2, 7, 2, 0))
    yield _shape(dense, "k", "head size 24", k=torch.randn(2, 7, 2, 24))
    yield _shape(dense, "k", "b = 2", k=torch.randn(3, 7, 2, 32))
    yield _shape(dense, "v", "4 heads", v=torch.randn(2, 7, 4, 16))
    yield _shape(dense, "v", "(b, sk, hk, dv)", v=torch.randn(2, 6, 2, 16))
    yield _shape(dense, "sinks", "(hq,)", sinks=torch.randn(2))
    yield _shape(dense, "out", "dv", out=torch.randn(2, 5, 4, 32))
    yield _shape(dense, "out", "expanded", out=torch.randn(2, 1, 4, 16).expand(2, 5, 4, 16))
    yield _shape(dense, "k", "at most 2147483647", k=torch.randn(1, 1, 2, 32).expand(2, 2**31, 2, 32))
    for name in ("q", "k", "v"):
        yield Malformed(
            dense, "out", lambda call, n=name: _sharing(call, n), ValueError, f"shares its memory with {name}"
        )
    yield _shape(varlen, "cu_seqlens_q", "at least one", cu_seqlens_q=ints())
    yield _shape(varlen, "cu_seqlens_k", "(b + 1,)", cu_seqlens_k=ints(0, 12))
    yield _shape(varlen, "seqused_q", "(b,)", seqused_q=ints(1, 2, 3))
    yield _shape(varlen, "q", "(b, sq, hq, d)", cu_seqlens_q=None)
    yield _shape(varlen, "k", "(b, sk, hk, d)", cu_seqlens_k=None)
    yield _shape(paged, "cu_seqlens_k", "with page_table", cu_seqlens_k=ints(0, 1, 2))
    yield _shape(paged, "seqused_k", "with page_table", seqused_k=None)
    yield _shape(paged, "page_table", "max_pages", page_table=ints(1, 2, 3).reshape(1, 3))
    yield _shape(paged, "k", "page_size", k=torch.randn(6, 0, 2, 32), v=torch.randn(6, 0, 2, 32))
    yield _shape(cache, "v", "with k", v=None)
    yield _shape(cache, "v", "without k", k=None)
    yield _shape(cache, "cache_seqlens", "appended", cache_seqlens=None)
    yield _shape(cache, "k", "(b, s_new, hk, d)", k=torch.randn(2, 3, 2, 16))
    yield _shape(cache, "v", "as many rows", v=torch.randn(2, 2, 2, 32))
    yield _shape(cache, "k_cache", "expanded", k_cache=torch.randn(1, 16, 2, 32).expand(3, 16, 2, 32))
    yield _shape(cache, "v_cache", "expanded", v_cache=torch.randn(3, 1, 2, 32).expand(3, 16, 2, 32))
    yield _shape(cache, "rotary_sin", "with rotary_cos", rotary_sin=None)
    yield _shape(cache, "rotary_sin", "without rotary_cos", rotary_cos=None)
    yield _shape(cache, "k", "new keys", k=None, v=None)
    yield _shape(cache, "rotary_sin", "rotary_cos's shape", rotary_sin=torch.randn(19, 8))
    for half in (0, 4, 12, 24):
        table = torch.randn(20, half)
        yield _shape(cache, "rotary_cos", "multiple of 16", rotary_cos=table, rotary_sin=table)
    for rows in (2, 5):
        yield _shape(cache, "draft_mask", "(total_q, words) = (4, 1)", draft_mask=torch.zeros(rows, 1).int())
    yield _shape(paged_cache, "draft_mask", "(total_q, words) = (3, 2)", draft_mask=torch.zeros(2, 2).int())
    for words in (0, 2**20 + 1):
        mask = torch.zeros(1, words).int().expand(4, words)
        yield _shape(cache, "draft_mask", "words between 1 and 1048576", draft_mask=mask)
    yield _shape(cache, "draft_mask", "whose 32 bits are keys", draft_mask=torch.zeros(4, 1).long())
    yield _shape(fp8, "k_descale", "(b, hk)", k_descale=torch.ones(2, 4))
    yield _shape(fp8, "out", "bfloat16", out=torch.randn(2, 4, 4, 32).half())
    yield _shape(mla, "qv", "with only_qv", qv=None)
    yield _shape(mla, "qv", "dv in the last place", qv=torch.randn(1, 2, 4, 512).bfloat16())
    small = torch.randn(1, 2, 4, 32).bfloat16()
    yield _shape(mla, "qv", "d = 32", q=small, k=torch.randn(1, 8, 1, 32).bfloat16())


def _sharing(call: Call, name: str) -> Call:
    """One memory for `name` and for out."""
    memory = torch.randn(4096)
    out, other = call["out"], call[name]
    return {"out": memory[: out.numel()].view(out.shape), name: memory[: other.numel()].view(other.shape)}


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
            yield _shape(plain_varlen, name, f"is {value};", **{name: value})
        yield Malformed(plain_varlen, name, lambda _, n=name: {n: 5.0}, TypeError, "must be an int")
    three = {"q": torch.randn(2, 5, 3, 32), "v": torch.randn(2, 7, 2, 32), "out": None}
    yield _shape(plain_dense, "q", "multiple of k's 2 heads", **three)
    yield _shape(plain_dense, "k", "dtype int32", k=torch.ones(2, 7, 2, 32, dtype=torch.int32))
    yield _shape(plain_dense, "out", "dv", out=torch.randn(2, 4, 4, 16))
    for sequences in (1, 3):
        k = torch.randn(sequences, 7, 2, 32)
        yield _shape(plain_dense, "k", "b = 2", k=k, v=k[..., :16])
    yield _shape(plain_varlen, "cu_seqlens_k", "with page_table", page_table=torch.zeros(2, 8).int())
    yield _shape(plain_varlen, "cu_seqlens_k", "must be at most 12", cu_seqlens_k=ints(0, 5, 13), seqused_k=None)
    yield _shape(plain_varlen, "seqused_k", "(b,)", seqused_k=ints(1, 2, 3))
    yield _shape(plain_varlen, "cu_seqlens_q", "dtype float32", cu_seqlens_q=torch.tensor([0.0, 4.0, 9.0]))
    for numbers in (ints(-1, 3), ints(3, 17), ints(INT32_MAX, 3)):
        yield _shape(plain_cache, "cache_seqlens", "must be between 0 and 16", cache_seqlens=numbers)
    yield _shape(plain_cache, "cache_seqlens", "(b,)", cache_seqlens=ints(1, 2, 3))
    yield _shape(plain_cache, "k_cache", "b = 2", k_cache=torch.randn(3, 16, 2, 32))
    yield _shape(plain_cache, "v_cache", "(b, sk, hk, dv)", v_cache=torch.randn(2, 15, 2, 32))
    yield _shape(plain_cache, "q", "multiple of k_cache's 2 heads", q=torch.randn(2, 2, 3, 32))
    for value in (-1, 0, 1, 2**31):
        yield _shape(plain_cache, "max_seqlen_q", f"is {value};", max_seqlen_q=value)
    yield _shape(plain_paged_cache, "cache_seqlens", "too narrow", cache_seqlens=ints(9, 0))
    yield _shape(plain_paged_cache, "cache_seqlens", "with page_table", cache_seqlens=None)
    yield _shape(plain_paged_cache, "page_table", "max_pages", page_table=ints(1, 2, 3, 4).reshape(1, 4))
    for page in (-1, 8, INT32_MAX):
        table = ints(1, page, 3, 4).reshape(2, 2)
        yield _shape(plain_paged_cache, "page_table[0, 1]", "between 0 and 7", page_table=table)
    yield _shape(plain_paged_cache, "cu_seqlens_q", "decreases", cu_seqlens_q=ints(0, 4, 3))
    yield _shape(plain_paged_cache, "v_cache", "(pages, page_size, hk, dv)", v_cache=torch.randn(7, 4, 2, 32))


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
        ("window_size", (5, 0)),
        ("attention_chunk", 4),
        ("has_softcap", True),
        ("num_splits", 3),
        ("pack_gqa", True),
        ("sm_margin", 1),
        ("cu_seqlens_q", ints(0, 1, 2)),
        ("cache_leftpad", ints(0, 0)),
    ):
        said = {"window_size": "window_left", "causal": "window_right", "pack_gqa": "pack_gqa"}.get(name, name)
        said = "causal" if name == "causal" else said
        yield Malformed(
            planned, "scheduler_metadata", lambda _, n=name, v=value: _other_plan(n, v), ValueError, f"{said} ="
        )
    smaller = metadata() | {"batch_size": 1, "cache_seqlens": ints(4)}
    made = jit_kernel.get_scheduler_metadata(**smaller)
    yield Malformed(
        planned, "scheduler_metadata", lambda _: {"scheduler_metadata": made}, ValueError, "must hold at least"
    )
    blank = torch.zeros(4096, dtype=torch.int32)
    yield Malformed(
        planned, "scheduler_metadata", lambda _: {"scheduler_metadata": blank}, ValueError, "must come from"
    )
    ragged = metadata() | {"num_splits": 2, "max_seqlen_q": 1, "cu_seqlens_q": ints(0, 2, 4)}
    short = jit_kernel.get_scheduler_metadata(**ragged)
    new = {"scheduler_metadata": short, "q": torch.randn(4, 4, 32), "cu_seqlens_q": ints(0, 2, 4), "out": None}
    yield Malformed(planned, "scheduler_metadata", lambda _: new, ValueError, "must be at least 2")


def _other_plan(name: str, value: Any) -> Call:
    parameters = metadata() | {"num_splits": 2, name: value}
    return {"scheduler_metadata": jit_kernel.get_scheduler_metadata(**parameters)}


def of_results() -> Iterator[Malformed]:
    """flash_attn_combine and merge_state."""
    yield _shape(combine, "lse_partial", "without dv", lse_partial=torch.randn(2, 2, 5, 4))
    yield _shape(combine, "out", "without splits", out=torch.randn(2, 5, 4, 8))
    yield _shape(combine, "out", "expanded", out=torch.randn(1, 5, 4, 16).expand(2, 5, 4, 16))
    none = {"out_partial": torch.randn(0, 2, 5, 4, 16), "lse_partial": torch.randn(0, 2, 5, 4)}
    yield _shape(combine, "out_partial", "between 1 and 256", **none)
    yield _shape(combine, "out_partial", "splits", out_partial=torch.randn(2, 5, 16))
    yield _shape(combine, "out_dtype", "must be one of", out_dtype=torch.int8)
    yield _shape(combine, "out_dtype", "must be one of", out_dtype="bf16")
    yield _shape(combine, "out", "out_dtype", out_dtype=torch.bfloat16)
    memory = torch.randn(3 * 2 * 5 * 4 * 16)
    shared = {"out_partial": memory.view(3, 2, 5, 4, 16), "out": memory[: 2 * 5 * 4 * 16].view(2, 5, 4, 16)}
    yield _shape(combine, "out", "shares its memory", **shared)
    yield _shape(merge, "out_a", "must be (total_q, hq, dv)", out_a=torch.randn(6, 16))
    yield _shape(merge, "out_b", "out_a's shape", out_b=torch.randn(5, 4, 16))
    yield _shape(merge, "lse_a", "(hq, total_q)", lse_a=torch.randn(6, 4))
    batched = {"out_a": torch.randn(2, 3, 4, 16), "out_b": torch.randn(2, 3, 4, 16)}
    yield _shape(merge, "lse_b", "(b, hq, sq)", **batched, lse_a=torch.randn(2, 4, 3), lse_b=torch.randn(2, 3, 4))


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
