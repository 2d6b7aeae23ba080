"""The public functions as torch operators, for whatever traces a program; eager calls never come here.

While a function is traced (torch.compile, torch.export, make_fx, torch.jit.trace, fake tensors), its call becomes one
operator with a fake implementation (shapes and dtypes alone). When the traced program runs, the operator calls the
function of seam.py, which checks and computes. What a call writes is declared: `out`, and the caches when new keys are
appended. An operator may not return its own argument, so with `out` it returns an empty tensor in its place, and no lse
is an empty tensor too. Schemas are derived from the functions' signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from jit_kernel.fa3 import gradients, header, seam
from jit_kernel.fa3.call import (
    DENSE,
    FIELD_OF,
    FIELDS,
    KVCACHE,
    UNBOUNDED,
    VARLEN,
    Arguments,
    Call,
    Result,
    batch_of,
    lse_shape,
    result_dtype,
)
from jit_kernel.fa3.checks.forms import settle_absent_keys
from jit_kernel.fa3.checks.traced import refuse_untraceable, settle_types
from jit_kernel.fa3.checks.values import refuse_derivatives, refuse_tangents
from jit_kernel.fa3.gradients.operator import differentiable

_NAMESPACE = "jit_kernel"
# By annotation of a parameter: its type in an operator's schema. An int of cache_seqlens becomes a tensor before.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Tensor | int | None": "Tensor?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "bool | None": "bool?",
    "tuple[int, int]": "SymInt[]",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}
_PAIR = "(Tensor, Tensor)"

_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def schema_of(function: Callable[..., Any], result: str, written: tuple[str, ...] = ()) -> str:
    """The schema of a keyword-only function as an operator; `written` names the tensors that it may write."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        kind, default = _TYPES[parameter.annotation], parameter.default
        if parameter.name in written:
            kind = kind.replace("Tensor", f"Tensor({'abc'[written.index(parameter.name)]}!)")
        text = f"{kind} {parameter.name}"
        if default is not inspect.Parameter.empty and not isinstance(default, torch.dtype):
            text += f"={list(default) if isinstance(default, tuple) else default}"
        parameters.append(text)
    return f"(*, {', '.join(parameters)}) -> {result}"


def _define(
    name: str,
    function: str,
    fake: Callable[..., Any],
    result: str = _PAIR,
    written: tuple[str, ...] = (),
    wrap: bool = True,
) -> None:
    real = seam.FUNCTIONS[function]
    _library.define(name + schema_of(real, result, written))
    _library.impl(name, _as_operator(real) if wrap else real, "CompositeExplicitAutograd")
    _library.impl(name, _with_autograd(name, function), "Autograd")
    _library.impl(name, fake, "Meta")  # register_fake looks up its caller's source line, 0.7 ms each


