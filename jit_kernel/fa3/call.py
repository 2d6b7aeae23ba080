"""One call in its canonical form: the names that everything below the public functions uses.

The public functions name some arguments by where they come from: `k_cache` is the keys, `k` beside it new keys, and
`cache_seqlens` says how many keys count. Here each thing has one name, whichever function was called.

The public functions pass the fields of a `Call` on as a plain tuple, in its order: that costs 0.1 us, a `Call` with
slots 0.6, by keyword 2, as a frozen dataclass 4. What serves a call without looking at everything takes the tuple; the
checks make a `Call` of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, Tensor]
Arguments = tuple[Any, ...]  # the first fields of a `Call`, in its order; the rest has its defaults

VARLEN, KVCACHE, DENSE = "flash_attn_varlen_func", "flash_attn_with_kvcache", "flash_attn_func"

_OF_KVCACHE = {"k_cache": "k", "v_cache": "v", "k": "k_new", "v": "v_new", "cache_seqlens": "seqused_k"}
# By public function: the field of a `Call` that holds an argument, where it has another name.
FIELD_OF: Mapping[str, Mapping[str, str]] = MappingProxyType({VARLEN: {}, KVCACHE: _OF_KVCACHE, DENSE: {}})
# The other way round: what a field is called in error texts.
NAME_OF: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {function: {name: argument for argument, name in of.items()} for function, of in FIELD_OF.items()}
)


# The window of most calls; to compare with it by identity saves 0.1 us.
UNBOUNDED = (-1, -1)


@dataclass(slots=True)
class Call:
    """One attention call. Shapes and meanings are those of the public functions' docstrings.

    The checks replace softmax_scale, window_size, attention_chunk, max_seqlen_q, max_seqlen_k and an int seqused_k by
    what they stand for; below the checks nothing resolves them again.
    """

    function: str  # the public function's name
    q: Tensor
    k: Tensor  # the keys: raw, cached or in pages
    v: Tensor
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    attention_chunk: int | None
    softcap: float
    num_splits: int
    return_softmax_lse: bool
    out: Tensor | None
    sinks: Tensor | None
    qv: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    pack_gqa: bool | None
    sm_margin: int
    deterministic: bool = False  # flash_attn_func's has no meaning: see is_deterministic
    only_qv: bool = False
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None
    seqused_k: Tensor | int | None = None  # the keys that count, of the cache those before this call
    page_table: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None
    draft_mask: Tensor | None = None
    k_scale: Tensor | None = None  # one number a token and head, beside or instead of the descales
    v_scale: Tensor | None = None
    k_new: Tensor | None = None  # appended to the cache, then attended to
    v_new: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    rotary_interleaved: bool = True
    scheduler_metadata: Tensor | None = None
    # Not an argument: calls with one number other than 0 have the same arguments but for numbers, addresses and what
    # tensors hold: which there are, their shapes, strides, dtypes and devices. Who replaces a tensor sets it to 0.
    layouts: int = field(default=0, init=False, compare=False)


_ARGUMENTS = tuple(each for each in fields(Call) if each.init)
FIELDS = tuple(each.name for each in _ARGUMENTS)
DEFAULTS = tuple(each.default for each in _ARGUMENTS)
OF_DENSE = FIELDS.index("only_qv")  # how many fields a call of flash_attn_func has


def of(function: str, arguments: Mapping[str, object]) -> Arguments:
    """The fields of the call of a public function, by its arguments' public names."""
    names = NAME_OF[function]
    given = (arguments.get(names.get(field, field), default) for field, default in zip(FIELDS, DEFAULTS, strict=True))
    return (function, *itertools.islice(given, 1, None))


def batch_of(call: Call) -> int:
    """How many sequences a call has."""
    offsets = call.cu_seqlens_q
    return int(call.q.shape[0] if offsets is None else offsets.shape[0] - 1)


def is_deterministic(call: Call) -> bool:
    """Whether a sequence's bits must not depend on the others: FlashAttention-3's own argument is about gradients."""
    return call.deterministic and call.function == KVCACHE


def splits_of(call: Call) -> int:
    """num_splits for kernels whose choice depends on the batch: they do not split a deterministic call's keys."""
    return 1 if is_deterministic(call) else call.num_splits


def mask_bounds(call: Call) -> tuple[int, int]:
    """(left, right) of the window, -1 for unbounded; a causal mask is a right bound of 0."""
    left, right = call.window_size
    return left, 0 if call.causal else right


