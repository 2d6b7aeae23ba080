"""Tensors that are no plain memory, made of plain ones, and calls of every public function to put them into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import valid_calls
from tests.support.valid_calls import FUNCTIONS, Call


class Wrapped(Tensor):
    """A wrapper subclass: `inner` holds its numbers, and it has no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was asked for")


class Named(Tensor):
    """A subclass that owns its memory."""


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose storage was emptied, as sharded training does between layers."""
    made = tensor.clone()
    made.untyped_storage().resize_(0)
    return made


def batched(tensor: Tensor) -> Tensor:
    """What torch.vmap passes, kept beyond its end."""
    kept: list[Tensor] = []
    torch.vmap(lambda x: kept.append(x) or x)(tensor[None])
    return kept[0]


def functionalized(tensor: Tensor) -> Tensor:
    """What torch.func.functionalize passes, kept beyond its end."""
    kept: list[Tensor] = []
    torch.func.functionalize(lambda x: kept.append(x) or x)(tensor)
    return kept[0]


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, whose sign torch negates lazily."""
    return (-tensor)._neg_view()


def imaginary(tensor: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a lazily conjugated tensor."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


# By what they are: the error that names the argument, and what makes one of a plain tensor.
REFUSED: dict[str, tuple[type[Exception], Callable[[Tensor], Tensor]]] = {
    "wrapper": (TypeError, Wrapped),
    "efficient zero": (TypeError, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)),
    "freed": (TypeError, freed),
    "fake": (TypeError, lambda t: FakeTensorMode().from_tensor(t)),
    "functional": (NotImplementedError, torch._to_functional_tensor),
    "functionalized": (NotImplementedError, functionalized),
    "batched": (NotImplementedError, batched),
}
DTYPES = {torch.float32: torch.bfloat16}  # what a GPU computes in instead


def to(device: str, call: Call) -> Call:
    """A call with its tensors on a device, in a dtype that it computes in."""
    if device == "cpu":
        return call
    moved = {name: _moved(device, name, value) for name, value in call.items()}
    if moved.get("qkv_dtype") in DTYPES:
        moved["qkv_dtype"] = DTYPES[moved["qkv_dtype"]]
    return moved


def _moved(device: str, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    stays = "lse" in name or "descale" in name
    return value.to(device=device, dtype=value.dtype if stays else DTYPES.get(value.dtype, value.dtype))


BASES = [base for base in FUNCTIONS if base not in (valid_calls.wide, valid_calls.planned)]


def places() -> Iterator[tuple[Callable[[], Call], str]]:
    """Every tensor argument of every call."""
    for base in BASES:
        for name, value in base().items():
            if isinstance(value, Tensor):
                yield base, name


def written(base: Callable[[], Call], name: str) -> bool:
    """Whether the call writes this argument."""
    appends = base in (valid_calls.cache, valid_calls.paged_cache, valid_calls.fp8_cache)
    return name == "out" or (appends and name in ("k_cache", "v_cache"))
