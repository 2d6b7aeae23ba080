"""What every kernel of this package asks of its arguments; each message names one, what it was and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from jit_kernel.fa3.checks import plain

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn


def tensor(name: str, value: object) -> Tensor:
    """The value, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a torch.Tensor")
    return value


def result(
    out: Tensor | None, like: Tensor, shape: Sequence[int] | None, dtype: torch.dtype, name: str = "out"
) -> Tensor:
    """`out`, or memory for it on the device of another tensor, which has its shape if that is None."""
    if out is not None:
        return tensor(name, out)
    if shape is None:  # half the time of an empty tensor of a shape
        return torch.empty_like(like, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def dtype(name: str, value: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """A tensor's dtype must be one of these."""
    if value.dtype not in allowed:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {_either(allowed)}")


def shape(name: str, value: Tensor, wanted: Sequence[int]) -> None:
    """A tensor's shape must be this one."""
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(wanted)}")


def dims(name: str, value: Tensor, least: int, most: int | None = None) -> None:
    """How many dimensions a tensor has."""
    if value.ndim < least or value.ndim > (most or value.ndim):
        wanted = f"{least} or more" if most is None else str(least) if most == least else f"{least} to {most}"
        raise ValueError(f"{name} has {value.ndim} dimensions; it must have {wanted}")


def memory(named: Mapping[str, Tensor | None], written: Sequence[str]) -> None:
    """Plain memory of one device: a unit last stride, no gradient to keep, no place of a result written twice."""
    first, *_ = [name for name, value in named.items() if value is not None]
    for name, value in named.items():
        if value is None:
            continue
        if tensor(name, value).is_neg():
            raise TypeError(f"{name} is a lazily negated view; it must be plain memory, as its resolve_neg() is")
        plain.in_memory(name, value, written=True)
        device = value.device
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"{name} is on {device}; jit_kernel.ops has kernels for CPUs (C++) and for NVIDIA GPUs (CUDA C++), and "
                f"none in a language that {device.type} compiles"
            )
        other = tensor(first, named[first]).device
        if device != other:
            raise ValueError(f"{name} is on {device}; it must be on {other}, where {first} is")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient; jit_kernel.ops computes none: call it under torch.no_grad()")
        if value.ndim and value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(f"{name} has strides {value.stride()}; the last one must be 1")
        if name in written and any(
            size > 1 and not step for size, step in zip(value.shape, value.stride(), strict=True)
        ):
            raise ValueError(f"{name} has strides {value.stride()}; what is written must not be expanded")


def dense(name: str, value: Tensor) -> None:
    """A tensor must be contiguous."""
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}; it must be contiguous")


