"""The mask of one forward pass, as transformers asks for it: FlashAttention's settings, and which rows are padding.

Padding and packed sequences become a layout, by what the mask's values are: rows laid end to end (cu_seqlens), padding
on the left of a cache (cache_leftpad), or, for everything else, a bit for each query and key (draft_mask). While a
program is traced, or captured into a CUDA graph, values cannot be read, and a mask that depends on them becomes bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from jit_kernel.device import is_capturing
from jit_kernel.fa3.call import UNBOUNDED
from jit_kernel.fa3.checks import plain
from jit_kernel.integrations.transformers.layouts import (
    Ragged,
    pack,
    pack_traced,
    packed_rows,
    padded_rows,
    rows_behind,
)
from jit_kernel.integrations.transformers.recognise import UNKNOWN, Kind, evaluate, recognise


class NoBackendError(NotImplementedError, AttributeError):
    """A model used a mask as a tensor: it computes its attention itself."""


def _used_as_a_tensor(self: Mask, *_: Any) -> Any:
    raise NoBackendError(
        "this model computes with its attention mask, which jit_kernel makes for its own attention alone: the model "
        "computes its attention itself and takes no attention backend. Use attn_implementation='eager' or 'sdpa'"
    )


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees: FlashAttention's settings, aligned to the bottom right, and one layout at most.

    keys: how many of the cache's keys take part; a static cache has room behind them.
    lengths: (b,) int32, the same where a static cache holds it in a tensor; else None.
    leftpad: (b,) int32, padding before each sequence in a cache. ragged: rows without the padding, or packed ones.
    behind: the rows of padding behind each sequence, which see all of its keys, as eager attention lets them.
    bits: (b * queries, words) int32, a draft_mask; seen: (b, 1, queries, keys) bool, the same for torch's SDPA, where
    a gradient may be asked for. padded: whether bits, ragged or leftpad leave out padding. packing: whether bits say
    which tokens are of one sequence and nothing that the settings do not say. later: what makes the mask with its bits,
    where it stands for packed sequences whose layout the model may be given besides (cu_seq_lens_*).
    """

    queries: int
    keys: int
    causal: bool = False
    window_size: tuple[int, int] = UNBOUNDED
    attention_chunk: int = 0
    lengths: Tensor | None = None
    leftpad: Tensor | None = None
    ragged: Ragged | None = None
    behind: Ragged | None = None
    bits: Tensor | None = None
    seen: Tensor | None = None
    padded: bool = False
    packing: bool = False
    later: Callable[[], Mask] | None = None

    @property
    def aligned(self) -> bool:
        """Whether a query's place among the keys matters; the queries are then the last of the keys."""
        return self.causal or self.window_size != UNBOUNDED or self.attention_chunk > 0

    # generate() makes the mask of a static cache before the forward pass, as if it were a tensor of four dimensions.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the tensor which another implementation would have, for any batch and head."""
        return 1, 1, self.queries, self.keys

    def contiguous(self) -> Mask:
        """This mask; make_mask() gets it back and hands it on."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and torch ask of any object
            raise AttributeError(name)
        return _used_as_a_tensor(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __getitem__ = __invert__ = _used_as_a_tensor
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __gt__ = __le__ = __ge__ = __neg__ = _used_as_a_tensor


def is_traced(*values: Any) -> bool:
    """Whether a program is being traced, so that no value of a tensor may be read."""
    if torch.compiler.is_compiling() or plain.is_traced():
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(value, FakeTensor) for value in values)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    allow_is_causal_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **_: Any,
) -> Mask:
    """The mask of one forward pass: the mask function recognised, and attention_mask (b, tokens) as padding.

    Raises NotImplementedError for an attention_mask of another shape, TypeError for a mask function that is none.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; jit_kernel takes (batch, tokens) alone"
        )
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"
    traced = is_traced(attention_mask, q_offset)
    captured = not traced and is_capturing(torch.device(device))
    traced = traced or captured
    end, lengths = q_offset + (q_length - kv_offset), None  # how many keys there are up to the last query
    if isinstance(end, Tensor):
        lengths = end.to(device=device, dtype=torch.int32).reshape(-1).expand(batch_size).contiguous()
        end = kv_length if traced else int(end)
    kind = _fitting(recognise(mask_function, allow_is_causal_skip), q_length, kv_length, kv_offset, end)
    keys = end if kind.causal else kv_length
    settings = Mask(q_length, keys, kind.causal, kind.window_size, kind.attention_chunk)
    real = _tokens(attention_mask, kv_offset, keys)
    if not traced and real is not None and bool(real.all()):
        real = None
    found = None
    if kind.known and not (traced and (real is not None or kind.packed is not None)):
        found = _laid_out(settings, kind.packed, real)
    if found is None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        sizes |= {"q_offset": q_offset, "kv_offset": kv_offset, "device": device}
        shift = lengths if traced and kind.causal else None
        packing = kind.known and kind.packed is not None and real is None

        def with_bits() -> Mask:
            seen = evaluate(mask_function, sizes, use_vmap)
            return replace(_with_bits(settings, seen, real, shift, traced), packing=packing)

        if captured and packing:  # queries x keys bits that continuous batching never looks at
            return replace(settings, packing=True, later=functools.cache(with_bits))
        found = with_bits()
    if lengths is not None and kind.causal and (traced or (q_length < keys and found.ragged is None)):
        found = replace(found, keys=kv_length, lengths=lengths)  # no number that the next token changes
    return found


