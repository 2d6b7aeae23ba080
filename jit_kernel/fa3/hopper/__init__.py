"""The Hopper implementation: kernels for sm_90a in CUDA C++ with raw PTX.

bf16 and fp16, head sizes up to 256 that are multiples of 8. Dense and ragged prefill, also in e4m3 with head sizes that
are multiples of 16; over caches, in pages or dense, prefill and decode, with new keys appended first, and with draft
masks; a cache in e4m3 beside queries in 16 bit or in e4m3. With qv (MLA) over caches, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import (
    FEW_ROWS,
    WIDE_BYTES,
    WIDE_ROWS,
    Call,
    MetadataParameters,
    Result,
    has_cache,
    has_many_rows,
    widens,
)
from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.features import Features, asks_for_more, mixed_dtypes, unclaimed
from jit_kernel.fa3.hopper import append, cached, decode, kernels, known, mla, prefill, widened
from jit_kernel.jit import KernelSpec

NAME = "hopper"
ARCHITECTURE = "sm_90a"
FUNCTIONS = (calls.VARLEN, calls.KVCACHE, calls.DENSE)
try_unchecked = known.try_unchecked
# What a call may ask for, by the names of features.ARGUMENTS: `decide` and `try_known` reject the rest. Without a
# cache keys are not split.
CLAIMED = frozenset(
    ("ragged_q", "ragged_k", "seqused_q", "seqused_k", "causal", "window", "chunk", "softcap", "sinks", "lse",
     "deterministic")
)  # fmt: skip
CLAIMED_IN_FP8 = CLAIMED | {"descale"}
CLAIMED_WITH_CACHE = CLAIMED - {"ragged_k"} | frozenset(
    (
        *("page_size", "append", "ragged_append", "rotary", "cache_batch_idx", "cache_leftpad"),
        *("split", "metadata", "draft_mask", "qv", "only_qv"),
    )
)
# Of a cache in e4m3 beside queries of 16 bits or in e4m3.
_SCALES = frozenset(("descale", "token_scales"))
_QV = frozenset(("qv", "only_qv"))
CLAIMED_MIXED = CLAIMED_WITH_CACHE - _QV | _SCALES
# The same with qv: keys and values of a token have no factors. Of queries in e4m3 nothing is appended.
CLAIMED_MIXED_QV = CLAIMED_WITH_CACHE | {"descale"}
CLAIMED_E4M3_QV = CLAIMED_MIXED_QV - {"append", "ragged_append", "rotary"}
_UNALIGNED = "strides or addresses that are no multiple of the copy engine's 16 bytes"
# What a faster way takes of these: an append is a launch that must not be lost where the next one is declined.
_KNOWN_WITH_CACHE = CLAIMED_WITH_CACHE - {"append", "ragged_append", "rotary", "metadata"}

_KNOWN_MIXED = _KNOWN_WITH_CACHE & CLAIMED_MIXED | _SCALES
_KNOWN_MIXED_QV = _KNOWN_WITH_CACHE | {"descale"}

_FP8 = torch.float8_e4m3fn

_asks_for_more = asks_for_more(CLAIMED)
_fp8_asks_for_more = asks_for_more(CLAIMED_IN_FP8)
_cache_asks_for_more = asks_for_more(_KNOWN_WITH_CACHE)
_mixed_asks_for_more = asks_for_more(_KNOWN_MIXED)
_mixed_qv_asks_for_more = asks_for_more(_KNOWN_MIXED_QV)


def supports(target: Target) -> Decision:
    """NVIDIA GPUs of compute capability 9.0 alone: wgmma and setmaxnreg exist nowhere else."""
    if target.vendor != "cuda" or target.architecture != ARCHITECTURE:
        return Rejected(f"it serves cuda:{ARCHITECTURE}, not {target}", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """bf16 and fp16, head sizes that are multiples of 8 up to 256, rows that the copy engine can reach; e4m3, too, in
    multiples of 16."""
    fp8 = features.dtype == "e4m3"
    if not fp8 and features.dtype not in kernels.DTYPES:
        return Rejected(f"dtype {features.dtype}: it computes in bf16, fp16 and e4m3", claimed=False)
    mixed = mixed_dtypes(features)
    if mixed is not None and not features.cache:
        return Rejected(f"{mixed}: its kernels take one dtype without a cache", claimed=False)
    arguments = unclaimed(features, _claimed(features))
    if arguments is not None:
        where = "over a cache" if features.cache else "without a cache"
        where += " beside q in e4m3" if fp8 and features.cache else ""
        return Rejected(f"{arguments}: its kernels have none {where}", claimed=False)
    if features.qv:
        return _decide_qv(features)
    sizes = f"head sizes {features.head_dim}/{features.head_dim_v}"
    step = 16 if fp8 else 8
    if features.head_dim % step or features.head_dim_v % step:
        return Rejected(f"{sizes}: of {features.dtype} the copy engine moves multiples of {step}", claimed=False)
    if kernels.padded(features.head_dim, features.head_dim_v) is None:
        return Rejected(f"{sizes}: it serves head sizes up to 256", claimed=False)
    if features.cache and features.kv_dtype == "e4m3":
        reason = _unserved_of_fp8_cache(features, mixed or "q, k and v in e4m3", sizes)
        if reason is not None:
            return Rejected(reason, claimed=False)
    if not features.aligned:
        return Rejected(_UNALIGNED, claimed=False)
    return Accepted()


def _unserved_of_fp8_cache(features: Features, dtypes: str, sizes: str) -> str | None:
    """What no decode kernel over a cache in e4m3 does of a call, None where there is nothing."""
    if features.token_scales and features.dtype == "fp16":  # see docs/decisions.md
        return f"{dtypes}, k_scale and v_scale: weights times scales are rounded to fp16, too coarse beside such a q"
    if features.many_rows and not features.widens:  # see docs/decisions.md
        return (
            f"{dtypes}, more than {FEW_ROWS} query rows: it makes 16 bits of the cache first, for {WIDE_ROWS} rows a "
            f"sequence and more, in at most {WIDE_BYTES >> 30} GiB, without k_scale, v_scale and deterministic"
        )
    if features.head_dim % 16 or features.head_dim_v % 16:
        return f"{dtypes}, {sizes}: the copy engine moves multiples of 16 bytes"
    if features.widens:
        return None
    most = decode.most_group(features.head_dim, features.head_dim_v)
    if features.group > most:
        return f"{dtypes}, {features.group} query heads for a key head: its tiles have {most} at {sizes}"
    return None


def _decide_qv(features: Features) -> Decision:
    """Head sizes 64/256 and 64/512, which the checks ask for."""
    if not features.aligned:
        return Rejected(_UNALIGNED, claimed=False)
    return Accepted()


def _claimed(features: Features) -> frozenset[str]:
    if not features.cache:
        return CLAIMED_IN_FP8 if features.dtype == "e4m3" else CLAIMED
    if features.kv_dtype != "e4m3":
        return CLAIMED_WITH_CACHE
    if not features.qv:
        return CLAIMED_MIXED
    return CLAIMED_E4M3_QV if features.dtype == "e4m3" else CLAIMED_MIXED_QV


def prepare(device: str) -> None:
    """Compile or load the launcher."""
    global _asks_for_more, _fp8_asks_for_more, _cache_asks_for_more, _mixed_asks_for_more, _mixed_qv_asks_for_more
    _asks_for_more = asks_for_more(CLAIMED)
    _fp8_asks_for_more = asks_for_more(CLAIMED_IN_FP8)
    _cache_asks_for_more = asks_for_more(_KNOWN_WITH_CACHE)
    _mixed_asks_for_more = asks_for_more(_KNOWN_MIXED)
    _mixed_qv_asks_for_more = asks_for_more(_KNOWN_MIXED_QV)
    kernels.kernels_of(torch.device(device))


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    return list(kernels.all_specs()) if isinstance(supports(target), Accepted) else []


def canonical(spec: KernelSpec, field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: the next head size, or rows, of its kind."""
    if field == "dtype" and value in kernels.DTYPES and dict(spec.variant).get("dtype") == "e4m3":
        # Beside a cache in e4m3 one kernel serves queries of every dtype.
        return "e4m3" if dict(spec.variant)["function"] == "mla" else value
    if not value.isdecimal() or field not in ("head_dim", "head_dim_v", "rows"):
        return value
    function = dict(spec.variant)["function"]
    if function in (kernels.FP8, kernels.PREPARE):
        sizes = sorted(kernels.FP8_HEAD_DIMS)
    elif function == "mla":
        sizes = sorted(kernels.MLA_ROWS if field == "rows" else kernels.MLA_HEAD_DIMS_V)
    elif function == "backward":
        sizes = sorted(kernels.BACKWARD_HEAD_DIMS)
    elif function == "decode":
        sizes = sorted(kernels.DECODE_ROWS if field == "rows" else kernels.DECODE_HEAD_DIMS)
    else:
        sizes = sorted({pair[("head_dim", "head_dim_v").index(field)] for pair in kernels.HEAD_DIMS})
    return str(next((size for size in sizes if int(value) <= size), value))


