"""The checks of an attention call that look at types, shapes, strides, dtypes and devices alone.

Letters as in the public docstrings: b sequences; hq query and hk key/value heads; d and dv the head sizes of
q/k and v; sq, sk lengths. `Facts` is what the other checks and the defaults need to know of the shapes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from jit_kernel.fa3.call import KVCACHE, NAME_OF, Call, batch_of, default_scale, result_dtype
from jit_kernel.fa3.checks import dtypes
from jit_kernel.fa3.checks.forms import unread_fields
from jit_kernel.fa3.checks.values import (
    INPUT_DTYPES,
    MAX_DRAFT_WORDS,
    is_kernel_index,
    need_absent,
    need_bool,
    need_contiguous,
    need_device,
    need_dims,
    need_dtype,
    need_index,
    need_present,
    need_shape,
    need_tensor,
    need_unit_stride,
    need_writable,
)

_BOOLS = ("causal", "rotary_interleaved", "only_qv", "deterministic", "return_softmax_lse")
_QV_HEAD_DIM, _QV_HEAD_DIMS_V = 64, (256, 512)  # MLA in its absorbed form


@dataclass(frozen=True)
class Facts:
    """The sizes of a call whose shapes fit together."""

    batch: int
    q_rows: int  # total_q with cu_seqlens_q, else sq
    k_rows: int  # total_k with cu_seqlens_k; else the most keys that one sequence may have
    page_size: int  # 0: not paged
    pages: int
    cache_rows: int  # what cache_batch_idx may name: rows of the cache, or of the page table
    new_rows: int  # total_new with cu_seqlens_k_new, else s_new; 0 without new keys
    rotary_rows: int  # positions that the rotary tables hold
    scale: float  # the default softmax_scale
    scale_of_qv: float | None  # the same with only_qv; None without qv
    indexed: bool  # some index tensor was given
    on_host: bool
    converted: tuple[str, ...]  # the fields of index tensors that kernels do not take as they are
    unread: tuple[str, ...]  # the fields that were given and have no effect


def check(call: Call) -> Facts:
    """Check the types and shapes of one call's arguments. Raises TypeError or ValueError."""
    names = NAME_OF[call.function]
    k_name, v_name = names.get("k", "k"), names.get("v", "v")
    _check_types(call)
    q = need_tensor("q", call.q)
    k, v = need_tensor(k_name, call.k), need_tensor(v_name, call.v)
    need_dtype("q", q, INPUT_DTYPES)
    dtypes.check_keys(q, k, v, k_name, v_name)
    for name, tensor in ((k_name, k), (v_name, v)):
        need_device(name, tensor, q.device)
    batch = _check_queries(call, q)
    _check_heads(q, k, v, k_name, v_name)
    k_rows, cache_rows = _check_keys(call, q, k, v, batch, k_name, v_name)
    _check_used(call, q, batch)
    of_cache = call.function == KVCACHE
    new_rows = _check_append(call, q, k, v, batch) if of_cache else 0
    rotary_rows = _check_rotary(call, q) if of_cache else 0
    _check_qv(call, q, v)
    _check_extras(call, q, k, v, batch)
    paged = call.page_table is not None
    qv = call.qv
    return Facts(
        batch=batch,
        q_rows=q.shape[0] if call.cu_seqlens_q is not None else q.shape[1],
        k_rows=k_rows,
        page_size=k.shape[1] if paged else 0,
        pages=k.shape[0] if paged else 0,
        cache_rows=cache_rows,
        new_rows=new_rows,
        rotary_rows=rotary_rows,
        scale=default_scale(q, qv, only_qv=False),
        scale_of_qv=None if qv is None else default_scale(q, qv, only_qv=True),
        indexed=any(tensor is not None for tensor in _index_tensors(call)),
        on_host=q.device.type == "cpu",
        converted=tuple(
            name for name in INDEX_FIELDS if (x := getattr(call, name)) is not None and not _is_kernel_index(x)
        ),
        unread=unread_fields(call),
    )


def _is_kernel_index(value: object) -> bool:
    return not isinstance(value, Tensor) or is_kernel_index(value)


_LENGTHS = ("seqused_q", "seqused_k", "cache_batch_idx", "cache_leftpad", "rotary_seqlens")  # one number a sequence
INDEX_FIELDS = ("cu_seqlens_q", "cu_seqlens_k", "page_table", "cu_seqlens_k_new", *_LENGTHS)
_index_tensors = operator.attrgetter(*INDEX_FIELDS)


def _check_types(call: Call) -> None:
    for name in _BOOLS:
        need_bool(name, getattr(call, name))
    if call.pack_gqa is not None:
        need_bool("pack_gqa", call.pack_gqa)


