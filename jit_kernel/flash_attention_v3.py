"""FlashAttention-3's functions on every device: the device of `q` decides which implementation serves a call.

Letters in the docstrings: b sequences; hq query heads and hk key/value heads, hq % hk == 0; d the head size of q
and k, dv that of v; sq and sk lengths; total_q and total_k the rows of all sequences, laid end to end. UNBOUNDED is
(-1, -1).

Index tensors lie on q's device, int32, the last stride 1. int64 ones, and a page_table with gaps between its rows, are
copied at each call: 1 us on a CPU, a launch or two on a GPU. An argument that is one integer may also be a number of
numpy or a 0-dim tensor; reading one on a GPU synchronises.

Tensors must lie in memory. A lazily negated view (torch's neg and conj) is resolved, which copies it, and the result
of an asynchronous collective is waited for; neither may be written. TypeError, by name: subclasses without memory of
their own (DTensor), nested, sparse and efficient zero tensors. Fake tensors, make_fx, torch.jit.trace, torch.compile
and torch.export get the operators torch.ops.jit_kernel.*; NotImplementedError, by name: an argument that torch.vmap
batches, torch.func.functionalize wraps, or that has a forward-mode tangent.

Gradients, under torch.func too: those of `flash_attn_func` and `flash_attn_varlen_func`, whose docstring says of which
calls. Every other derivative that is asked for is a NotImplementedError, by name.

What is written, out and a cache that is appended to, shares no byte with another tensor of the call, and none with
itself: ValueError. Slices that lie between each other's rows share none (q, k, v and out of one buffer).

Each function passes its arguments on in the canonical order (jit_kernel/fa3/call.py), as a plain tuple because nothing
is cheaper, as far as the function has any; tests/checks/test_call.py holds the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.device import VENDORS, detect_device, device_target
from jit_kernel.fa3 import entry, seam
from jit_kernel.fa3.call import DENSE, KVCACHE, UNBOUNDED, VARLEN, MetadataParameters

Kernels = Mapping[str, Callable[..., Any]]
Device = torch.device | str | None

# By device: the settings that it was asked under, and the answer. config.reload() makes new settings.
_supported: dict[torch.device | str, tuple[config.Settings, bool]] = {}


def _device_of(device: Device) -> torch.device | str:
    """`device`, or the detected one; "cuda" with the index of the current one."""
    if device is None:
        device = detect_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        if isinstance(device, str) and device.partition(":")[0] in VENDORS:
            return device  # torch knows "musa" only once its extension is imported
        raise ValueError(f"device is {device!r}; it must be a torch.device or its string") from error
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _is_fa3_supported(device: Device = None) -> bool:
    """Whether some implementation serves a device; without one, the first of cuda, musa and cpu present.

    A device that is absent is not supported. The answer is remembered, for each device. Raises ValueError for a
    device that torch does not know.
    """
    found = _device_of(device)
    known = _supported.get(found)
    settings = config.settings()
    if known is None or known[0] is not settings:
        known = _supported[found] = (settings, _ask_support(found))
    return known[1]


def _ask_support(device: torch.device | str) -> bool:
    from jit_kernel.fa3 import dispatch  # with the first call: an import of a public name does not pay for it
    from jit_kernel.fa3.decision import Accepted

    try:
        answers = dispatch.supporting(device_target(device))
    except NotImplementedError:  # a device that is absent, of a kind that nothing serves, or ruled out by a setting
        return False
    return any(isinstance(decision, Accepted) for _, decision in answers)


def _load_fa3_kernels(device: Device = None) -> Kernels:
    """The functions that serve a device, by public name, keyword-only; without one, the detected device's.

    Compiles or loads what the device's family needs, its launcher; variants follow call by call. The mapping is
    immutable and the same for every device; what was loaded is remembered, for each device. Raises
    NotImplementedError when nothing serves the device, and what `jit_kernel.jit.load` raises.
    """
    from jit_kernel.fa3.dispatch import dispatcher

    dispatcher(_device_of(device))
    return seam.FUNCTIONS


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = UNBOUNDED,
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths: softmax(softmax_scale * q @ k.T) @ v for each.

    q: (total_q, hq, d) with cu_seqlens_q (b + 1,), else (b, sq, hq, d); fp32, bf16, fp16 or float8_e4m3fn.
    k, v: (total_k, hk, d or dv) with cu_seqlens_k (b + 1,); (b, sk, hk, d or dv); or (pages, page_size, hk, d or dv)
        with page_table (b, max_pages), which needs seqused_k. Entries of pages without a key that some query sees may
        hold anything: they are not read; but on MUSA every entry up to a sequence's length must name a page. With
        only_qv k is not read and may be None. In q's dtype; beside a q of bf16 or fp16 also float8_e4m3fn, an FP8
        cache: the result is as if they were dequantised to q's dtype.
    max_seqlen_q, max_seqlen_k: at least the longest lengths; None finds them, or a bound on a GPU.
    seqused_q, seqused_k: (b,), only the first so many tokens of each sequence count.
    softmax_scale: default 1/sqrt(d); 1/sqrt(d + dv) with qv; 1/sqrt(dv) with only_qv.
    causal: query i sees key j when j <= i + sk - sq. attention_chunk: keys of the query's own chunk only.
    window_size: (left, right), i + sk - sq - left <= j <= i + sk - sq + right; -1 is unbounded, and so is None, in
        the pair or for it. A list or a CPU tensor of two integers is a pair, too.
    qv: q's shape with dv last, with d = 64 and dv 256 or 512: adds qv @ v.T to q @ k.T; only_qv drops q @ k.T.
    q_descale, k_descale, v_descale: (b, hk) float32, factors of what is float8_e4m3fn; of what is not they are not
        read, as in FlashAttention-3.
    softcap: scores become softcap * tanh(scores / softcap); 0 is off.
    num_splits: ways to split the keys; 1 never splits (bitwise the same in any batch), 0 chooses.
    pack_gqa, sm_margin: hints, None and 0 by default, that no result depends on.
    sinks: (hq,), float32 or q's dtype: one more logit a head in the softmax's denominator, without a value.
    out: where to write; the result's shape and dtype, last stride 1. Rows that no query fills stay untouched.
    draft_mask: (total_q, words) int32, last stride 1, for trees of draft tokens: bit j % 32, the lowest is bit 0, of
        word j // 32 of row i says whether query token i sees the j-th of its sequence's last 32 * words keys, new ones
        included: key sk - 32 * words + j; where that is negative the bit has no key. Older keys are seen; causal,
        window_size and attention_chunk hold besides. Rows lie as q's do, b * sq of them for a q of (b, sq, hq, d).
        Page table entries of keys that it alone hides must name a page.
    k_scale, v_scale: of float8_e4m3fn keys and values, float32, (pages, page_size, hk), (b, sk, hk) or (total_k, hk) as
        k lies, any strides: a factor of each token and head, beside k_descale and v_descale or without them. Those of
        tokens that no query sees may hold anything.

    Returns out, q's shape with dv last, in q's dtype (bf16 for float8_e4m3fn), 0 in rows that see no key or hold no
    query; with return_softmax_lse also lse, float32, natural logarithm, (hq, total_q) or (b, hq, sq). Formulas:
    FlashAttention-3 (Shah et al., 2024), sinks as in gpt-oss.

    Raises ValueError or TypeError that name the argument, for a bad shape, dtype, device, stride or value, before
    anything is launched or written (index tensors' values on the CPU, elsewhere under JIT_KERNEL_CHECK_INDICES=1);
    NotImplementedError, with every implementation's reason, for what the device cannot do, and for a derivative that
    nothing gives; what `jit_kernel.jit.load` raises when a kernel can be neither loaded nor compiled.

    Gradients: q, k, v and sinks may require grad, in fp32, bf16 or fp16, and lse, where it is returned, has one, too.
    The backward pass takes this out and lse; 0 for rows and keys that see nothing and those of no sequence. On a CPU it
    serves every such call, with the same bits for any number of threads; on CUDA what the device's implementations
    have (`python -m jit_kernel why --backward`). NotImplementedError, by name, beside qv, page_table, descales, k_scale
    and v_scale, draft_mask or out, on MUSA, and when gradients are differentiated again. On a GPU
    torch.use_deterministic_algorithms(True) asks for gradients with the same bits from run to run.
    """
    call = (
        VARLEN, q, k, v, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, return_softmax_lse,
        out, sinks, qv, q_descale, k_descale, v_descale, pack_gqa, sm_margin, False, only_qv,
        cu_seqlens_q, max_seqlen_q, seqused_k, page_table, cu_seqlens_k, max_seqlen_k, seqused_q, draft_mask,
        k_scale, v_scale,
    )  # fmt: skip
    return entry.attend(call)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNBOUNDED,
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    draft_mask: Tensor | None = None,
    deterministic: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache of keys and values, to which new ones may be appended first, in place.

    q: (b, sq, hq, d), or (total_q, hq, d) with cu_seqlens_q (b + 1,).
    k_cache, v_cache: (b_cache, sk, hk, d or dv), or (pages, page_size, hk, d or dv) with page_table (b, max_pages).
        Entries of pages without a new key or one that some query sees may hold anything: they are not read; but on
        MUSA every entry up to a sequence's length must name a page. k_cache may be None with only_qv and without k.
    k, v: (b, s_new, hk, d or dv), or (total_new, hk, d or dv) with cu_seqlens_k_new (b + 1,): written to the cache
        behind cache_seqlens, then attended to. cu_seqlens_k_new without k has no meaning and no effect, as in FA3.
        In q's dtype. An FP8 cache beside a q of 16 bits holds them quantised: turned first, divided by
        k_descale * k_scale (v by v_descale * v_scale; 1 where one is None), clamped to +-448 and rounded to nearest,
        ties to even, all in float32 and once. Factors must be positive; k_scale and v_scale hold those of the new
        tokens before the call. New keys and values that are float8_e4m3fn themselves are stored as they are, without
        rotary_cos.
    rotary_cos, rotary_sin: (max_pos, rotary_dim / 2) in q's dtype, rotary_dim a multiple of 16 and at most d: turn q
        and k from position rotary_seqlens (b,), else cache_seqlens, on; pairs (2i, 2i + 1) if rotary_interleaved,
        else (i, i + rotary_dim / 2). q's positions advance by token with causal, window or chunk only. Without
        rotary_cos, rotary_seqlens is not read, as in FA3.
    cache_seqlens: (b,) or one int for all: tokens in the cache before this call; None: all of it.
    cache_batch_idx: (b,), the row of the cache, or of the page table, of each sequence.
    cache_leftpad: (b,), how many of the first tokens of a cache are no keys.
    scheduler_metadata: what `get_scheduler_metadata` made for the same parameters; may be a copy of it. One plan serves
        every layer of a step: max_seqlen_k, window and softcap may differ here, and new keys need not come; on MUSA
        max_seqlen_k may, up to the cache's room.
    num_splits: 0 by default, where `flash_attn_varlen_func` has 1: a heuristic chooses, so that a sequence's last bits
        may depend on the rest of the batch.
    deterministic: a sequence's bits are the same alone and among others, whatever sm_margin is, and from one graph
        replay to the next. Where num_splits is not 1, Hopper cuts keys into ranges by a sequence's own lengths and by
        what a model's calls share, and sums them in their order, at nearly the speed of free splits; it does so in
        calls of at most 64 query rows a sequence, max_seqlen_q * hq / hk (32 beyond head size 128), so the bits are the
        same on either side of that bound, not across it: give max_seqlen_q beside cu_seqlens_q. All others do not
        split the keys of such a call. NotImplementedError on MUSA, which has no such argument: give num_splits=1.

    The other arguments, the result, its formulas and the errors are those of `flash_attn_varlen_func`; ValueError also
    for new keys that the cache has no room for, and for metadata that was made with other parameters.
    """
    call = (
        KVCACHE, q, k_cache, v_cache, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits,
        return_softmax_lse, out, sinks, qv, q_descale, k_descale, v_descale, pack_gqa, sm_margin, deterministic,
        only_qv, cu_seqlens_q, max_seqlen_q, cache_seqlens, page_table, None, None, None, draft_mask,
        k_scale, v_scale, k, v, cu_seqlens_k_new, cache_batch_idx, cache_leftpad,
        rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved, scheduler_metadata,
    )  # fmt: skip
    return entry.attend(call)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = UNBOUNDED,
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of one length: q (b, sq, hq, d), k (b, sk, hk, d), v (b, sk, hk, dv).

    deterministic: of the gradients: the same bits from run to run. On a CPU they always have them, as has the forward
        pass everywhere.
    The other arguments, the result, its formulas and the errors are those of `flash_attn_varlen_func`.
    """
    call = (
        DENSE, q, k, v, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, return_softmax_lse,
        out, sinks, qv, q_descale, k_descale, v_descale, pack_gqa, sm_margin, deterministic,
    )  # fmt: skip
    return entry.attend(call)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = UNBOUNDED,
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """What a `flash_attn_with_kvcache` call with these parameters may reuse, for as long as they hold.

    Arguments as in that call; batch_size is b, headdim is d, headdim_v is dv, qkv_dtype q's dtype or the cache's,
    page_size None without page_table, max_seqlen_k any bound of the cache's lengths, max_seqlen_k_new the new keys,
    which a call may do without.
    Returns an int32 tensor on cache_seqlens's device of FlashAttention-3's length, 1 + 4 numbers for each sequence of b
    rounded up to 4 (24 + 8 b on MUSA), so it may be copied into a static buffer for graph replay. It serves the
    implementation that made it, and the call verifies the parameters that it opens with: on the CPU, elsewhere under
    JIT_KERNEL_CHECK_INDICES=1. Raises ValueError or TypeError that name a bad argument, NotImplementedError where
    nothing serves such a call.
    """
    parameters = MetadataParameters(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype, headdim_v,
        cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size,
        attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    return entry.plan(parameters)


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Combine attention over parts of the keys into attention over all of them.

    out_partial: (splits, b, sq, hq, dv) or (splits, total_q, hq, dv), fp32, bf16 or fp16, last stride 1.
    lse_partial: the same without dv, float32, natural logarithm; -inf where a part held no key, or +inf, which is
        FlashAttention-2's mark for it.
    out: where to write, out_partial's shape without splits. out_dtype: out's, else out_partial's dtype.

    Returns (out, lse): lse = log(sum over parts of exp(lse_partial)), out = sum of exp(lse_partial - lse) *
    out_partial; 0 and -inf where no part held a key. lse has out's shape without dv. Raises ValueError or TypeError
    for a bad argument, by name, and NotImplementedError for an input that requires grad in grad mode or has a tangent.
    """
    return entry.combine(out_partial, lse_partial, out, out_dtype)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys, as the functions above return it, into attention over both.

    out_a, out_b: (total_q, hq, dv) with lse (hq, total_q), or (b, sq, hq, dv) with lse (b, hq, sq).
    lse_a, lse_b: float32, natural logarithm, any strides; -inf where a set held no key, or +inf, which is
        FlashAttention-2's mark for it.

    Returns (out, lse) of the same shapes, out in out_a's dtype; 0 and -inf where neither held a key. A sink must be in
    one of the two alone. Raises ValueError or TypeError for a bad argument, by name, and NotImplementedError for an
    input that requires grad in grad mode or has a tangent.
    """
    return entry.merge(out_a, lse_a, out_b, lse_b)