def variant(target: Target, features: Features, call: Call) -> KernelSpec:
    """The attention kernel that serves a call that `decide` accepts."""
    if features.qv:
        return mla.spec_of(mla.key_of(call))
    if features.cache:
        key = None if features.widens else decode.key_of(call)
        return cached.spec_of(call) if key is None else decode.spec_of(key)
    masked = features.causal or features.window or features.chunk
    if features.dtype == "e4m3":
        return kernels.fp8_spec(features.head_dim, features.head_dim_v, masked, prefill.prepares(call))
    return prefill.spec_of(features.dtype, features.head_dim, features.head_dim_v, masked, features.softcap)


def try_known(call: Call) -> Result | None:
    """The result of a checked call of a kind that these kernels have had before; None for every other call.

    What `decide` looks at takes 5 us to gather; here a loaded kernel's key answers for dtype and head sizes, the
    launcher for addresses and strides, and the arguments that ask for an unclaimed feature must be absent.
    """
    cached = has_cache(call)
    if call.qv is not None and call.k.dtype is _FP8:
        asks_for_more = _mixed_qv_asks_for_more(call) or not cached
        return None if asks_for_more else _attend_cache(call, only_known=True)
    if call.k.dtype is not call.q.dtype or (cached and call.q.dtype is _FP8):
        asks_for_more = _mixed_asks_for_more(call) or not cached or (has_many_rows(call) and not widens(call))
        asks_for_more |= call.q.dtype is torch.float16 and (call.k_scale is not None or call.v_scale is not None)
        return None if asks_for_more else _attend_cache(call, only_known=True)
    if cached:
        return None if _cache_asks_for_more(call) else _attend_cache(call, only_known=True)
    more = _fp8_asks_for_more if call.q.dtype is _FP8 else _asks_for_more
    return None if more(call) else prefill.attend(call, only_known=True)


def attend(call: Call) -> Result:
    """Attention of a checked call that `decide` accepts."""
    if call.scheduler_metadata is not None and config.check_indices():
        header.verify(NAME, call)
    if call.k_new is not None:
        rotated = append.append(kernels.kernels_of(call.q.device), call)
        if rotated is None:
            raise RuntimeError("the Hopper launcher did not append for a call that was accepted")
        call.q = rotated
    result = _attend_cache(call, only_known=False) if has_cache(call) else prefill.attend(call, only_known=False)
    if result is None:
        raise RuntimeError("the Hopper launcher did not launch a call that was accepted")
    return result


def _attend_cache(call: Call, *, only_known: bool) -> Result | None:
    if call.qv is not None:
        return mla.attend(call, only_known=only_known)
    if widens(call):
        return widened.attend(call, only_known=only_known)
    key = decode.key_of(call)
    if key is not None:
        return decode.attend(call, key, only_known=only_known)
    if decode.is_mixed(call):
        return None
    return cached.try_attend(call, only_known=only_known)


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata: the kernels cut the work themselves, by lengths on the device, so a header alone."""
    return header.make(NAME, parameters)
