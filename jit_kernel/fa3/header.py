"""scheduler_metadata: an int32 tensor that opens with the parameters it was made with.

Its length depends on the batch alone, so it can be copied into a static buffer of that length or more. Serving engines
allocate FlashAttention-3's length, 1 + 4 numbers for each sequence of a batch rounded up to 4, at most 17 of which are
the header. No implementation but MUSA's keeps anything behind it: splits are chosen on the host or by the kernel. MUSA
keeps MATE's table there, and more room.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3.call import Call, MetadataParameters, batch_of
from jit_kernel.fa3.checks.values import INPUT_DTYPES

_MAGIC = 0x4A4B0000
_VERSION = 2
MAKERS = tuple(itertools.chain.from_iterable(config.IMPLEMENTATIONS.values()))

# The parameters that share the header's second number: how many bits each has, from the lowest on, and its least value.
_PACKED = {
    "qkv_dtype": (3, 0),
    "causal": (1, 0),
    "has_softcap": (1, 0),
    "pack_gqa": (2, -1),
    "cu_seqlens_q": (1, 0),
    "cache_leftpad": (1, 0),
}
HEADER_LENGTH = 16  # magic, version and maker in one, what is packed, 14 parameters
MUSA_TABLE = 24  # where MATE's table begins

# What differs between the layers of a step, or is longer for one request than for another: engines plan once for all.
_OF_A_LAYER = {"max_seqlen_k", "window_left", "window_right", "has_softcap"}


def length(batch_size: int, device_type: str) -> int:
    """How many numbers the metadata of a batch holds."""
    if device_type == "musa":
        return MUSA_TABLE + 8 * batch_size
    rows: int = torch.sym_max(batch_size, 1)  # type: ignore[no-untyped-call]  # a traced batch size is no int
    return 1 + (rows + 3) // 4 * 4 * 4


def _numbers(parameters: MetadataParameters) -> dict[str, int]:
    """The parameters as the header has them, in its order; the right bound of a causal mask is 0."""
    left, right = parameters.window_size
    headdim, pack_gqa = parameters.headdim, parameters.pack_gqa
    return {
        "batch_size": parameters.batch_size,
        "max_seqlen_q": parameters.max_seqlen_q,
        "max_seqlen_k": parameters.max_seqlen_k,
        "num_heads_q": parameters.num_heads_q,
        "num_heads_kv": parameters.num_heads_kv,
        "headdim": headdim,
        "headdim_v": headdim if parameters.headdim_v is None else parameters.headdim_v,
        "qkv_dtype": INPUT_DTYPES.index(parameters.qkv_dtype),
        "page_size": parameters.page_size or 0,
        "max_seqlen_k_new": parameters.max_seqlen_k_new,
        "causal": int(parameters.causal),
        "window_left": left,
        "window_right": 0 if parameters.causal else right,
        "attention_chunk": parameters.attention_chunk or 0,
        "has_softcap": int(parameters.has_softcap),
        "num_splits": parameters.num_splits,
        "pack_gqa": -1 if pack_gqa is None else int(pack_gqa),
        "sm_margin": parameters.sm_margin,
        "cu_seqlens_q": int(parameters.cu_seqlens_q is not None),
        "cache_leftpad": int(parameters.cache_leftpad is not None),
    }


def _opening(maker: str) -> int:
    """The header's first number: what it is, its version and its maker."""
    return _MAGIC | _VERSION << 8 | MAKERS.index(maker)


def _packed(numbers: dict[str, int]) -> int:
    packed = shift = 0
    for name, (bits, least) in _PACKED.items():
        packed |= numbers[name] - least << shift
        shift += bits
    return packed


def _unpacked(packed: int) -> dict[str, int]:
    numbers = {}
    for name, (bits, least) in _PACKED.items():
        numbers[name] = (packed & (1 << bits) - 1) + least
        packed >>= bits
    return numbers


