"""What a tensor must be for a kernel to be launched on it: the one place that decides, for every function and argument.

A kernel reads and writes addresses, so a tensor must have memory that holds its numbers as they are. Tensors without
it: those of torch's transforms (fake, functional, batched, gradient-tracking), wrapper subclasses, efficient zeros,
freed storages. Tensors whose numbers are not what lies in memory: lazily negated views, nested ones, and dual ones,
whose tangent would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from jit_kernel import config

T = TypeVar("T")
_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_mode_of = torch._C._get_dispatch_mode
count_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
transform = torch._C._functorch.peek_interpreter_stack
_count_before_dispatch: Any = torch._ops._len_torch_dispatch_stack_pre_dispatch
_unpack_dual: Any = forward_ad.unpack_dual
has_function_mode = torch._C._is_torch_function_mode_enabled

UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)  # they have no shape, and say so by raising

# The address of a tensor without memory is its offset into the storage that it has not: no memory is as large as this,
# and most memory of a process lies above it. Below it, whoever asks for an address asks for the storage too.
SURE_ADDRESS = 1 << 44


class TracedTensorError(TypeError):
    """A fake or functional tensor: a torch operator can take it, a kernel cannot."""


def is_traced() -> bool:
    """Whether torch records or replaces operators here: FakeTensorMode, make_fx, torch.jit.trace, export.

    A dispatch mode that only looks on changes no result, and is not asked.
    """
    return is_recorded() or bool(count_modes() and any(map(_mode_of, _TRACING_MODES)))


def is_recorded() -> bool:
    """Whether torch records the operators that run here: make_fx, torch.jit.trace, export."""
    if tracing_state() is not None or (count_modes() and _mode_of(torch._C._TorchDispatchModeKey.PROXY) is not None):
        return True
    # make_fx(pre_dispatch=True) keeps its mode in a stack of its own, beside a mode for functions.
    return bool(has_function_mode() and _count_before_dispatch())


def is_transformed() -> bool:
    """Whether torch.vmap or a transform of torch.func runs here, of whatever tensors."""
    return transform() is not None


def refuse_traced(function: str) -> None:
    """What no operator stands for cannot be traced: its kernels would run once, on the example's numbers."""
    if is_traced() or is_transformed():
        raise NotImplementedError(
            f"{function} of _load_fa3_kernels() cannot be traced (FakeTensorMode, make_fx, torch.jit.trace, "
            f"torch.export) or transformed (torch.func); jit_kernel.{function} becomes a torch operator there"
        )


def are_wrapped(named: Mapping[str, object]) -> bool:
    """Whether a transform of torch.func wraps one of the arguments, though nothing depends on it.

    Raises NotImplementedError for one that it transforms.
    """
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        refused = refusal_of_transform(name, value)
        if refused is not None:
            raise refused
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors.values()))


def outside_of_transforms(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) where torch.func transforms something else: what it allocates is plain memory."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        return function(*arguments)


def in_memory(name: str, tensor: Tensor, *, written: bool = False) -> Tensor:
    """The tensor to launch on: the given one, or a lazily negated or asynchronous one as plain memory.

    written: whether the call writes it: then it must be plain memory already. Raises TypeError that names the argument;
    NotImplementedError for what transforms of torch.func pass.
    """
    kind = tensor.__class__
    if kind is not Tensor and kind is not Parameter:
        with torch._C.DisableTorchFunctionSubclass():
            return _in_memory(name, tensor, written)
    return _in_memory(name, tensor, written)


def _in_memory(name: str, tensor: Tensor, written: bool) -> Tensor:
    if isinstance(tensor, UNINITIALIZED):
        raise TypeError(f"{name} is an {type(tensor).__name__}; it must have a shape and memory (materialize())")
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; it must be a dense one: sequences of different lengths lie end to end, "
            "with cu_seqlens_q and cu_seqlens_k"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; it must be a dense (strided) tensor")
    if tensor.__class__ is not Tensor and tensor.__class__ is not Parameter:
        tensor = _of_subclass(name, tensor, written)
    # Nothing serves the meta device: it has an error of its own, or that of another device than q's.
    if not is_in_memory(tensor) and tensor.device.type != "meta":
        raise _refusal(name, tensor)
    if not tensor.is_neg():
        return tensor
    if written:
        raise TypeError(f"{name} is a lazily negated view; it is written, so it must be plain memory")
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:  # torch negates no such dtype
        return tensor._neg_view().float().neg().to(tensor.dtype)
    return tensor.resolve_neg()