def default_scale(q: Tensor, qv: Tensor | None, *, only_qv: bool) -> float:
    """1/sqrt(d), with qv 1/sqrt(d + dv), with only_qv 1/sqrt(dv)."""
    size = 0 if qv is None else qv.shape[-1]
    return 1.0 / math.sqrt(size if only_qv else q.shape[-1] + size)


def lse_shape(rows: Tensor) -> tuple[int, ...]:
    """The shape of the lse that goes with q or a result: (hq, total_q), or (b, hq, sq)."""
    *lead, heads, _ = rows.shape
    return (*lead[:-1], heads, lead[-1])


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result for inputs of `dtype`."""
    return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype


def new_result(call: Call) -> Tensor:
    """Memory for the result of a call without `out`, on q's device, whatever the default device is."""
    q, head_dim_v = call.q, call.v.shape[-1]
    dtype = result_dtype(q.dtype)
    if head_dim_v == q.shape[-1]:  # 1.4 us less than from a shape
        return torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty((*q.shape[:-1], head_dim_v), dtype=dtype, device=q.device)


def new_lse(call: Call) -> Tensor | None:
    """Memory for the lse of a call, None where it was not asked for."""
    if not call.return_softmax_lse:
        return None
    return torch.empty(lse_shape(call.q), dtype=torch.float32, device=call.q.device)


# So many packed query rows, tokens x query heads of a key head, are few.
FEW_ROWS = 64
# Rows of an e4m3 cache become 16 bits ahead of the attention kernel where a sequence has so many query rows on the
# average, and in no more memory than this.
WIDE_ROWS = 256
WIDE_BYTES = 2 << 30
_MOST_WIDE_BATCH = 65535  # of the kernel's grid


def has_many_rows(call: Call) -> bool:
    """Whether a sequence of a call over an e4m3 cache may have more than FEW_ROWS packed query rows.

    Never with num_splits=1, where a sequence's bits must not depend on its neighbours, nor with a plan, which is for
    one implementation.
    """
    if call.k.dtype is not torch.float8_e4m3fn or call.num_splits == 1 or call.scheduler_metadata is not None:
        return False
    rows = (call.max_seqlen_q or 0) * (call.q.shape[-2] // call.k.shape[-2])
    return has_cache(call) and call.qv is None and rows > FEW_ROWS


def widens(call: Call) -> bool:
    """Whether a call over an e4m3 cache has many rows, and its cache can become 16 bits ahead of the attention kernel.

    By shapes alone. Not where a sequence must not depend on its neighbours, nor with factors of tokens, which a row of
    16 bits would round.
    """
    if not has_many_rows(call) or is_deterministic(call) or call.k_scale is not None or call.v_scale is not None:
        return False
    heads_k = call.k.shape[-2]
    batch = batch_of(call)
    tokens = call.q.shape[0] if call.cu_seqlens_q is not None else batch * call.q.shape[1]
    if tokens * (call.q.shape[-2] // heads_k) < WIDE_ROWS * batch or batch > _MOST_WIDE_BATCH:
        return False
    return 2 * batch * wide_rows(call) * heads_k * (call.q.shape[-1] + call.v.shape[-1]) <= WIDE_BYTES


def wide_rows(call: Call) -> int:
    """For how many rows of a cache a sequence needs room where they become 16 bits."""
    rows: int = call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    if call.function == VARLEN and call.max_seqlen_k is not None:  # a cache of VARLEN has neither padding nor new keys
        return min(rows, call.max_seqlen_k)
    return rows


def has_cache(call: Call) -> bool:
    """Whether a call's keys lie in a cache, a dense one or one of pages."""
    return call.function == KVCACHE or call.page_table is not None


@dataclass(frozen=True)
class MetadataParameters:
    """The arguments of `get_scheduler_metadata`; two with equal numbers are equal, whatever their tensors hold."""

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    cache_seqlens: Tensor = field(compare=False, repr=False)
    qkv_dtype: torch.dtype = torch.bfloat16
    headdim_v: int | None = None
    cu_seqlens_q: Tensor | None = field(default=None, compare=False, repr=False)
    cu_seqlens_k_new: Tensor | None = field(default=None, compare=False, repr=False)
    cache_leftpad: Tensor | None = field(default=None, compare=False, repr=False)
    page_size: int | None = None
    max_seqlen_k_new: int = 0
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int | None = 0
    has_softcap: bool = False
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0

    def arguments(self) -> dict[str, object]:
        """Every parameter by its name in `get_scheduler_metadata`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


# The way of an unchecked call that needs neither the checks nor the dispatch, which an import of the public functions
# does not import. `dispatch` sets it once a device is loaded whose implementation looks at the arguments itself.
try_unchecked: Callable[[Arguments], Result | None] | None = None
