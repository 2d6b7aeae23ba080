"""Checks of one argument at a time. Each raises with the argument's name, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38
FLOAT32_MIN = 1.2e-38  # the smallest normal number: below it a division overflows
MAX_SPLITS = 256  # what FA3's combine takes, and more than any machine has use for

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def described(value: object) -> str:
    """A value as an error text shows it: a tensor by its dtype and shape, all else by repr and type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype)[6:]} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def need_tensor(name: str, value: object) -> Tensor:
    """`value` as a dense tensor whose sizes an int32 can hold."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; it must be a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; it must be a dense (strided) tensor")
    for size in value.shape:
        if size > INT32_MAX:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; every size must be at most {INT32_MAX}")
    return value


def need_dims(name: str, tensor: Tensor, form: str) -> None:
    """As many dimensions as `form`, "(b, sq, hq, d)", names."""
    if tensor.dim() != form.count(",") + 1 - form.endswith(",)"):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {form}")


def need_shape(name: str, tensor: Tensor, shape: Sequence[int], form: str) -> None:
    """Exactly this shape; `form` says it in letters."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {form} = {tuple(shape)}")


def need_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """One of these dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype)[6:] for dtype in allowed)
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
    """Memory of its own for every element: what is written must not be an expanded view."""
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride == 0:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; it is written, so it must not be an expanded tensor"
            )


def need_index(name: str, value: object, shape: Sequence[int] | None, form: str, device: torch.device) -> Tensor:
    """An index tensor: int32, contiguous, on q's device, of this shape."""
    tensor = need_tensor(name, value)
    need_dtype(name, tensor, (torch.int32,))
    need_device(name, tensor, device)
    need_dims(name, tensor, form)
    if shape is not None:
        need_shape(name, tensor, shape, form)
    need_contiguous(name, tensor)
    return tensor


def need_bool(name: str, value: object) -> None:
    """True or False, not a number that stands for it."""
    if value.__class__ is not bool:
        raise TypeError(f"{name} is {described(value)}; it must be a bool")


def need_integer(name: str, value: object) -> None:
    """An int, and not a bool."""
    if value.__class__ is not int:
        raise TypeError(f"{name} is {described(value)}; it must be an int")


def need_number(name: str, value: object) -> None:
    """A float or an int, and not a bool."""
    if value.__class__ is not float and value.__class__ is not int:
        raise TypeError(f"{name} is {described(value)}; it must be a float")


def need_range(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}{why}")


def need_window(window: Any) -> tuple[int, int]:
    """window_size as a pair of ints, -1 for a side without bound. Raises TypeError or ValueError."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size is {described(window)}; it must be a pair of ints (left, right)")
    left, right = window
    for side, bound in (("left", left), ("right", right)):
        need_integer(f"window_size's {side} bound", bound)
        need_range(f"window_size's {side} bound", bound, -1, INT32_MAX, "; -1 is unbounded")
    return left, right


def refuse_gradients(name: str, tensor: Any) -> None:
    """There is no backward pass: an input that asks for one, in grad mode, is an error."""
    if getattr(tensor, "requires_grad", False):
        raise NotImplementedError(
            f"{name} requires grad; jit_kernel has the forward pass alone: "
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
