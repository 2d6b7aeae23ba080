"""What MATE serves, by version: the reasons for which a call is refused before MATE sees it.

MATE asserts, ignores or misreads what it does not serve; each rule says which. A served call has None for a reason.
"""

from __future__ import annotations

from jit_kernel import moore_threads
from jit_kernel.fa3.features import Features, mixed_dtypes, unclaimed

HEAD_SIZES = (64, 128, 192, 256, 384, 512)
HEAD_PAIRS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512))
MLA_PAIR, MLA_PAGE_SIZE = (64, 512), 64
CHUNK_TOOLKIT = (5, 1, 0)


# What a call may ask for, by the names of features.ARGUMENTS: MATE has no argument for the rest.
CLAIMED = frozenset(
    (
        *("ragged_q", "ragged_k", "page_size", "seqused_q", "seqused_k", "append", "ragged_append", "rotary"),
        *("cache_batch_idx", "cache_leftpad", "causal", "window", "chunk", "softcap", "sinks", "lse", "split"),
        *("qv", "metadata"),
    )
)


def rejection(version: tuple[int, ...], call: Features) -> str | None:
    """Why a call of these features is not served by this version of MATE."""
    if call.dtype not in ("bf16", "fp16"):
        return f"dtype {call.dtype}: MATE computes in bf16 and fp16 only"
    mixed = mixed_dtypes(call)
    if mixed is not None:
        return f"{mixed}: MATE takes one dtype, it has no fp8"
    if call.descale:
        return "q_descale, k_descale and v_descale: MATE ignores them, it has no fp8"
    if call.only_qv:
        return "only_qv: MATE has no such mode"
    arguments = unclaimed(call, CLAIMED)
    if arguments is not None:
        return f"{arguments}: MATE has no such argument"
    if call.qv:
        return _mla_rejection(call)
    return _pair_rejection(call.head_dim, call.head_dim_v) or _version_rejection(version, call)


def _pair_rejection(head_dim: int, head_dim_v: int) -> str | None:
    if max(head_dim, head_dim_v) > HEAD_SIZES[-1]:
        return f"head sizes {head_dim}/{head_dim_v}: MATE rounds sizes above 512 down to 512"
    pair = (rounded(head_dim), rounded(head_dim_v))
    if pair not in HEAD_PAIRS:
        served = ", ".join(f"{d}/{dv}" for d, dv in HEAD_PAIRS)
        return f"head sizes {head_dim}/{head_dim_v}: MATE rounds up to {pair[0]}/{pair[1]} and serves {served} only"
    return None


def rounded(head_dim: int) -> int:
    """The head size of MATE's kernel that serves `head_dim`, at most 512."""
    return next(size for size in HEAD_SIZES if head_dim <= size)


def _version_rejection(version: tuple[int, ...], call: Features) -> str | None:
    since = {
        (0, 2, 0): {"new k and v": call.append},
        (0, 2, 1): {
            "rotary_cos": call.rotary,
            "cache_batch_idx": call.cache_batch_idx,
            "cache_leftpad": call.cache_leftpad,
        },
        (0, 2, 2): {"attention_chunk": call.chunk},
    }
    for needed, features in since.items():
        for name, used in features.items():
            if used and version < needed:
                since_, this = (".".join(map(str, numbers)) for numbers in (needed, version))
                return f"{name}: MATE has it since {since_}, this is {this}"
    toolkit = moore_threads.release(moore_threads.probe().toolkit.version or "")
    if call.chunk and toolkit and toolkit < CHUNK_TOOLKIT:
        return f"attention_chunk: MATE needs the MUSA toolkit 5.1.0, this is {moore_threads.probe().toolkit.version}"
    return None


def plans_windows(version: tuple[int, ...]) -> bool:
    """Whether this version's metadata knows of windows; before, it would count blocks that a window leaves out."""
    return version >= (0, 2, 1)


def _mla_rejection(call: Features) -> str | None:
    """MLA decode forwards q, qv, caches, lengths, table, scale and causal; the rest MATE ignores without a word."""
    if (call.head_dim, call.head_dim_v) != MLA_PAIR or call.page_size != MLA_PAGE_SIZE:
        return (
            f"qv with head sizes {call.head_dim}/{call.head_dim_v} and page size {call.page_size}: MATE serves qv "
            "in flash_attn_with_kvcache only, with q of 64, qv and values of 512 and pages of 64 tokens (MLA decode)"
        )
    ignored = {
        "window_size": call.window,
        "attention_chunk": call.chunk,
        "softcap": call.softcap,
        "sinks": call.sinks,
        "new k and v": call.append,
        "rotary_cos": call.rotary,
        "cache_batch_idx": call.cache_batch_idx,
        "cache_leftpad": call.cache_leftpad,
    }
    for name, used in ignored.items():
        if used:
            return f"{name} with qv: MATE's MLA decode ignores it"
    return None
