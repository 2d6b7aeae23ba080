"""Checks of one argument at a time. Each raises with the argument's name, what it was and what it must be."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import UNBOUNDED
from jit_kernel.fa3.checks import memory, plain

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38
FLOAT32_MIN = 1.2e-38  # the smallest normal number: below it a division overflows
MAX_DRAFT_WORDS = 2**20  # 2^25 keys: far more than any tree, and twice as many bits fit into an int32
MAX_SPLITS = 256  # what FA3's combine takes, and more than any machine has use for

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
_INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def described(value: object) -> str:
    """A value as an error text shows it: a tensor by its dtype and shape, a plain value by repr, all else by its type.

    The repr of anything else may raise, take for ever or print a whole tensor.
    """
    kind = type(value)
    if isinstance(value, plain.UNINITIALIZED):
        return f"an {kind.__name__}"
    if isinstance(value, Tensor):
        if value.is_nested:  # torch raises where its shape is asked for
            return f"a nested {str(value.dtype)[6:]} tensor"
        return f"a {str(value.dtype)[6:]} tensor of shape {tuple(value.shape)}"
    text = _text(value)
    return f"of type {kind.__name__}" if text is None else f"{text} ({kind.__name__})"


_PLAIN_KINDS = (bool, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.layout)


def _text(value: object) -> str | None:
    """What a plain value, or a short tuple or list of such, looks like; None for any other."""
    kind = type(value)
    if kind is int:
        return shown(value)  # type: ignore[arg-type]
    if kind in _PLAIN_KINDS:
        text = repr(value[:80] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= 80 else text[:77] + "..."
    if isinstance(value, (tuple, list)) and kind in (tuple, list) and len(value) <= 4:
        texts = [None if isinstance(item, (tuple, list)) else _text(item) for item in value]
        if None not in texts:
            inner = ", ".join(map(str, texts)) + ("," if kind is tuple and len(texts) == 1 else "")
            return f"({inner})" if kind is tuple else f"[{inner}]"
    return None


def shown(value: float) -> str:
    """A number as an error text shows it; Python refuses to print an int of more than 4300 digits, and a fraction."""
    if isinstance(value, numbers.Rational):
        bits = max(int(value.numerator).bit_length(), int(value.denominator).bit_length())
        if bits > 256:
            return f"{'an int' if isinstance(value, int) else 'a fraction'} of {bits} bits"
    return str(value)


def need_tensor(name: str, value: object, *, written: bool = False) -> Tensor:
    """`value` as a dense tensor in memory whose sizes an int32 can hold; a copy of one that is lazily negated."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; it must be a torch.Tensor")
    tensor = plain.in_memory(name, value, written=written)
    for size in tensor.shape:
        if size > INT32_MAX:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; every size must be at most {INT32_MAX}")
    return tensor


def need_dims(name: str, tensor: Tensor, form: str) -> None:
    """As many dimensions as `form`, "(b, sq, hq, d)", names."""
    if tensor.dim() != form.count(",") + 1 - form.endswith(",)"):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {form}")


def need_shape(name: str, tensor: Tensor, shape: Sequence[int], form: str) -> None:
    """Exactly this shape; `form` says it in letters."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {form} = {tuple(shape)}")


def need_known_dtype(name: str, value: object, allowed: Sequence[torch.dtype], otherwise: str = "") -> None:
    """An argument that is itself one of these dtypes; what is none is not compared with them: arrays raise then."""
    if not isinstance(value, torch.dtype) or value not in allowed:
        wanted = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name} is {described(value)}; it must be one of {wanted}{otherwise}")


def need_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """One of these dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(dict.fromkeys(str(dtype)[6:] for dtype in allowed))
        raise ValueError(f"{name} has dtype {str(tensor.dtype)[6:]}; it must be {wanted}{why}")


def need_device(name: str, tensor: Tensor, device: torch.device, owner: str = "q") -> None:
    """On the same device as `owner`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {owner}'s device, {device}")


def need_unit_stride(name: str, tensor: Tensor) -> None:
    """A last dimension without gaps; the others may have any stride."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last stride must be 1")


def need_contiguous(name: str, tensor: Tensor) -> None:
    """No gaps at all."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def need_writable(name: str, tensor: Tensor) -> None:
    """Memory of its own for every element: what is written must not be an expanded view, nor overlap itself."""
    if memory.overlaps_itself(tensor):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it is written, so it must not be "
            "an expanded tensor, nor may its elements share memory otherwise"
        )


def need_index(name: str, value: object, shape: Sequence[int] | None, form: str, device: torch.device) -> Tensor:
    """An index tensor: int32 or int64, the last stride 1, on q's device, of this shape."""
    tensor = need_tensor(name, value)
    need_dtype(name, tensor, INDEX_DTYPES)
    need_device(name, tensor, device)
    need_dims(name, tensor, form)
    if shape is not None:
        need_shape(name, tensor, shape, form)
    need_unit_stride(name, tensor)
    return tensor