def _check_queries(call: Call, q: Tensor) -> int:
    """q and cu_seqlens_q; returns the batch size."""
    cu_seqlens_q = call.cu_seqlens_q
    if cu_seqlens_q is None:
        need_dims("q", q, "(b, sq, hq, d)")
    else:
        need_dims("q", q, "(total_q, hq, d)")
        _need_offsets("cu_seqlens_q", cu_seqlens_q, None, q.device)
    need_unit_stride("q", q)
    return batch_of(call)


def _need_offsets(name: str, value: object, batch: int | None, device: torch.device) -> None:
    tensor = need_index(name, value, None if batch is None else (batch + 1,), "(b + 1,)", device)
    if tensor.shape[0] < 1:
        raise ValueError(f"{name} has shape (0,); it must be (b + 1,), which holds at least one number")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    for name, tensor in (("q", q), (k_name, k), (v_name, v)):
        if tensor.dim() < 3 or 0 in tensor.shape[-2:]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must end in (heads, head size), both at least 1"
            )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; it must be a multiple of {k_name}'s {kv_heads} heads")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} has head size {k.shape[-1]}; it must be q's, {q.shape[-1]}")
    if v.shape[-2] != kv_heads:
        raise ValueError(f"{v_name} has {v.shape[-2]} heads; it must have as many as {k_name}, {kv_heads}")


def _check_keys(call: Call, q: Tensor, k: Tensor, v: Tensor, batch: int, k_name: str, v_name: str) -> tuple[int, int]:
    """k and v in their three layouts; returns the most keys of a sequence and the rows of the cache."""
    page_table, cu_seqlens_k = call.page_table, call.cu_seqlens_k
    batch_idx = call.cache_batch_idx
    if page_table is not None:
        need_absent("cu_seqlens_k", cu_seqlens_k, "with page_table: pages have lengths in seqused_k")
        need_present(NAME_OF[call.function].get("seqused_k", "seqused_k"), call.seqused_k, "with page_table")
        form = "(pages, page_size, hk, {})"
        need_dims(k_name, k, form.format("d"))
        rows = None if batch_idx is not None else batch
        table = need_index("page_table", page_table, None, "(b, max_pages)", q.device)
        if rows is not None:
            need_shape("page_table", table, (rows, table.shape[1]), "(b, max_pages)")
        if k.shape[1] < 1:
            raise ValueError(f"{k_name} has shape {tuple(k.shape)}; its page_size must be at least 1")
        found = table.shape[1] * k.shape[1], table.shape[0]
    elif cu_seqlens_k is not None:
        form = "(total_k, hk, {})"
        need_dims(k_name, k, form.format("d"))
        _need_offsets("cu_seqlens_k", cu_seqlens_k, batch, q.device)
        found = k.shape[0], 0
    else:
        form = "(b_cache, sk, hk, {})" if batch_idx is not None else "(b, sk, hk, {})"
        need_dims(k_name, k, form.format("d"))
        if batch_idx is None and k.shape[0] != batch:
            raise ValueError(
                f"{k_name} has shape {tuple(k.shape)}; it must be {form.format('d')} with b = {batch}, as q has"
            )
        found = k.shape[1], k.shape[0]
    need_shape(v_name, v, (*k.shape[:-1], v.shape[-1]), form.format("dv"))
    need_unit_stride(k_name, k)
    need_unit_stride(v_name, v)
    return found


def _check_used(call: Call, q: Tensor, batch: int) -> None:
    """Every index tensor that holds one number a sequence."""
    for name in _LENGTHS:
        value = getattr(call, name)
        shown = NAME_OF[call.function].get(name, name)
        if value is not None and not (shown == "cache_seqlens" and isinstance(value, int)):
            need_index(shown, value, (batch,), "(b,)", q.device)


def _check_append(call: Call, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: int) -> int:
    """New keys and values; returns how many rows they have."""
    offsets = call.cu_seqlens_k_new
    if offsets is not None:
        # Serving engines pass it with every call: without new keys it has no meaning, as in FA3.
        _need_offsets("cu_seqlens_k_new", offsets, batch, q.device)
    if call.k_new is None:
        need_absent("v", call.v_new, "without k")
        return 0
    need_present("v", call.v_new, "with k: new keys and values are appended together")
    need_present("cache_seqlens", call.seqused_k, "with k: it says where new keys are appended")
    k, v = need_tensor("k", call.k_new), need_tensor("v", call.v_new)
    form = "(b, s_new, hk, {})" if offsets is None else "(total_new, hk, {})"
    dtypes.check_new(q, k_cache, k, v)
    for name, new, cache, size in (("k", k, k_cache, "d"), ("v", v, v_cache, "dv")):
        need_device(name, new, q.device)
        need_dims(name, new, form.format(size))
        lead = new.shape[:1] if offsets is not None else (batch, new.shape[1])
        need_shape(name, new, (*lead, *cache.shape[-2:]), form.format(size))
        need_unit_stride(name, new)
    if v.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must have as many rows as k, {tuple(k.shape)}")
    need_writable("k_cache", k_cache)
    need_writable("v_cache", v_cache)
    return int(k.shape[0] if offsets is not None else k.shape[1])


