"""Tensors that are not plain memory: `KINDS` makes each kind from a plain tensor, with the same values if it has any.

What a call must do with one stands in `must`: "serve" it, "refuse" it by the argument's name, or "either", which is to
answer what its values mean, or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._functorch.eager_transforms import _create_differentiable, jvp_increment_nesting
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

functorch = torch._C._functorch
CANNOT = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, AssertionError)


@dataclass
class Surroundings:
    """What must stay open around a call, and modes that its tensors share."""

    stack: ExitStack
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


@dataclass(frozen=True)
class Made:
    """A tensor of some kind; `means` is plain and holds its values, None where it has none; `memory` is behind it."""

    given: Any
    means: Tensor | None
    memory: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()  # memory that must not change, whatever is written


@dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[Surroundings, Tensor], Made]
    must: str = "either"


class PlainSubclass(Tensor):
    """A subclass that changes nothing."""


class FunctionSubclass(Tensor):
    """A subclass with a __torch_function__ of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapper(Tensor):
    """A tensor without memory of its own, as DTensor is: what it wraps answers for it."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                             device=inner.device, storage_offset=inner.storage_offset())  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def inner(x: object) -> object:
            return x.inner if isinstance(x, cls) else x

        return function(*tree_map(inner, args), **tree_map(inner, kwargs or {}))


class SilentWrapper(Wrapper):
    """One that refuses every operation."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"{function} is not for this tensor")


class DispatchSubclass(Tensor):
    """A subclass with memory of its own and a __torch_dispatch__."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with no_dispatch():
            return function(*args, **(kwargs or {}))


def negated(x: Tensor) -> Tensor:
    """-x in memory of its own with x's strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
        y.view(torch.uint8).copy_(x.view(torch.uint8) ^ 0x80)
    else:
        y.copy_(x.neg())
    return y


def _copy(x: Tensor) -> Tensor:
    """x with its start and strides in memory of its own, for what may or may not write through to it."""
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()
    made = torch.empty(0, dtype=x.dtype, device=x.device)
    return made.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _shared_copy(around: Surroundings, x: Tensor) -> Tensor:
    """The same, in one memory for all tensors of a call that share theirs."""
    storage = x.untyped_storage()

    def make() -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage).clone()

    with outside():  # in the mode of an earlier one the copy would be functional itself, and wrapped twice
        memory = around.once(f"copy {storage.data_ptr()}", make)
        made = torch.empty(0, dtype=x.dtype, device=x.device)
        return made.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _neg_view(_: Surroundings, x: Tensor) -> Made:
    memory = negated(x)
    return Made(memory._neg_view(), x, (memory,))


def _conj_imag(_: Surroundings, x: Tensor) -> Made:
    memory = torch.complex(torch.zeros_like(x), negated(x))
    return Made(memory.conj().imag, x, (memory,))


def _fake_of(around: Surroundings, x: Tensor) -> Tensor:
    mode = around.once("fake", FakeTensorMode)
    return mode.from_tensor(x)


def _fake(around: Surroundings, x: Tensor) -> Made:
    return Made(_fake_of(around, x), None)


def _fake_in_mode(around: Surroundings, x: Tensor) -> Made:
    made = _fake_of(around, x)
    around.once("fake mode", lambda: around.stack.enter_context(around.shared["fake"]))
    return Made(made, None)


def _functional(around: Surroundings, x: Tensor) -> Made:
    return Made(torch._to_functional_tensor(_shared_copy(around, x)), x)


def _functional_subclass(around: Surroundings, x: Tensor) -> Made:
    made = _shared_copy(around, x)
    mode = around.once("functional", FunctionalTensorMode)
    around.once("functional mode", lambda: around.stack.enter_context(mode))
    return Made(FunctionalTensor.to_functional(made), x)


def _functionalized(around: Surroundings, x: Tensor) -> Made:
    def level() -> int:
        made: int = functorch._func_increment_nesting(True)
        around.stack.callback(functorch._func_decrement_nesting)
        return made

    made = _shared_copy(around, x)
    return Made(functorch._wrap_functional_tensor(made, around.once("functionalize", level)), x)


