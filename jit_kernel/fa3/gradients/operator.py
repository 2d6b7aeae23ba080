"""The backward pass as a torch operator, `torch.ops.jit_kernel.backward`, and what makes a forward operator call it.

A traced program holds the operator whole: what it does depends on the values of index tensors. Under torch.func the
forward pass is `_Attention` itself, which torch.func takes apart level by level; the operator runs at the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import UNBOUNDED, default_scale, lse_shape
from jit_kernel.fa3.checks.values import as_kernel_index
from jit_kernel.fa3.gradients import choice
from jit_kernel.fa3.gradients.call import Backward
from jit_kernel.fa3.gradients.checks import check, need_one_device

_FIELDS = fields(Backward)
# By annotation of a field: its type in the operator's schema. What may be None there is resolved by `_settled`.
_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "SymInt", "float": "float", "bool": "bool"}
_RESOLVED = {"softmax_scale": "float?", "max_seqlen_q": "SymInt?", "max_seqlen_k": "SymInt?"}
_PARAMETERS = ", ".join(
    f"{_RESOLVED.get(each.name) or _TYPES[str(each.type)]} {each.name}"
    + ("" if each.default is MISSING else f"={None if each.name in _RESOLVED else each.default}")
    for each in _FIELDS
)
_library: Any = torch.library.Library("jit_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"backward({_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)")
_below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
# The tensors that a forward call may have beside q, k and v, and the fields of a `Backward` that it has by their names.
_TENSORS = tuple(each.name for each in _FIELDS if each.type == "Tensor | None" and each.name != "grad_lse")
_INDICES = tuple(name for name in _TENSORS if name != "sinks")
_NAMED = tuple(each for each in _FIELDS if each.default is not MISSING and each.name != "grad_lse")
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Forward:
    """A forward operator and its arguments but for the tensors of `_Attention`."""

    operator: Callable[..., Any]
    rest: Mapping[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = {name: value for name, value in zip(_TENSORS, others, strict=True) if value is not None}
        named = {**self.rest, **tensors, "return_softmax_lse": True}
        with _below_autograd():
            found: tuple[Tensor, Tensor] = self.operator(q=q, k=k, v=v, **named)
        return found

    def backward(self, grads: tuple[Tensor, Tensor | None], results: tuple[Tensor, Tensor], *inputs: Any) -> list[Any]:
        """The backward operator's arguments; inputs: those of a call."""
        rest = self.rest
        left, right = rest.get("window_size", UNBOUNDED)
        right = 0 if rest.get("causal", False) else right
        named = {**rest, **dict(zip(_TENSORS, inputs[3:], strict=True))}
        named["attention_chunk"] = rest.get("attention_chunk") or 0
        others = [named.get(each.name, None if each.name in _RESOLVED else each.default) for each in _NAMED]
        return [grads[0], *inputs[:3], *results, rest.get("softmax_scale"), left, right, grads[1], *others]


def differentiable(operator: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention operator's arguments, by name; to be differentiated after q, k, v and sinks.

    lse can be differentiated where return_softmax_lse is given. Raises NotImplementedError where nothing serves the
    backward pass.
    """
    forward, tensors = _taken_apart(operator, arguments)
    if tensors[0].device.type != "cpu":  # a CPU serves what the checks let pass
        choice.served(_before_the_result(forward, tensors))
    found: tuple[Tensor, Tensor] = _Attention.apply(forward, *tensors)  # type: ignore[no-untyped-call]
    return found


def backward_of(arguments: Mapping[str, Any]) -> Backward:
    """The backward pass of a public function's arguments, by name, as `decide` looks at it: there is no result yet."""
    return _before_the_result(*_taken_apart(None, arguments))


def _taken_apart(operator: Any, arguments: Mapping[str, Any]) -> tuple[_Forward, list[Any]]:
    rest = dict(arguments)
    tensors = [rest.pop(name) for name in "qkv"]
    tensors += [rest.pop(name, None) for name in _TENSORS]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):  # without a default in the operator's schema
        if name in arguments:
            rest[name] = None
    return _Forward(operator, rest), tensors