def make(maker: str, parameters: MetadataParameters) -> Tensor:
    """The metadata of checked parameters, its maker's room zero."""
    named, device = _numbers(parameters), parameters.cache_seqlens.device
    numbers = [_opening(maker), _packed(named), *(value for name, value in named.items() if name not in _PACKED)]
    numbers += [0] * (length(parameters.batch_size, device.type) - len(numbers))
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _parameters_of(call: Call) -> MetadataParameters:
    """The parameters that metadata for a checked call has, its maxima aside."""
    q, k = call.q, call.k
    return MetadataParameters(
        batch_size=batch_of(call),
        max_seqlen_q=call.max_seqlen_q or 0,
        max_seqlen_k=0,
        num_heads_q=q.shape[-2],
        num_heads_kv=k.shape[-2],
        headdim=q.shape[-1],
        cache_seqlens=call.seqused_k,  # type: ignore[arg-type]
        qkv_dtype=q.dtype,
        headdim_v=call.v.shape[-1],
        cu_seqlens_q=call.cu_seqlens_q,
        cache_leftpad=call.cache_leftpad,
        page_size=None if call.page_table is None else k.shape[1],
        max_seqlen_k_new=0 if call.k_new is None else call.k_new.shape[-3],
        causal=call.causal,
        window_size=call.window_size,
        attention_chunk=call.attention_chunk,
        has_softcap=call.softcap > 0,
        num_splits=call.num_splits,
        pack_gqa=call.pack_gqa,
        sm_margin=call.sm_margin,
    )


def verify(maker: str, call: Call, *, exact: bool = False) -> dict[str, int]:
    """Check that scheduler_metadata was made with the parameters of this `flash_attn_with_kvcache` call.

    Unless the maker's own room depends on every parameter (exact), one plan serves all layers and requests of a step:
    with another window, with a softcap or without, for another max_seqlen_k, for new keys that do not come, and for the
    dtype of the cache where q has another. Reads the metadata, so on a GPU it synchronises. Returns the parameters that
    it was made with. Raises ValueError with the one that differs.
    """
    metadata, wanted = call.scheduler_metadata, _numbers(_parameters_of(call))
    if metadata is None:
        return {}
    batch = wanted["batch_size"]
    least = length(batch, metadata.device.type)
    if metadata.shape[0] < least:
        raise ValueError(
            f"scheduler_metadata has shape {tuple(metadata.shape)}; for a batch of {batch} "
            f"it must hold at least {least} numbers"
        )
    opening, packed, *rest = metadata[:HEADER_LENGTH].tolist()
    if opening not in map(_opening, _makers(maker, call)):
        raise ValueError(f"scheduler_metadata must come from get_scheduler_metadata of the {maker} implementation")
    made = dict(zip((name for name in wanted if name not in _PACKED), rest, strict=True)) | _unpacked(packed)
    skipped = _unlike(call, made, wanted, exact=exact)
    for name, value in wanted.items():
        if name not in skipped and made[name] != value:
            raise ValueError(f"scheduler_metadata was made with {name} = {made[name]}; this call has {value}")
    longest_q = call.max_seqlen_q or 0
    if made["max_seqlen_q"] < longest_q:
        raise ValueError(
            f"scheduler_metadata was made with max_seqlen_q = {made['max_seqlen_q']}; "
            f"it must be at least {longest_q} for this call"
        )
    return made


def _makers(maker: str, call: Call) -> tuple[str, ...]:
    """Whose metadata a call takes: that of the implementation which serves it.

    Metadata has one dtype, so that of a call whose keys have another than q may be by another implementation for the
    same devices; but for MUSA's, which serves no such call, none keeps anything behind the header.
    """
    if call.k.dtype is call.q.dtype:
        return (maker,)
    return next(names for names in config.IMPLEMENTATIONS.values() if maker in names)


def _unlike(call: Call, made: dict[str, int], wanted: dict[str, int], *, exact: bool) -> set[str]:
    """The parameters in which metadata and its call may be unlike; writes a dense q's length into `wanted`."""
    skipped = {"max_seqlen_k"} if exact else set(_OF_A_LAYER)
    if made["window_right"] == wanted["window_right"]:
        skipped.add("causal")  # a window that ends at the query masks as causal does
    if (call.k_new is None and not exact) or call.cu_seqlens_k_new is not None:
        skipped.add("max_seqlen_k_new")
    if not exact and made["qkv_dtype"] == INPUT_DTYPES.index(call.k.dtype):
        skipped.add("qkv_dtype")
    if call.cu_seqlens_q is None:
        wanted["max_seqlen_q"] = call.q.shape[1]
    else:
        skipped.add("max_seqlen_q")
    return skipped
