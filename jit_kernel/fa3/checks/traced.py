"""What a call may hold that becomes a torch operator: what torch says of a schema's mistakes names no argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel.fa3.checks.memory import share_storage
from jit_kernel.fa3.checks.plain import (
    UNINITIALIZED,
    active_fake_mode,
    has_dispatch,
    in_functional_mode,
    is_functional,
    is_recorded,
    refusal_of_transform,
    wrapped_by_functional,
    wraps_fake,
)
from jit_kernel.fa3.checks.values import (
    INT32_MAX,
    described,
    is_integer,
    need_bool,
    need_integer,
    need_number,
    need_range,
    need_window,
    need_writable,
    shown,
)

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def settle_types(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function of seam.py as its operator takes them. Raises TypeError for one that it cannot take.

    Symbolic numbers, and tensors whose numbers are recorded, stay.
    """
    parameters = inspect.signature(function).parameters
    return {name: _settled(name, parameters[name].annotation, value) for name, value in arguments.items()}


def _settled(name: str, annotation: str, value: Any) -> Any:
    kind, *others = annotation.split(" | ")
    if value is None and ("None" in others or kind.startswith("tuple")):
        return value
    if kind == "Tensor":
        return _whole(name, value) if "int" in others and not isinstance(value, Tensor) else _shaped(name, value)
    if kind == "torch.dtype":
        if not isinstance(value, torch.dtype):
            raise TypeError(f"{name} is {described(value)}; it must be a torch.dtype")
        return value
    if kind == "bool":
        if not isinstance(value, torch.SymBool):
            need_bool(name, value)
        return value
    if kind == "int":
        return value if isinstance(value, _SYMBOLIC) else _whole(name, value)
    if kind == "float":
        if isinstance(value, _SYMBOLIC):
            return value
        number = need_number(name, value)
        try:
            return float(number)  # an int may be too large for the schema's
        except OverflowError:
            raise ValueError(f"{name} is {shown(number)}; it must be finite in float32") from None
    return _pair(value)


def _pair(window: Any) -> Any:
    """window_size; symbolic bounds, and what is recorded of tensors, stay."""
    if isinstance(window, Tensor):
        recorded = is_integer(window) and window.is_cpu and window.shape == (2,)
        return window if recorded else need_window(window)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return need_window(window)
    bounds = [_whole("window_size", bound, -1) if isinstance(bound, Tensor) else bound for bound in window]
    stays = any(isinstance(bound, (*_SYMBOLIC, Tensor)) for bound in bounds)
    return tuple(bounds) if stays else need_window(bounds)


def _whole(name: str, value: Any, low: int = 0) -> int | Tensor:
    """An int that every argument's own range lies within; a schema's int64 would overflow without naming it.

    A 0-dim tensor stays where its number is recorded, or where it has none; else it is read, in spite of any mode.
    """
    if isinstance(value, Tensor) and is_integer(value) and value.dim() == 0 and value.device.type != "meta":
        stays = is_recorded() or type(value) is not Tensor or is_functional(value)
        if stays:
            return value
    with torch._C._DisableTorchDispatch():
        number = need_integer(name, value)
    need_range(name, number, low, INT32_MAX)
    return number


def _shaped(name: str, value: object) -> Tensor:
    """A tensor of any kind that has a shape."""
    if not isinstance(value, Tensor) or isinstance(value, UNINITIALIZED):
        raise TypeError(f"{name} is {described(value)}; it must be a torch.Tensor with a shape")
    if value.is_nested or value.layout is not torch.strided:
        what = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name} is {what}; it must be a dense (strided) tensor")
    return value


def refuse_untraceable(
    arguments: Mapping[str, Any], written: tuple[str, ...], differentiable: tuple[str, ...] = ()
) -> None:
    """Raise for a tensor that no operator can take: one of torch.func's transforms, or of another kind than the mode's.

    Fake tensors go with fake ones; what is `written` under FunctionalTensorMode must be functional. torch.func may
    differentiate after those named `differentiable`.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        refused = refusal_of_transform(name, value, differentiable=name in differentiable)
        if refused is not None:
            raise refused
    _refuse_beside_fakes(tensors)
    _refuse_meta(tensors)
    if in_functional_mode():
        _refuse_beside_functional(tensors, written)
    else:
        _refuse_functional(tensors)
    _refuse_shared_memory(tensors, written)


def _refuse_shared_memory(tensors: Mapping[str, Tensor], written: tuple[str, ...]) -> None:
    """What is written overlaps neither itself nor another tensor, as far as sizes are known while tracing."""
    lying = {name: inner for name, value in tensors.items() if _is_laid_out(inner := wrapped_by_functional(value))}
    for one in written:
        if one not in lying:
            continue
        need_writable(one, lying[one])
        for name, tensor in lying.items():
            if name != one and share_storage(lying[one], tensor):
                raise ValueError(f"{one} shares its memory with {name}; it must have memory of its own: it is written")


def _is_laid_out(tensor: Tensor) -> bool:
    """Whether a tensor has a storage, and lies in it at a place that is no symbol."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def _refuse_meta(tensors: Mapping[str, Tensor]) -> None:
    """A meta tensor beside others would make torch take shapes alone for the answer."""
    others = [name for name, value in tensors.items() if value.device.type != "meta"]
    for name, value in tensors.items():
        if others and value.device.type == "meta":
            raise ValueError(f"{name} is on meta; it must be on {others[0]}'s device, {tensors[others[0]].device}")


def _refuse_functional(tensors: Mapping[str, Tensor]) -> None:
    from torch._subclasses.functional_tensor import FunctionalTensor

    for name, value in tensors.items():
        if isinstance(value, FunctionalTensor):
            raise TypeError(f"{name} is a FunctionalTensor outside of FunctionalTensorMode; it must be a plain tensor")


def _refuse_beside_functional(tensors: Mapping[str, Tensor], written: tuple[str, ...]) -> None:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    for name, value in tensors.items():
        if isinstance(value, FunctionalTensor):
            continue
        # Of a subclass torch makes the answer one too, which a functional answer cannot be.
        if not isinstance(value, FakeTensor) and (has_dispatch(value) or type(value) not in (Tensor, Parameter)):
            raise TypeError(
                f"{name} is a {type(value).__name__}, under FunctionalTensorMode; it must be a FunctionalTensor"
            )
        if name in written:
            raise TypeError(
                f"{name} is no FunctionalTensor, under FunctionalTensorMode; it is written, so it must be one"
            )


def _refuse_beside_fakes(tensors: Mapping[str, Tensor]) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    fakes = {name: value for name, value in tensors.items() if isinstance(value, FakeTensor)}
    fake = next(iter(fakes), None)
    mode = active_fake_mode() if fake is None else fakes[fake].fake_mode
    if mode is None or mode.allow_non_fake_inputs:
        return
    for name, value in tensors.items():
        if name not in fakes and not wraps_fake(value) and (value.dim() > 0 or is_functional(value)):
            if fake is None:
                raise TypeError(f"{name} is no FakeTensor, under FakeTensorMode; it must be one")
            raise TypeError(f"{fake} is a FakeTensor and {name} is none; either all of a call must be, or none")