def _batched(around: Surroundings, x: Tensor) -> Made:
    def level() -> int:
        made: int = functorch._vmap_increment_nesting(2, "error")
        around.stack.callback(functorch._vmap_decrement_nesting)
        return made

    with outside():  # inside of an earlier transform it would be one of its tensors
        memory = torch.stack([x, x])
    return Made(functorch._add_batch_dim(memory, 0, around.once("vmap", level)), x, (memory,))


def _of_grad(around: Surroundings, x: Tensor) -> Made:
    def level() -> int:
        made: int = functorch._grad_increment_nesting()
        around.stack.callback(functorch._grad_decrement_nesting)
        return made

    # As torch.func.grad does: a plain leaf that requires grad would be served, and have its gradient.
    return Made(_create_differentiable(functorch._wrap_for_grad(x, around.once("grad", level))), x, (x,))


def _dual(around: Surroundings, x: Tensor) -> Made:
    around.once("dual", lambda: around.stack.enter_context(fwAD.dual_level()))
    return Made(fwAD.make_dual(x, torch.ones_like(x)), x, (x,))


def _of_jvp(around: Surroundings, x: Tensor) -> Made:
    def level() -> None:
        around.stack.enter_context(jvp_increment_nesting())
        around.stack.enter_context(fwAD._set_fwd_grad_enabled(True))
        around.once("dual", lambda: around.stack.enter_context(fwAD.dual_level()))

    around.once("jvp", level)
    return Made(fwAD.make_dual(x, torch.ones_like(x)), x, (x,))


def _requires_grad(_: Surroundings, x: Tensor) -> Made:
    return Made(x.detach().requires_grad_(), x, (x,))


def _inner_of_a_graph(_: Surroundings, x: Tensor) -> Made:
    memory = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x).requires_grad_()
    return Made(memory.view_as(memory), x, (memory,))


def _parameter(_: Surroundings, x: Tensor) -> Made:
    return Made(torch.nn.Parameter(x, requires_grad=False), x, (x,))


def _parameter_of_a_model(_: Surroundings, x: Tensor) -> Made:
    return Made(torch.nn.Parameter(x), x, (x,))


def _efficient_zero(_: Surroundings, x: Tensor) -> Made:
    return Made(torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(x))


def _freed(_: Surroundings, x: Tensor) -> Made:
    """What a sharded model leaves of a parameter between two uses."""
    if x.numel() == 0:
        raise ValueError("there is nothing to free")
    made = x.clone()
    made.untyped_storage().resize_(0)
    return Made(made, None)


def _lazy_clone(_: Surroundings, x: Tensor) -> Made:
    original = _copy(x)
    return Made(torch._lazy_clone(original), _copy(x), kept=(original,))


def _uninitialized(_: Surroundings, x: Tensor) -> Made:
    return Made(torch.nn.parameter.UninitializedParameter(requires_grad=False), None)


def _inference(_: Surroundings, x: Tensor) -> Made:
    with torch.inference_mode():
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        made.copy_(x)
    return Made(made, x, (made,))


def _nested(layout: torch.layout) -> Callable[[Surroundings, Tensor], Made]:
    def make(_: Surroundings, x: Tensor) -> Made:
        return Made(torch.nested.nested_tensor(list(x.unbind()), layout=layout), None)

    return make


def _quantized(_: Surroundings, x: Tensor) -> Made:
    return Made(torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), None)


def _masked(_: Surroundings, x: Tensor) -> Made:
    from torch.masked import masked_tensor

    return Made(masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), None)