def number(name: str, value: object, least: float = -math.inf) -> float:
    """The value as a finite float of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not math.isfinite(value) or value < least:
        raise ValueError(
            f"{name} is {value!r}; it must be finite{'' if least == -math.inf else f' and at least {least}'}"
        )
    return float(value)


def scale(name: str, value: Tensor | None, quantized: bool, count: int = 1, of: str = "out") -> None:
    """A float32 tensor of one number, or one a head, where a tensor is e4m3; None where it is not."""
    if value is None and quantized:
        raise ValueError(f"{name} is None; it must be a float32 tensor, because {of} is {E4M3}")
    if value is None:
        return
    if not quantized:
        raise ValueError(f"{name} is given; it must be None, because {of} is not {E4M3}")
    dtype(name, value, (torch.float32,))
    dense(name, value)
    if value.numel() not in (1, count):
        wanted = "1 number" if count == 1 else f"1 number or {count}, one a head"
        raise ValueError(f"{name} has {value.numel()} numbers; it must have {wanted}")


def group(value: int | str, size: int, scale: Tensor | None, scale_out: Tensor | None) -> int | None:
    """How many numbers of a row of `size` share a scale; None for a scale of the whole tensor."""
    if scale is not None and (value != "tensor" or scale_out is not None):
        raise ValueError("scale is given; it must be None, except with group='tensor' and without scale_out")
    if value == "tensor":
        return None
    if value == "token":
        return size
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or size % value:
        raise ValueError(
            f"group is {value!r}; it must be 'token', 'tensor' or a number that x's {size} is a multiple of"
        )
    return value


def quantized(x: Tensor, out: Tensor, scales: Tensor, name: str, wanted: Sequence[int]) -> None:
    """Numbers, their e4m3 and the scales of the wanted shape, by the name that these have in the call."""
    memory({"x": x, "out": out, name: scales.unsqueeze(-1)}, ("out", "scale_out"))
    for each, value, allowed in (("x", x, FLOATS), ("out", out, (E4M3,)), (name, scales, (torch.float32,))):
        dtype(each, value, allowed)
    shape("out", out, x.shape)
    shape(name, scales, wanted)


def integers(name: str, value: Tensor, count: int) -> None:
    """A dense tensor of `count` int32 or int64."""
    dtype(name, value, (torch.int32, torch.int64))
    shape(name, value, (count,))
    dense(name, value)


def heads(q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None) -> None:
    """Queries and keys of the same tokens, and results of their shapes."""
    dtype("q", q, FLOATS)
    dims("q", q, 3, 3)
    if q.shape[2] > 512:
        raise ValueError(f"q has heads of {q.shape[2]} numbers; it must have at most 512")
    if k is not None:
        dims("k", k, 3, 3)
        shape("k", k, (q.shape[0], k.shape[1], q.shape[2]))
    elif k_out is not None:
        raise ValueError("k_out is given; it must be None, because k is")
    for name, value, like in (("k", k, q), ("q_out", q_out, q), ("k_out", k_out, k)):
        if value is not None and like is not None:
            dtype(name, value, (q.dtype,))
            shape(name, value, value.shape if name == "k" else like.shape)


def angles(cos: Tensor, sin: Tensor, size: int, own: torch.dtype) -> None:
    """Tables of up to half a head's angles, in the heads' dtype or float32."""
    dims("cos", cos, 2, 2)
    dtype("cos", cos, (own, torch.float32))
    dtype("sin", sin, (cos.dtype,))
    shape("sin", sin, cos.shape)
    if not 1 <= cos.shape[1] <= size // 2:
        raise ValueError(f"cos has rows of {cos.shape[1]} angles; it must have 1 to {size // 2}, half of q's {size}")


def weights(named: dict[str, Tensor | None], size: int, own: torch.dtype) -> torch.dtype:
    """The one dtype of weights of heads, the heads' own or float32."""
    found = {name: value for name, value in named.items() if value is not None}
    allowed: tuple[torch.dtype, ...] = (own, torch.float32)
    for name, value in found.items():
        dtype(name, value, allowed)
        shape(name, value, (size,))
        allowed = (value.dtype,)
    return allowed[0]


def keys_and_values(k: Tensor, v: Tensor, allowed: Sequence[torch.dtype], names: tuple[str, str] = ("k", "v")) -> None:
    """Keys and values of the same tokens and heads, (tokens, heads, size)."""
    dtype(names[0], k, allowed)
    dtype(names[1], v, (k.dtype,))
    for name, value in zip(names, (k, v), strict=True):
        dims(name, value, 3, 3)
    shape(names[1], v, (*k.shape[:2], v.shape[2]))


def caches(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> None:
    """Paged caches of such keys and values, in their dtype or e4m3."""
    dtype("k_cache", k_cache, dict.fromkeys((k.dtype, E4M3)))
    dtype("v_cache", v_cache, (k_cache.dtype,))
    dims("k_cache", k_cache, 4, 4)
    shape("k_cache", k_cache, (*k_cache.shape[:2], *k.shape[1:]))
    shape("v_cache", v_cache, (*k_cache.shape[:2], *v.shape[1:]))
    if not 1 <= k_cache.shape[1] < 1 << 31 or k_cache.shape[0] >= 1 << 31:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}; pages and their size must be 1 to 2^31 - 1")


def scales(k_scale: Tensor | None, v_scale: Tensor | None, quantized: bool, heads: int) -> int:
    """Scales of an e4m3 cache: the step from a head's to the next one's."""
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        scale(name, value, quantized, heads, "k_cache")
    if k_scale is None or v_scale is None:
        return 0
    if k_scale.numel() != v_scale.numel():
        raise ValueError(f"v_scale has {v_scale.numel()} numbers; it must have {k_scale.numel()}, as k_scale has")
    return int(k_scale.numel() > 1)


def total(value: int | None, cu_seqlens: Tensor) -> int:
    """How many tokens there are: the value, or the last of cu_seqlens, which waits for a GPU."""
    if value is None:
        dims("cu_seqlens", tensor("cu_seqlens", cu_seqlens), 1, 1)
        return int(cu_seqlens[-1]) if len(cu_seqlens) else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"total is {value!r}; it must be a number of tokens, 0 or more")
    return value


def pages(page_table: Tensor, cu_seqlens: Tensor) -> None:
    """A page table and the sequences that it is for."""
    for name, value, count in (("page_table", page_table, 2), ("cu_seqlens", cu_seqlens, 1)):
        dtype(name, value, (torch.int32,))
        dims(name, value, count, count)
    shape("cu_seqlens", cu_seqlens, (page_table.shape[0] + 1,))


def _either(allowed: Iterable[object]) -> str:
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last