def is_kernel_index(tensor: Tensor) -> bool:
    """Whether kernels take an index tensor as it is."""
    return tensor.dtype is torch.int32 and tensor.is_contiguous()


def as_kernel_index(name: str, tensor: Tensor, *, exact: bool) -> Tensor:
    """An index tensor as kernels take it, int32 and contiguous; a copy where it is not.

    exact: whether to look at the numbers, which synchronises on a GPU: ValueError for one that an int32 cannot hold.
    Otherwise, and in a page_table, whose unread entries may hold anything, such a number becomes the largest or
    smallest int32, which names nothing either.
    """
    if tensor.dtype is not torch.int32:
        if exact and name != "page_table" and tensor.numel():
            low, high = (int(bound) for bound in torch.aminmax(tensor))
            if not -INT32_MAX <= low <= high <= INT32_MAX:
                wrong = high if high > INT32_MAX else low
                raise ValueError(f"{name} holds {wrong}; every number must be one that an int32 holds")
        tensor = tensor.clamp(-INT32_MAX, INT32_MAX).to(torch.int32)
    return tensor.contiguous()


def need_bool(name: str, value: object) -> None:
    """True or False, not a number that stands for it."""
    if value.__class__ is not bool:
        raise TypeError(f"{name} is {described(value)}; it must be a bool")


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers, which bools are not."""
    return not isinstance(tensor, plain.UNINITIALIZED) and tensor.dtype in _INTEGER_DTYPES


def need_integer(name: str, value: Any) -> int:
    """An int: one, or what has an index (a number of numpy, a 0-dim tensor of integers), but no bool."""
    if value.__class__ is int:
        number: int = value
        return number
    if isinstance(value, Tensor):
        if is_integer(value) and value.dim() == 0:
            plain.need_served_device(name, value)
            return int(plain.in_memory(name, value))
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        try:
            return operator.index(value)
        except TypeError:  # an array of numpy has an index where it is one integer
            pass
    raise TypeError(f"{name} is {described(value)}; it must be an int")


def need_number(name: str, value: Any) -> float:
    """A float or an int, of Python or numpy, and no bool; an int that no float holds stays one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {described(value)}; it must be a float")
    number: Any = value
    return float(number) if -FLOAT32_MAX <= number <= FLOAT32_MAX else number


def need_range(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; it must be between {low} and {high}{why}")


def need_window(window: Any) -> tuple[int, int]:
    """window_size as a pair of ints, -1 for a side without bound. Raises TypeError or ValueError.

    None, as the pair or in it, is unbounded; a tensor of two integers in the CPU's memory is a pair.
    """
    if window is None:
        return UNBOUNDED
    if isinstance(window, Tensor) and is_integer(window) and window.is_cpu:
        window = plain.in_memory("window_size", window).tolist()
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size is {described(window)}; it must be a pair of ints (left, right)")
    return _bound("left", window[0]), _bound("right", window[1])


def _bound(side: str, given: Any) -> int:
    name = f"window_size's {side} bound"
    bound = -1 if given is None else need_integer(name, given)
    if not -1 <= bound <= INT32_MAX:
        need_range(name, bound, -1, INT32_MAX, "; -1 is unbounded")
    return bound


class GradientError(NotImplementedError):
    """An input asks for gradients; the public functions may have them, a kernel has none."""


def refuse_derivatives(named: Iterable[tuple[str, Any]]) -> None:
    """There is no derivative: an argument that asks for one, forward or (in grad mode) backward, is an error."""
    if torch.is_grad_enabled():
        named = list(named)
        for name, value in named:
            refuse_gradients(name, value)
    refuse_tangents(named)


def refuse_tangents(named: Iterable[tuple[str, Any]]) -> None:
    """There is no forward-mode derivative: an argument that has a tangent is an error."""
    if plain.in_forward_mode():
        for name, value in named:
            plain.refuse_tangent(name, value)


def refuse_gradients(name: str, tensor: Any) -> None:
    """Where there is no backward pass, an input that asks for one, in grad mode, is an error."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        raise GradientError(
            f"{name} requires grad, and jit_kernel has no backward pass after it in this call: "
            "call it under torch.no_grad() or detach the tensor"
        )


def need_absent(name: str, value: Any, why: str) -> None:
    """None, in a call where the argument would have no meaning."""
    if value is not None:
        raise ValueError(f"{name} is {described(value)}; it must be None {why}")


def need_present(name: str, value: Any, why: str) -> None:
    """Not None, in a call that cannot do without."""
    if value is None:
        raise ValueError(f"{name} is None; it must be given {why}")
