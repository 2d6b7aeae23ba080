"""What can be wrong with a call's tensors and numbers, before any index is read, and the error that comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.valid_calls import (
    FUNCTIONS,
    Call,
    cache,
    dense,
    fp8,
    fp8_cache,
    ints,
    metadata,
    mla,
    paged,
    paged_cache,
    plain_cache,
    plain_dense,
    plain_varlen,
    varlen,
)

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


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps in the last dimension."""
    wider = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
    wider[..., ::2] = tensor
    return wider[..., ::2]


def put(name: str, new: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
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
                put(name, lambda _: "text"),
                TypeError,
                "must be an int" if number else "must be a torch.Tensor",
            )
            if value.dim() > 1 and value.dtype != torch.float8_e4m3fn:
                yield Malformed(base, name, put(name, Tensor.to_sparse), TypeError, "dense")
            if name not in _OWNERS and base is not metadata:
                yield Malformed(base, name, put(name, lambda t: t.to("meta")), ValueError, "device")
            wrong = torch.int16 if value.dtype == torch.int32 else torch.float64
            yield Malformed(base, name, put(name, lambda t, wrong=wrong: t.to(wrong)), ValueError, "dtype")
            yield Malformed(base, name, put(name, lambda t: t[None]), ValueError, "shape")
            if "lse" not in name and not name.endswith("scale"):
                yield Malformed(base, name, put(name, strided), ValueError, "stride")


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
    yield Malformed(cache, "deterministic", lambda _: {"deterministic": 1}, TypeError, "must be a bool")
    yield Malformed(cache, "rotary_interleaved", lambda _: {"rotary_interleaved": 1}, TypeError, "must be a bool")
    yield Malformed(mla, "only_qv", lambda _: {"only_qv": 1}, TypeError, "must be a bool")
    for value in (-1, 17, 2**40):
        yield Malformed(cache, "cache_seqlens", lambda _, v=value: {"cache_seqlens": v}, ValueError, f"is {value};")
    yield Malformed(cache, "cache_seqlens", lambda _: {"cache_seqlens": True}, TypeError, "must be an int")
    yield Malformed(cache, "cache_seqlens", lambda _: {"cache_seqlens": 14}, ValueError, "too short")


def wrong_shape(base: Callable[[], Call], named: str, says: str, **new: Any) -> Malformed:
    return Malformed(base, named, lambda _: new, ValueError, says)


def of_shapes() -> Iterator[Malformed]:
    """Arguments that are well formed each and do not go together."""
    yield wrong_shape(dense, "q", "multiple of k's 2 heads", q=torch.randn(2, 5, 3, 32))
    yield wrong_shape(dense, "q", "at least 1", q=torch.randn(2, 5, 0, 32))
    yield wrong_shape(dense, "k", "at least 1", k=torch.randn(2, 7, 2, 0))
    yield wrong_shape(dense, "k", "head size 24", k=torch.randn(2, 7, 2, 24))
    yield wrong_shape(dense, "k", "b = 2", k=torch.randn(3, 7, 2, 32))
    yield wrong_shape(dense, "v", "4 heads", v=torch.randn(2, 7, 4, 16))
    yield wrong_shape(dense, "v", "(b, sk, hk, dv)", v=torch.randn(2, 6, 2, 16))
    yield wrong_shape(dense, "sinks", "(hq,)", sinks=torch.randn(2))
    yield wrong_shape(dense, "out", "dv", out=torch.randn(2, 5, 4, 32))
    yield wrong_shape(dense, "out", "expanded", out=torch.randn(2, 1, 4, 16).expand(2, 5, 4, 16))
    yield wrong_shape(dense, "k", "at most 2147483647", k=torch.randn(1, 1, 2, 32).expand(2, 2**31, 2, 32))
    for name in ("q", "k", "v"):
        yield Malformed(
            dense, "out", lambda call, n=name: sharing(call, n), ValueError, f"shares its memory with {name}"
        )
    yield wrong_shape(varlen, "cu_seqlens_q", "at least one", cu_seqlens_q=ints())
    yield wrong_shape(varlen, "cu_seqlens_k", "(b + 1,)", cu_seqlens_k=ints(0, 12))
    yield wrong_shape(varlen, "seqused_q", "(b,)", seqused_q=ints(1, 2, 3))
    yield wrong_shape(varlen, "q", "(b, sq, hq, d)", cu_seqlens_q=None)
    yield wrong_shape(varlen, "k", "(b, sk, hk, d)", cu_seqlens_k=None)
    yield wrong_shape(paged, "cu_seqlens_k", "with page_table", cu_seqlens_k=ints(0, 1, 2))
    yield wrong_shape(paged, "seqused_k", "with page_table", seqused_k=None)
    yield wrong_shape(paged, "page_table", "max_pages", page_table=ints(1, 2, 3).reshape(1, 3))
    yield wrong_shape(paged, "k", "page_size", k=torch.randn(6, 0, 2, 32), v=torch.randn(6, 0, 2, 32))
    yield wrong_shape(cache, "v", "with k", v=None)
    yield wrong_shape(cache, "v", "without k", k=None)
    yield wrong_shape(cache, "cache_seqlens", "appended", cache_seqlens=None)
    yield wrong_shape(cache, "k", "(b, s_new, hk, d)", k=torch.randn(2, 3, 2, 16))
    yield wrong_shape(cache, "v", "as many rows", v=torch.randn(2, 2, 2, 32))
    yield wrong_shape(cache, "k_cache", "expanded", k_cache=torch.randn(1, 16, 2, 32).expand(3, 16, 2, 32))
    yield wrong_shape(cache, "v_cache", "expanded", v_cache=torch.randn(3, 1, 2, 32).expand(3, 16, 2, 32))
    yield wrong_shape(cache, "rotary_sin", "with rotary_cos", rotary_sin=None)
    yield wrong_shape(cache, "rotary_sin", "without rotary_cos", rotary_cos=None)
    yield wrong_shape(cache, "k", "new keys", k=None, v=None)
    yield wrong_shape(cache, "rotary_sin", "rotary_cos's shape", rotary_sin=torch.randn(19, 8))
    for half in (0, 4, 12, 24):
        table = torch.randn(20, half)
        yield wrong_shape(cache, "rotary_cos", "multiple of 16", rotary_cos=table, rotary_sin=table)
    for rows in (2, 5):
        yield wrong_shape(cache, "draft_mask", "(total_q, words) = (4, 1)", draft_mask=torch.zeros(rows, 1).int())
    yield wrong_shape(paged_cache, "draft_mask", "(total_q, words) = (3, 2)", draft_mask=torch.zeros(2, 2).int())
    for words in (0, 2**20 + 1):
        mask = torch.zeros(1, words).int().expand(4, words)
        yield wrong_shape(cache, "draft_mask", "words between 1 and 1048576", draft_mask=mask)
    yield wrong_shape(cache, "draft_mask", "whose 32 bits are keys", draft_mask=torch.zeros(4, 1).long())
    yield wrong_shape(fp8, "k_descale", "(b, hk)", k_descale=torch.ones(2, 4))
    yield from _of_fp8_caches()
    yield wrong_shape(fp8, "out", "bfloat16", out=torch.randn(2, 4, 4, 32).half())
    yield wrong_shape(mla, "qv", "with only_qv", qv=None)
    yield wrong_shape(mla, "qv", "dv in the last place", qv=torch.randn(1, 2, 4, 512).bfloat16())
    small = torch.randn(1, 2, 4, 32).bfloat16()
    yield wrong_shape(mla, "qv", "d = 32", q=small, k=torch.randn(1, 8, 1, 32).bfloat16())