def is_in_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage has memory, or the tensor is empty and needs none.

    The tensor's own address says nothing: without memory it is the offset into the storage.
    """
    try:
        if tensor.untyped_storage().data_ptr() != 0:
            return True
    except (RuntimeError, ValueError):  # torch's words for a tensor without storage, and for one without shape
        return False
    # An empty tensor has no memory. A wrapper that is empty is a wrapper still, unless it answers for its memory.
    wraps = has_dispatch(tensor) and type(tensor).untyped_storage is Tensor.untyped_storage
    return tensor.numel() == 0 and not wraps and not torch._is_functional_tensor(tensor)


def all_in_memory(tensors: Iterable[object]) -> bool:
    """Whether each of them that is a tensor is in memory."""
    return all(is_in_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def need_served_device(name: str, tensor: Tensor) -> None:
    """On a kind of device that some implementation serves; `name` is the argument that the others must agree with."""
    if tensor.device.type not in config.IMPLEMENTATIONS:
        raise NotImplementedError(f"{name} is on {tensor.device}: jit_kernel serves cpu, cuda and musa")


def has_dispatch(tensor: Tensor) -> bool:
    """Whether a tensor's class answers for torch's operations itself."""
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def _of_subclass(name: str, tensor: Tensor, written: bool) -> Tensor:
    """A subclass that owns memory, or what an asynchronous one comes to."""
    if not has_dispatch(tensor):
        return tensor
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(tensor, (FakeTensor, FunctionalTensor)):
        raise _refusal_of_traced(name, type(tensor).__name__)
    if is_in_memory(tensor):
        return tensor if written else _over_memory_of(tensor)
    wait = getattr(tensor, "wait", None)
    if wait is None or written:
        return tensor
    try:
        waited = wait()  # AsyncCollectiveTensor, the result of a functional collective
    except RuntimeError as error:
        raise ValueError(f"{name} is a {type(tensor).__name__} that cannot be waited for: {error}") from error
    return in_memory(name, waited) if isinstance(waited, Tensor) and waited is not tensor else tensor


def _over_memory_of(tensor: Tensor) -> Tensor:
    """A plain tensor over a subclass's memory: what the subclass says of torch's operations is not asked."""
    if type(tensor).untyped_storage is not Tensor.untyped_storage:  # its memory is not what torch knows of
        return tensor
    with torch._C._DisableTorchDispatch():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _refusal_of_traced(name: str, what: str) -> TracedTensorError:
    return TracedTensorError(
        f"{name} is a {what}, which has no memory; the functions of jit_kernel.flash_attention_v3 take it as torch "
        "operators, these kernels do not"
    )


def _refusal(name: str, tensor: Tensor) -> Exception:
    """The error for a tensor that has no memory."""
    refused = refusal_of_transform(name, tensor)
    if refused is not None:
        return refused
    if has_dispatch(tensor):
        return TypeError(
            f"{name} is a {type(tensor).__name__}, a tensor subclass without memory of its own; "
            "it must be a plain tensor (of a DTensor, to_local())"
        )
    what = "is an efficient zero tensor" if tensor._is_zerotensor() else "has no memory behind it"
    return TypeError(f"{name} {what}; it must be a tensor with {tensor.numel()} numbers in memory")


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a transform of torch.func differentiates after a tensor, backward."""
    return torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad


def refusal_of_transform(name: str, tensor: Tensor, *, differentiable: bool = False) -> NotImplementedError | None:
    """The error for a tensor that one of torch.func's transforms made, None for any other.

    differentiable: whether torch.func may differentiate after it, backward.
    """
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(tensor):
        return NotImplementedError(
            f"{name} is batched by torch.vmap, which jit_kernel does not serve: the functions have a batch dimension, "
            "and cu_seqlens for sequences of different lengths"
        )
    if functorch.is_gradtrackingtensor(tensor) and torch.is_inference_mode_enabled():
        return NotImplementedError(
            f"{name} is a tensor of torch.func (grad, vjp or jvp) under torch.inference_mode(), which torch gives no "
            "operator: use torch.no_grad() instead"
        )
    if differentiable and is_differentiated(tensor) and not _has_tangent(tensor):
        return refusal_of_transform(name, functorch.get_unwrapped(tensor), differentiable=True)
    if functorch.is_gradtrackingtensor(tensor) and (tensor.requires_grad or _has_tangent(tensor)):
        return NotImplementedError(
            f"{name} is differentiated by torch.func (grad, vjp or jvp); jit_kernel has no such derivative of it: "
            "detach the tensor"
        )
    if tensor.__class__ in (Tensor, Parameter) and torch._is_functional_tensor(tensor):
        return NotImplementedError(
            f"{name} is a tensor of torch.func.functionalize, which jit_kernel does not serve: its operators declare "
            "that they may write; torch.compile and torch.export turn them into functions"
        )
    return None


def active_fake_mode() -> Any:
    """The FakeTensorMode that is on, None where there is none."""
    return _mode_of(torch._C._TorchDispatchModeKey.FAKE) if count_modes() else None


def in_functional_mode() -> bool:
    """Whether a FunctionalTensorMode is on."""
    return bool(count_modes()) and _mode_of(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def is_functional(tensor: Tensor) -> bool:
    """Whether a functionalization of torch's wraps a tensor, which may be a fake one."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, FunctionalTensor) or torch._is_functional_tensor(tensor)


def wrapped_by_functional(tensor: Tensor) -> Tensor:
    """What a functionalization of torch's wraps, the tensor itself where none does."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    inner: Tensor = tensor.elem if isinstance(tensor, FunctionalTensor) else tensor
    return torch._from_functional_tensor(inner) if torch._is_functional_tensor(inner) else inner


def wraps_fake(tensor: Tensor) -> bool:
    """Whether a functional tensor wraps a fake one."""
    from torch._subclasses.fake_tensor import FakeTensor

    inner = wrapped_by_functional(tensor)
    return inner is not tensor and isinstance(inner, FakeTensor)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents here."""
    return forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    if not in_forward_mode():
        return False
    try:
        # Under FakeTensorMode torch fails to look, and leaves its dispatch without autograd and tracing for good.
        with torch._C._DisableTorchDispatch():
            return _unpack_dual(tensor).tangent is not None
    except RuntimeError:  # a tensor that torch cannot look at may have one
        return True


def refuse_tangent(name: str, value: Any) -> None:
    """A forward-mode derivative that would be lost. torch.no_grad() does not switch such derivatives off."""
    if isinstance(value, Tensor) and _has_tangent(value):
        raise NotImplementedError(
            f"{name} has a forward-mode tangent; jit_kernel has no forward-mode derivatives: "
            "pass its primal (torch.autograd.forward_ad.unpack_dual) or detach the tensor"
        )