def _fitting(kind: Kind, queries: int, room: int, kv_offset: int, end: int) -> Kind:
    """`kind`, or an unknown one where FlashAttention would take the queries for others than they are."""
    fits = queries <= end <= room if kind.causal else not kind.aligned or end == room
    if kind.attention_chunk and (kv_offset or kind.packed is not None):
        fits = False  # chunks are counted from a token that is not the first key
    return kind if fits else UNKNOWN


def _tokens(attention_mask: Tensor | None, kv_offset: int, keys: int) -> Tensor | None:
    """(b, keys) bool: which keys are tokens, and no padding; in the room of a cache that no token fills none is."""
    if attention_mask is None:
        return None
    real = attention_mask[:, kv_offset : kv_offset + keys].bool()
    return torch.nn.functional.pad(real, (0, keys - real.shape[1]))


def _laid_out(settings: Mask, packed: Tensor | None, real: Tensor | None) -> Mask | None:
    """`settings` with a layout for packed sequences or padding that FlashAttention has; None where it has none."""
    if packed is not None:
        return replace(settings, ragged=packed_rows(packed)) if real is None else None
    if real is None:
        return settings
    starts = real.int().diff(dim=1, prepend=real.new_zeros(real.shape[0], 1, dtype=torch.int32)) == 1
    first, tokens = real.int().argmax(dim=1, keepdim=True), real.sum(dim=1, keepdim=True)
    on_the_left, whole = bool(real[:, -1].all()), bool((starts.sum(dim=1) <= 1).all())
    if settings.aligned and not whole:
        return None
    if settings.aligned and settings.queries < settings.keys:  # an empty sequence has nothing but padding on its left
        leftpad = (settings.keys - tokens[:, 0]).to(torch.int32)
        return replace(settings, leftpad=leftpad, padded=True) if on_the_left else None
    ragged = padded_rows(real, settings.queries, settings.aligned)
    if on_the_left or not settings.causal:
        return replace(settings, ragged=ragged, padded=True)
    if settings.window_size != UNBOUNDED or settings.attention_chunk:
        return None  # what a row of padding sees depends on its place
    behind = torch.arange(settings.keys, device=real.device) >= first + tokens
    return replace(settings, ragged=ragged, behind=rows_behind(ragged, behind), padded=True)


def _with_bits(settings: Mask, seen: Tensor, real: Tensor | None, lengths: Tensor | None, traced: bool) -> Mask:
    """`settings` and a bit for each query and key. seen: (b, 1, queries, room); lengths: (b,), for a traced cache."""
    room, keys = seen.shape[-1], settings.keys
    seen = seen[..., :keys]
    if real is not None:
        seen = seen & real[:, None, None, :]
    flat = seen[:, 0]
    if lengths is not None:  # the last bit is that of the last key, and of the room behind it none
        place = torch.arange(keys, device=seen.device) - (keys - lengths[:, None])
        flat = flat.gather(-1, place.clamp(min=0)[:, None, :].expand_as(flat))
    return replace(
        settings,
        attention_chunk=0,  # the bits have it
        # Never one word where a program is traced: torch takes a size of 1 for a fact of every length.
        bits=pack_traced(flat, room // 32 + 2) if traced else pack(flat, -(-room // 32)),
        seen=seen if torch.is_grad_enabled() else None,
        padded=real is not None,
    )