def _of_fp8_caches() -> Iterator[Malformed]:
    """dtypes that do not go together, and token scales that belong to other keys."""
    codes = torch.randn(6, 4, 2, 32).to(torch.float8_e4m3fn)
    half, other = codes.bfloat16(), codes.half()
    both = "it must be bfloat16 or float8_e4m3fn, the dtype of q or the one of an FP8 cache"
    yield wrong_shape(fp8_cache, "k_cache", f"dtype float16; {both}", k_cache=other)
    yield wrong_shape(fp8_cache, "v_cache", "must be float8_e4m3fn, the dtype of k_cache", v_cache=half)
    yield wrong_shape(fp8_cache, "v_cache", "must be bfloat16, the dtype of q and k_cache", k_cache=half)
    yield wrong_shape(fp8_cache, "k_cache", "must be float32, the dtype of q", q=torch.randn(2, 3, 4, 32))
    q8 = torch.randn(2, 3, 4, 32).to(torch.float8_e4m3fn)
    yield wrong_shape(fp8_cache, "k_cache", "must be float8_e4m3fn, the dtype of q", q=q8, k_cache=half)
    yield wrong_shape(fp8_cache, "k", "must be float8_e4m3fn, the dtype of q", q=q8)
    new = torch.randn(2, 2, 2, 32)
    for wrong in (new, new.half()):
        yield wrong_shape(fp8_cache, "k", "bfloat16 or float8_e4m3fn, the dtype of q or of k_cache", k=wrong, v=wrong)
    stored = new.to(torch.float8_e4m3fn)
    yield wrong_shape(fp8_cache, "v", "must be bfloat16, the dtype of k", v=stored)
    yield wrong_shape(fp8_cache, "v", "must be float8_e4m3fn, the dtype of k", k=stored)
    table = torch.randn(20, 8).bfloat16()
    turned = {"rotary_cos": table, "rotary_sin": table}
    yield wrong_shape(fp8_cache, "k", "the dtype of q, with rotary_cos", k=stored, v=stored, **turned)
    scale = torch.ones(6, 4, 2)
    codes3 = {name: torch.randn(3, 16, 2, 32).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    dense3 = codes3 | {"page_table": None, "cache_batch_idx": ints(2, 0), "k_scale": None}
    for name in ("k_scale", "v_scale"):
        for shape in ((6, 4, 1), (5, 4, 2), (2, 12, 2)):
            yield wrong_shape(fp8_cache, name, "(pages, page_size, hk)", **{name: torch.ones(shape)})
        alone = {"k_scale": None, "k_cache": half, "v_cache": half} | {name: scale}
        yield wrong_shape(fp8_cache, name, "must be None unless they are float8_e4m3fn", **alone)
        yield wrong_shape(cache, name, "must be None unless they are float8_e4m3fn", **{name: torch.ones(3, 16, 2)})
        yield wrong_shape(fp8_cache, name, "(b_cache, sk, hk)", **(dense3 | {name: torch.ones(2, 16, 2)}))
    rows = {name: torch.randn(12, 2, 32).to(torch.float8_e4m3fn) for name in "kv"}
    ragged = rows | {"q": torch.randn(9, 4, 32).half(), "out": None}
    yield wrong_shape(varlen, "v_scale", "(total_k, hk) = (12, 2)", **ragged, v_scale=torch.ones(2, 12))
    yield wrong_shape(fp8_cache, "k_descale", "(b, hk)", k_descale=torch.ones(2, 4))


def sharing(call: Call, name: str) -> Call:
    """One memory for `name` and for out."""
    memory = torch.randn(4096)
    out, other = call["out"], call[name]
    return {"out": memory[: out.numel()].view(out.shape), name: memory[: other.numel()].view(other.shape)}
