"""What one argument of a call means by itself: a number, a flag, a tensor, offsets; and where tensors lie.

Arguments that mean nothing raise `MeaninglessError`: a call with them must not be answered.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class MeaninglessError(Exception):
    """The arguments have no meaning by the contract."""


class UnjudgedError(Exception):
    """The arguments have a meaning that is too large to compute, or that the contract leaves open."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise MeaninglessError(what)


def whole(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """An int, or what stands for one."""
    try:
        number = operator.index(value)
    except TypeError:
        raise MeaninglessError(f"{name} is {value!r}") from None
    need(low <= number <= high, f"{name} is {number}, not between {low} and {high}")
    return number


def flag(name: str, value: Any) -> bool:
    text = isinstance(value, (str, bytes, list, tuple, dict)) or value is None
    need(not text, f"{name} is {value!r}")
    return bool(value)


def real(name: str, value: Any) -> float:
    text = isinstance(value, (str, bytes, complex)) or value is None
    need(not text, f"{name} is {value!r}")
    try:
        number = float(value)
    except (TypeError, OverflowError, RuntimeError, ValueError):
        raise MeaninglessError(f"{name} is {value!r}") from None
    need(math.isfinite(number), f"{name} is {number}")
    return number


def window(value: Any) -> tuple[int, int]:
    if value is None:
        return -1, -1
    need(not isinstance(value, (str, bytes)), "window_size is text")
    try:
        pair = list(value)
    except TypeError:
        raise MeaninglessError(f"window_size is {value!r}") from None
    need(len(pair) == 2, f"window_size has {len(pair)} numbers")
    left, right = (-1 if bound is None else whole("window_size", bound, -1) for bound in pair)
    return left, right


def dense(name: str, value: Any, dims: int | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    need(isinstance(value, Tensor), f"{name} is a {type(value).__name__}")
    need(dims is None or value.dim() == dims, f"{name} has {value.dim()} dimensions")
    need(not dtypes or value.dtype in dtypes, f"{name} has dtype {value.dtype}")
    need(all(size <= INT32_MAX for size in value.shape), f"{name} has shape {tuple(value.shape)}")
    return value


def numbers(name: str, value: Any, count: int | None) -> list[int]:
    tensor = dense(name, value, 1, INTEGERS)
    need(count is None or tensor.shape[0] == count, f"{name} has {tensor.shape[0]} numbers, not {count}")
    found: list[int] = tensor.tolist()
    return found


def offsets(name: str, value: Any, batch: int | None, rows: int) -> list[int]:
    found = numbers(name, value, None if batch is None else batch + 1)
    need(len(found) >= 1 and found[0] == 0, f"{name} does not start at 0")
    need(all(a <= b for a, b in itertools.pairwise(found)), f"{name} decreases")
    need(found[-1] <= rows, f"{name} ends at {found[-1]} of {rows}")
    return found


def limited(name: str, value: Any, lengths: list[int]) -> list[int]:
    if value is None:
        return lengths
    found = numbers(name, value, len(lengths))
    need(all(0 <= n <= most for n, most in zip(found, lengths, strict=True)), f"{name} is {found} of {lengths}")
    return found


def addresses(x: Tensor) -> Tensor:
    """Where every element lies, in bytes."""
    at = torch.tensor(x.storage_offset(), device="cpu")
    for size, stride in zip(x.shape, x.stride(), strict=True):
        at = at[..., None] + torch.arange(size, device="cpu") * stride
    return x.untyped_storage().data_ptr() + at.flatten() * x.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element's first byte in common."""
    if 0 in (a.numel(), b.numel()) or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if max(a.numel(), b.numel()) > 2**22:
        raise UnjudgedError("too large to look for an overlap")
    return bool(torch.isin(addresses(a), addresses(b)).any())


def overlaps_itself(x: Tensor) -> bool:
    if x.numel() > 2**22:
        return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return bool(addresses(x).unique().numel() != x.numel())