def _check_rotary(call: Call, q: Tensor) -> int:
    """The rotary tables; returns how many positions they hold."""
    if call.rotary_cos is None:
        need_absent("rotary_sin", call.rotary_sin, "without rotary_cos")
        return 0
    need_present("rotary_sin", call.rotary_sin, "with rotary_cos")
    need_present("k", call.k_new, "with rotary_cos: the rotation applies to q and to new keys")
    need_dtype("k", need_tensor("k", call.k_new), (q.dtype,), ", the dtype of q, with rotary_cos")
    cos, sin = need_tensor("rotary_cos", call.rotary_cos), need_tensor("rotary_sin", call.rotary_sin)
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        need_dtype(name, table, (q.dtype,), ", the dtype of q")
        need_device(name, table, q.device)
        need_dims(name, table, "(max_pos, rotary_dim / 2)")
        need_unit_stride(name, table)
    need_shape("rotary_sin", sin, cos.shape, "rotary_cos's shape")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % 16 or not 16 <= rotary_dim <= q.shape[-1]:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)}, a rotary_dim of {rotary_dim}; "
            f"rotary_dim must be a multiple of 16 and at most d = {q.shape[-1]}"
        )
    return int(cos.shape[0])


def _check_qv(call: Call, q: Tensor, v: Tensor) -> None:
    if call.qv is None:
        return
    qv = need_tensor("qv", call.qv)
    need_dtype("qv", qv, (q.dtype,), ", the dtype of q")
    need_device("qv", qv, q.device)
    need_shape("qv", qv, (*q.shape[:-1], v.shape[-1]), "q's shape with dv in the last place")
    need_unit_stride("qv", qv)
    if q.shape[-1] != _QV_HEAD_DIM or v.shape[-1] not in _QV_HEAD_DIMS_V:
        raise ValueError(
            f"qv is given with head sizes d = {q.shape[-1]} and dv = {v.shape[-1]}; "
            f"it must be d = {_QV_HEAD_DIM} and dv = 256 or 512"
        )


def _check_extras(call: Call, q: Tensor, k: Tensor, v: Tensor, batch: int) -> None:
    """Scales, sinks, draft_mask, scheduler_metadata and out."""
    dtypes.check_scales(call, q, k, batch)
    if call.sinks is not None:
        sinks = need_tensor("sinks", call.sinks)
        need_dtype("sinks", sinks, (torch.float32, q.dtype))
        need_device("sinks", sinks, q.device)
        need_shape("sinks", sinks, (q.shape[-2],), "(hq,)")
        need_contiguous("sinks", sinks)
    if call.draft_mask is not None:
        _check_draft_mask(call, q)
    if call.scheduler_metadata is not None:
        need_index("scheduler_metadata", call.scheduler_metadata, None, "(n,)", q.device)
    if call.out is not None:
        out = need_tensor("out", call.out)
        need_dtype("out", out, (result_dtype(q.dtype),), ", the dtype of the result")
        need_device("out", out, q.device)
        need_shape("out", out, (*q.shape[:-1], v.shape[-1]), "q's shape with dv in the last place")
        need_unit_stride("out", out)
        need_writable("out", out)


def _check_draft_mask(call: Call, q: Tensor) -> None:
    """A bit mask: int32 alone, as the bits of an int64 would be other keys'."""
    mask = need_tensor("draft_mask", call.draft_mask)
    need_dtype("draft_mask", mask, (torch.int32,), ", whose 32 bits are keys")
    need_device("draft_mask", mask, q.device)
    need_dims("draft_mask", mask, "(total_q, words)")
    rows, words = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1], mask.shape[1]
    need_shape("draft_mask", mask, (rows, words), "(total_q, words)")
    if not 1 <= words <= MAX_DRAFT_WORDS:
        most = MAX_DRAFT_WORDS
        raise ValueError(
            f"draft_mask has shape {tuple(mask.shape)}; it must be (total_q, words), words between 1 and {most}"
        )
    need_unit_stride("draft_mask", mask)