def _before_the_result(forward: _Forward, tensors: list[Any]) -> Backward:
    q, v = tensors[0], tensors[2]
    out = q.new_empty(1).expand(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(1, dtype=torch.float32).expand(lse_shape(q))
    return _settled(Backward(*forward.backward((out, None), (out, lse), *tensors)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(forward: _Forward, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.forward, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        if not ctx.forward.rest.get("return_softmax_lse", False):
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(tensors))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        arguments = ctx.forward.backward((grad_out, grad_lse), (out, lse), *tensors)
        if torch._C._are_functorch_transforms_active():
            grads = _Backward.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            grads = torch.ops.jit_kernel.backward(*arguments)
        sinks = tensors[3 + _TENSORS.index("sinks")]
        of_sinks = None if sinks is None else grads[3].to(sinks.dtype)
        return (None, *grads[:3], *(of_sinks if name == "sinks" else None for name in _TENSORS))

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise NotImplementedError("q, k, v or sinks has a forward-mode tangent, which jit_kernel does not serve")

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise NotImplementedError("q, k or v is batched by torch.vmap, which jit_kernel does not serve")


class _Backward(torch.autograd.Function):
    """The operator in grad mode: its results can be made, and say by name that they cannot be differentiated again."""

    @staticmethod
    def forward(*arguments: Any) -> Four:
        with _below_autograd():
            made: Four = torch.ops.jit_kernel.backward.default(*arguments)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
        """Nothing is kept: there is no backward pass of the backward pass."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "the gradients of q, k, v and sinks cannot be differentiated: jit_kernel's attention has first derivatives "
            "alone"
        )

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise NotImplementedError(
            "grad_out has a forward-mode tangent: jit_kernel's attention has first derivatives alone"
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise NotImplementedError("grad_out is batched by torch.vmap, which jit_kernel's backward pass does not serve")


def _settled(call: Backward) -> Backward:
    """The same with both sides dense or both ragged, and what may be None resolved."""
    q, k = call.q, call.k
    longest: list[int] = [
        each.shape[1] if each.dim() == 4 else bound or each.shape[0]
        for each, bound in ((q, call.max_seqlen_q), (k, call.max_seqlen_k))
    ]
    call.max_seqlen_q, call.max_seqlen_k = longest
    if call.softmax_scale is None:
        call.softmax_scale = default_scale(q, None, only_qv=False)
    call.deterministic = call.deterministic or torch.are_deterministic_algorithms_enabled()
    if call.cu_seqlens_q is not None or call.cu_seqlens_k is not None:
        if call.cu_seqlens_q is None:  # one side as (b, s, h, d)
            call.cu_seqlens_q = _offsets_of(q)
            call.grad_out, call.out, call.q = (each.flatten(0, 1) for each in (call.grad_out, call.out, q))
            call.lse, call.grad_lse = _by_head(call.lse), None if call.grad_lse is None else _by_head(call.grad_lse)
        if call.cu_seqlens_k is None:
            call.cu_seqlens_k = _offsets_of(k)
            call.k, call.v = k.flatten(0, 1), call.v.flatten(0, 1)
    for name in _INDICES:
        index = getattr(call, name)
        if index is not None:
            setattr(call, name, as_kernel_index(name, index, exact=False))
    return call


def _by_head(lse: Tensor) -> Tensor:
    """(b, hq, sq) as (hq, b sq)."""
    return lse.transpose(0, 1).flatten(1)


def _offsets_of(rows: Tensor) -> Tensor:
    batch, length = rows.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=rows.device) * length


def _attend_backward(*arguments: Any) -> Four:
    """The operator's implementation on every device."""
    given = Backward(*arguments)
    check(given)
    q, k, v = given.q, given.k, given.v
    zeros = _like_inputs(given, torch.Tensor.new_zeros) if 0 in (q.numel(), k.numel()) else None
    call = _settled(given)
    if zeros is not None and (q.numel() == 0 or call.sinks is None):
        return zeros
    found = choice.gradients(call)
    of_sinks = q.new_empty(0, dtype=torch.float32) if found.sinks is None else found.sinks
    return found.q.view(q.shape), found.k.view(k.shape), found.v.view(v.shape), of_sinks


def _fake_backward(*arguments: Any) -> Four:
    """Results without numbers; torch comes here as soon as one of the tensors is on "meta"."""
    call = Backward(*arguments)
    need_one_device(call)
    return _like_inputs(call, torch.Tensor.new_empty)


def _like_inputs(call: Backward, new: Callable[..., Tensor]) -> Four:
    q, k, v = call.q, call.k, call.v
    of_sinks = new(q, 0 if call.sinks is None else q.shape[-2], dtype=torch.float32)
    return new(q, q.shape), new(k, k.shape), new(v, v.shape), of_sinks


def _with_autograd(*arguments: Any) -> Any:
    return _Backward.apply(*arguments)  # type: ignore[no-untyped-call]


_library.impl("backward", _attend_backward, "CompositeExplicitAutograd")
_library.impl("backward", _fake_backward, "Meta")
_library.impl("backward", _with_autograd, "Autograd")
