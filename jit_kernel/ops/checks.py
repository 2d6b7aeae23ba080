"""What every kernel of this package asks of its arguments; each message names one, what it was and what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn


def tensor(name: str, value: object) -> Tensor:
    """The value, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a torch.Tensor")
    return value


def result(out: Tensor | None, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`out`, or memory for it on the device of another tensor."""
    return torch.empty(shape, dtype=dtype, device=like.device) if out is None else tensor("out", out)


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
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


def memory(named: dict[str, Tensor | None], written: Sequence[str]) -> None:
    """Plain memory of one device: a unit last stride, no gradient to keep, no place of a result written twice."""
    first, *_ = [name for name, value in named.items() if value is not None]
    for name, value in named.items():
        if value is None:
            continue
        device = tensor(name, value).device
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
        if name in written and any(size > 1 and not step for size, step in zip(value.shape, value.stride(), strict=True)):
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
        raise ValueError(f"{name} is {value!r}; it must be finite{'' if least == -math.inf else f' and at least {least}'}")
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


def _either(allowed: Sequence[object]) -> str:
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last
