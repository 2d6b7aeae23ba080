"""scheduler_metadata: an int32 tensor that opens with the parameters it was made with.

Its length depends on the batch alone, so it can be copied into a static buffer of that length or more. The
room behind the header belongs to the implementation that made it. An implementation that chooses splits on
the host leaves it 0.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3.call import Call, MetadataParameters, batch_of
from jit_kernel.fa3.checks.values import INPUT_DTYPES

_MAGIC = 0x4A4B4641
_VERSION = 1
MAKERS = tuple(itertools.chain.from_iterable(config.IMPLEMENTATIONS.values()))
HEADER_LENGTH = 24  # magic, version, maker, 20 parameters, one spare

# What a layer may have that its metadata was made without: engines plan once for layers with and without it.
_MADE_WITHOUT = {"window_left": -1, "window_right": -1, "has_softcap": 0}


def length(batch_size: int) -> int:
    """How many numbers the metadata of a batch holds: the header, and eight a sequence for the maker."""
    return HEADER_LENGTH + 8 * batch_size


def _numbers(parameters: MetadataParameters) -> dict[str, int]:
    """The parameters as the header has them, in its order."""
    left, right = parameters.window_size
    right = 0 if parameters.causal else right
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
        "causal": int(right == 0),
        "window_left": left,
        "window_right": right,
        "attention_chunk": parameters.attention_chunk or 0,
        "has_softcap": int(parameters.has_softcap),
        "num_splits": parameters.num_splits,
        "pack_gqa": -1 if pack_gqa is None else int(pack_gqa),
        "sm_margin": parameters.sm_margin,
        "cu_seqlens_q": int(parameters.cu_seqlens_q is not None),
        "cache_leftpad": int(parameters.cache_leftpad is not None),
    }


def make(maker: str, parameters: MetadataParameters) -> Tensor:
    """The metadata of checked parameters, its maker's room zero."""
    numbers = [_MAGIC, _VERSION, MAKERS.index(maker), *_numbers(parameters).values()]
    numbers += [0] * (length(parameters.batch_size) - len(numbers))
    return torch.tensor(numbers, dtype=torch.int32, device=parameters.cache_seqlens.device)


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

    Unless the maker's own room depends on every parameter (exact), a longer max_seqlen_k serves it too, and so does
    metadata made for new keys that it has not, or without its window or softcap; a window whose right bound is 0 counts
    as a window there, not as causal.
    Reads the metadata, so on a GPU it synchronises. Returns the parameters that it was made with. Raises ValueError
    with the one that differs.
    """
    metadata, wanted = call.scheduler_metadata, _numbers(_parameters_of(call))
    if metadata is None:
        return {}
    batch = wanted["batch_size"]
    if metadata.shape[0] < length(batch):
        raise ValueError(
            f"scheduler_metadata has shape {tuple(metadata.shape)}; for a batch of {batch} "
            f"it must hold at least {length(batch)} numbers"
        )
    numbers = metadata[:HEADER_LENGTH].tolist()
    if numbers[:3] != [_MAGIC, _VERSION, MAKERS.index(maker)]:
        raise ValueError(f"scheduler_metadata must come from get_scheduler_metadata of the {maker} implementation")
    made = dict(zip(wanted, numbers[3:], strict=False))
    skipped = {"max_seqlen_k"}  # engines plan once for all layers and for the longest request
    if not exact:
        skipped.update(name for name, without in _MADE_WITHOUT.items() if made[name] == without)
        if "window_right" in skipped and not call.causal:
            skipped.add("causal")  # made with 0, wanted as the window's right bound has it
    if (call.k_new is None and not exact) or call.cu_seqlens_k_new is not None:
        skipped.add("max_seqlen_k_new")
    if call.cu_seqlens_q is None:
        wanted["max_seqlen_q"] = call.q.shape[1]
    else:
        skipped.add("max_seqlen_q")
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