def _as_operator(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A public function as an operator's implementation: two tensors, neither of them an argument."""

    def call(**arguments: Any) -> tuple[Tensor, Tensor]:
        result = function(**arguments)
        out, lse = result if isinstance(result, tuple) else (result, None)
        if arguments.get("out") is not None:
            out = out.new_empty(0)
        return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse

    return call


def _is_transformed(value: object) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _with_autograd(name: str, function: str) -> Callable[..., Any]:
    """An operator's autograd kernel: the forward pass where nothing asks for a derivative, under torch.func too."""

    def call(**arguments: Any) -> Any:
        operator = getattr(torch.ops.jit_kernel, name).default
        if function in FIELD_OF and not any(map(_is_transformed, arguments.values())):
            gradients.refuse_unserved(function, arguments)
            refuse_tangents(arguments.items())
            if gradients.are_wanted(arguments):
                return differentiable(operator, arguments)
        else:
            refuse_derivatives(arguments.items())
        with torch._C._AutoDispatchBelowAutograd():
            return operator(**arguments)

    return call


def _fake_attention(*, q: Tensor, out: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
    values: Tensor = rest["v_cache"] if "v_cache" in rest else rest["v"]
    if out is None:
        made = q.new_empty((*q.shape[:-1], values.shape[-1]), dtype=result_dtype(q.dtype))
    else:
        made = out.new_empty(0)
    shape = lse_shape(q) if rest.get("return_softmax_lse") else (0,)
    return made, q.new_empty(shape, dtype=torch.float32)


def _fake_metadata(*, batch_size: int, cache_seqlens: Tensor, **rest: Any) -> Tensor:
    return cache_seqlens.new_empty(header.length(batch_size, cache_seqlens.device.type), dtype=torch.int32)


def _fake_combine(
    *,
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    shape = out_partial.shape[1:]
    made = out_partial.new_empty(shape, dtype=out_dtype or out_partial.dtype) if out is None else out.new_empty(0)
    return made, lse_partial.new_empty(shape[:-1])


def _fake_merge(*, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


_define("varlen", VARLEN, _fake_attention, written=("out",))
# k_cache and v_cache are written only by a call that appends: declaring it of every call would copy whole caches.
_define("kvcache", KVCACHE, _fake_attention, written=("out",))
_define("kvcache_append", KVCACHE, _fake_attention, written=("k_cache", "v_cache", "out"))
_define("dense", DENSE, _fake_attention, written=("out",))
_define("metadata", "get_scheduler_metadata", _fake_metadata, "Tensor", wrap=False)
_define("combine", "flash_attn_combine", _fake_combine, written=("out",))
_define("merge_state", "merge_state", _fake_merge, wrap=False)

_OPERATORS = {VARLEN: "varlen", KVCACHE: "kvcache", DENSE: "dense"}
# By public function: each of its arguments with the field of a `Call` that holds it.
_FIELDS = {
    function: tuple((name, of.get(name, name)) for name in inspect.signature(seam.FUNCTIONS[function]).parameters)
    for function, of in FIELD_OF.items()
}


def _number(value: Any) -> Any:
    """An argument that is one number as a schema takes it: that of a tensor is read, or traced."""
    return value.item() if isinstance(value, Tensor) else value


def _window(window: Any) -> Any:
    """window_size as a schema takes it."""
    if window is None:
        return UNBOUNDED
    if isinstance(window, Tensor):
        window = window.tolist()
    if isinstance(window, (tuple, list)):
        return tuple(-1 if bound is None else _number(bound) for bound in window)
    return window


def attend(arguments: Arguments) -> Result:
    """A public attention function while it is traced."""
    call = Call(*arguments)
    if call.k is None:
        settle_absent_keys(call)
    if isinstance(call.seqused_k, (int, torch.SymInt)):
        call.seqused_k = call.q.new_full((batch_of(call),), call.seqused_k, dtype=torch.int32)  # fake if q is
    call.max_seqlen_q, call.max_seqlen_k = _number(call.max_seqlen_q), _number(call.max_seqlen_k)
    call.window_size = _window(call.window_size)
    named = {name: getattr(call, field) for name, field in _FIELDS[call.function]}
    gradients.refuse_unserved(call.function, named)
    refuse_tangents(named.items())
    name = "kvcache_append" if call.k_new is not None else _OPERATORS[call.function]
    operator = getattr(torch.ops.jit_kernel, name)
    # torch.func takes a function of autograd apart by itself, but no operator's autograd kernel.
    apart = not is_compiling() and gradients.are_differentiated(named)
    out, lse = differentiable(operator.default, named) if apart else operator(**named)
    if call.out is not None:
        out = call.out
    return (out, lse) if call.return_softmax_lse else out


def attend_traced(arguments: Arguments) -> Result:
    """The same outside of torch.compile and torch.export, where arguments may be anything yet."""
    call = Call(*arguments)
    function, fields = call.function, dict(_FIELDS[call.function])
    settled = settle(function, {name: getattr(call, field) for name, field in fields.items()})
    for name, value in settled.items():
        setattr(call, fields[name], value)
    return attend(tuple(getattr(call, name) for name in FIELDS))


def settle(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a public function as its operator takes them. Raises TypeError for one that it cannot take."""
    if arguments.get("only_qv") is True:  # then the keys may be absent
        keys = "k_cache" if "k_cache" in arguments else "k"
        arguments = {name: value for name, value in arguments.items() if name != keys or value is not None}
    settled = settle_types(seam.FUNCTIONS[function], arguments)
    appends = settled.get("k_cache") is not None and settled.get("k") is not None
    written = ("out", "k_cache", "v_cache") if appends else ("out",)
    refuse_untraceable(settled, written, gradients.DIFFERENTIABLE if function in (VARLEN, DENSE) else ())
    return settled


def plan(*, window_size: Any, **arguments: Any) -> Tensor:
    """`get_scheduler_metadata` while it is traced."""
    made: Tensor = torch.ops.jit_kernel.metadata(window_size=_window(window_size), **arguments)
    return made


def combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` while it is traced."""
    call = {"out_partial": out_partial, "lse_partial": lse_partial, "out": out, "out_dtype": out_dtype}
    refuse_derivatives(call.items())
    made, lse = torch.ops.jit_kernel.combine(**call)
    return (made if out is None else out), lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` while it is traced."""
    call = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    refuse_derivatives(call.items())
    merged: tuple[Tensor, Tensor] = torch.ops.jit_kernel.merge_state(**call)
    return merged
