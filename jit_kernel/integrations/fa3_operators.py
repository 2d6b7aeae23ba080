"""The operators `torch.ops.flash_attn_3.*` with FlashAttention-3's schemas, on every device that jit_kernel serves.

`flash_attn_interface.install()` registers them. They are below autograd, as there: `flash_attn_interface`'s functions
are what can be differentiated, and torch's own operators once torch's "FA3" is active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3 as public
from jit_kernel.fa3.gradients import cuda
from jit_kernel.integrations import fa3_attention as passes
from jit_kernel.integrations.peers import refuse_given

_NAMESPACE = "flash_attn_3"
# FlashAttention at 0251105a, hopper/flash_api.cpp.
_SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fwd_combine": "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None) "
    "-> (Tensor(out!), Tensor)",
    "get_scheduler_metadata": "(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
    "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, "
    "int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> Tensor",
}
_registered: list[Any] = []  # the library, while the operators are registered


def _fwd(a: dict[str, Any]) -> tuple[Tensor, ...]:
    out, lse = passes.forward(a)
    nothing = [lse.new_empty(0) for _ in range(2)]
    return (out, lse, *nothing)


def _bwd(a: dict[str, Any]) -> tuple[Tensor, ...]:
    written = [a.pop(name) for name in ("dq", "dk", "dv")]
    lse, causal = a.pop("softmax_lse"), a.pop("is_causal")
    a.pop("sm_margin")
    dout, out = a["dout"], a["out"]
    for given, made in zip(written, passes.gradients(**a, lse=lse, causal=causal), strict=True):
        if given is not None:
            given.copy_(made)
    nothing = [lse.new_empty(0) for _ in range(4)]
    return (passes.row_products(dout, out), *nothing)


def _combine(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return public.flash_attn_combine(**a)


def _plan(a: dict[str, Any]) -> Tensor:
    refuse_given("flash_attn_3::get_scheduler_metadata", cu_seqlens_k=a["cu_seqlens_k"], seqused_q=a["seqused_q"])
    return public.get_scheduler_metadata(
        a["batch_size"], a["max_seqlen_q"], a["max_seqlen_k"], a["num_heads"], a["num_heads_k"], a["headdim"],
        a["seqused_k"], a["qkv_dtype"], a["headdim_v"], a["cu_seqlens_q"], a["cu_seqlens_k_new"], a["leftpad_k"],
        a["page_size"], a["max_seqlen_k_new"], a["is_causal"], (a["window_size_left"], a["window_size_right"]),
        a["attention_chunk"], a["has_softcap"], a["num_splits"], a["pack_gqa"], a["sm_margin"],
    )  # fmt: skip


_FUNCTIONS = {"fwd": _fwd, "bwd": _bwd, "fwd_combine": _combine, "get_scheduler_metadata": _plan}


def _by_name(name: str, function: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """An operator's implementation: the function gets every argument by name, left out ones with their defaults."""
    parameters = torch._C.parse_schema(f"{_NAMESPACE}::{name}{_SCHEMAS[name]}").arguments
    names = [each.name for each in parameters]
    defaults = {each.name: each.default_value for each in parameters if each.has_default_value()}

    def implementation(*arguments: Any, **named: Any) -> Any:
        with torch.no_grad():  # an input may require grad here, below autograd
            return function({**defaults, **dict(zip(names, arguments, strict=False)), **named})

    return implementation


def register() -> None:
    """Define the operators, and hold torch's own backward kernel, which torch's "FA3" replaces by what calls ours.

    Raises RuntimeError where another library of this process has defined them, and while torch has one active.
    """
    present = [name for name in _SCHEMAS if hasattr(getattr(torch.ops, _NAMESPACE), name)]
    if present:
        raise RuntimeError(
            f"torch.ops.{_NAMESPACE}.{present[0]} exists: FlashAttention-3's own extension is loaded in this process; "
            "flash_attn_interface.install() must come before it, or leave it out"
        )
    active = _active_in_torch()
    if active is not None:
        raise RuntimeError(
            f'torch\'s "{active}" is active; call torch.nn.attention.restore_flash_attention_impl() before '
            "flash_attn_interface.install()"
        )
    if torch.version.cuda is not None:
        cuda.hold_own_kernel()
    library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, function in _FUNCTIONS.items():
        library.define(name + _SCHEMAS[name])
        library.impl(name, _by_name(name, function), "CompositeExplicitAutograd")
    _registered.append(library)


def remove() -> None:
    """Take the operators away. Raises RuntimeError while torch's "FA3" calls them."""
    if _active_in_torch() == "FA3":
        raise RuntimeError('torch\'s "FA3" is active; call torch.nn.attention.restore_flash_attention_impl() first')
    while _registered:
        _registered.pop()._destroy()
    cuda.release_own_kernel()


def _active_in_torch() -> str | None:
    """Which implementation of flash attention stands before torch's own."""
    from torch.nn import attention

    current = getattr(attention, "current_flash_attention_impl", None)  # torch 2.11 and newer
    return None if current is None else current()