def _one_rank(around: Surroundings) -> Any:
    """A process group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def _gathered(around: Surroundings, x: Tensor) -> Made:
    import torch.distributed._functional_collectives as collectives

    return Made(collectives.all_gather_tensor(x, 0, _one_rank(around)), x)


def _dtensor(around: Surroundings, x: Tensor) -> Made:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    _one_rank(around)
    mesh = around.once("mesh", lambda: init_device_mesh("cpu", (1,)))
    return Made(DTensor.from_local(x, mesh, [Replicate()], run_check=False), x, (x,))


def _simple(function: Callable[[Tensor], Any], *, means: bool = True) -> Callable[[Surroundings, Tensor], Made]:
    return lambda _, x: Made(function(x), x if means else None, (x,) if means else ())


# Kinds that open a transform or a mode, in which no plain tensor can be made: they come last, those of a mode behind
# the others, which torch fails to make under FakeTensorMode.
TRANSFORMS = ("functionalized", "batched", "of grad", "of jvp", "dual")
MODES = ("fake in its mode", "functional subclass")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("fake", _fake),
        Kind("fake in its mode", _fake_in_mode),
        Kind("functional", _functional),
        Kind("functional subclass", _functional_subclass),
        Kind("functionalized", _functionalized),
        Kind("batched", _batched),
        Kind("of grad", _of_grad, "refuse"),
        Kind("of jvp", _of_jvp, "refuse"),
        Kind("dual", _dual, "refuse"),
        Kind("requires grad", _requires_grad, "refuse"),
        Kind("inner of a graph", _inner_of_a_graph, "refuse"),
        Kind("parameter", _parameter, "serve"),
        Kind("parameter of a model", _parameter_of_a_model, "refuse"),
        Kind("neg view", _neg_view),
        Kind("conj imag", _conj_imag),
        Kind("efficient zero", _efficient_zero),
        Kind("freed", _freed, "refuse"),
        Kind("lazy clone", _lazy_clone, "serve"),
        Kind("uninitialized", _uninitialized),
        Kind("inference", _inference, "serve"),
        Kind("buffer", _simple(lambda x: torch.nn.Buffer(x)), "serve"),
        Kind("sparse", _simple(Tensor.to_sparse, means=False), "refuse"),
        Kind("sparse csr", _simple(Tensor.to_sparse_csr, means=False), "refuse"),
        Kind("nested", _nested(torch.strided), "refuse"),
        Kind("nested jagged", _nested(torch.jagged), "refuse"),
        Kind("quantized", _quantized, "refuse"),
        Kind("mkldnn", _simple(Tensor.to_mkldnn, means=False), "refuse"),
        Kind("meta", _simple(lambda x: x.to("meta"), means=False)),
        Kind("masked", _masked),
        Kind("plain subclass", _simple(lambda x: x.as_subclass(PlainSubclass))),
        Kind("function subclass", _simple(lambda x: x.as_subclass(FunctionSubclass))),
        Kind("dispatch subclass", _simple(lambda x: Tensor._make_subclass(DispatchSubclass, x))),
        Kind("wrapper", _simple(Wrapper)),
        Kind("silent wrapper", _simple(SilentWrapper)),
        Kind("two tensors", _simple(lambda x: TwoTensor(x, x.clone()))),
        Kind("gathered", _gathered),
        Kind("dtensor", _dtensor),
    )
}


@contextmanager
def outside() -> Iterator[None]:
    """As if no transform and no mode were active."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
        yield


def state_of_torch() -> dict[str, Any]:
    """What of torch's state a call may not leave changed: this thread's dispatch, modes, levels and transforms."""
    return {
        "included keys": torch._C._dispatch_tls_local_include_set().raw_repr(),
        "excluded keys": torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "function subclasses": torch._C._is_torch_function_enabled(),
        "tracing": torch._C._get_tracing_state() is not None,
        "transforms": len(functorch.get_interpreter_stack() or ()),
        "forward-mode level": fwAD._current_level,
        "grad": (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def values(x: Any) -> Tensor | None:
    """A result's values as a plain tensor; None for a tensor that has none (fake, meta). To be called outside()."""
    while functorch.is_functorch_wrapped_tensor(x):
        place = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1
        x = functorch.get_unwrapped(x)
        x = x.select(place, 0) if place >= 0 else x
    if isinstance(x, FunctionalTensor):
        torch._sync(x)
        x = x.elem
    if torch._is_functional_tensor(x):
        torch._sync(x)
        x = torch._from_functional_tensor(x)
    if isinstance(x, Wrapper):
        x = x.inner
    if isinstance(x, TwoTensor):
        x = x.a
    if hasattr(x, "to_local"):
        x = x.to_local()
    if hasattr(x, "trigger_wait"):
        x = x.trigger_wait()
    if isinstance(x, FakeTensor) or x.is_meta:
        return None
    with torch.no_grad(), no_dispatch():
        x = x.detach()
        x = x.as_subclass(Tensor) if type(x) is not Tensor else x
        if x.is_neg():
            return negated(x._neg_view())  # torch resolves no sign of fp8
        return x.resolve_conj()
