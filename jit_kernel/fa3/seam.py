"""The functions of a device that several implementations serve: each call goes to the one chosen for it.

What was chosen is remembered by a plain tuple of what the call asks for. The signatures are the ones
that stand behind every mapping of `_load_fa3_kernels`; the arguments arrive checked. They are passed on as a copy of
the frame's locals: up to Python 3.12 a debugger that looks at the frame would put `self` back among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from jit_kernel.device import Target
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.features import DTYPE_NAMES, Features, plain_features

Result = Tensor | tuple[Tensor, Tensor]


class Dispatcher:
    """Chooses, call by call, among the implementations of one device."""

    def __init__(self, target: Target, modules: Sequence[ModuleType]) -> None:
        self._target = target
        self._modules = tuple(modules)
        self._chosen: dict[tuple[str, tuple[object, ...]], Callable[..., Any]] = {}

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """The mapping that `_load_fa3_kernels` hands out for the device."""
        functions: dict[str, Callable[..., Any]] = {
            "flash_attn_varlen_func": self.flash_attn_varlen_func,
            "flash_attn_with_kvcache": self.flash_attn_with_kvcache,
            "flash_attn_func": self.flash_attn_func,
            "get_scheduler_metadata": self.get_scheduler_metadata,
            "flash_attn_combine": self.flash_attn_combine,
            "merge_state": self.merge_state,
        }
        shortcut = getattr(self._modules[0], "shortcut", None) if self._modules else None
        if shortcut is not None:
            for name in ("flash_attn_varlen_func", "flash_attn_func"):
                functions[name] = shortcut(name, functions[name])
        return MappingProxyType(functions)

    def _resolve(self, function: str, plain: tuple[Any, ...]) -> Callable[..., Any]:
        chosen = self._chosen[function, plain] = dispatch.resolve(self._target, Features(*plain), function)
        return chosen

    def _first_with(self, function: str) -> Callable[..., Any]:
        for module in self._modules:
            if function in module.KERNELS:
                found: Callable[..., Any] = module.KERNELS[function]
                return found
        names = ", ".join(module.NAME for module in self._modules)
        raise NotImplementedError(f"no implementation serves {function} on {self._target}: {names} have none")

    def flash_attn_varlen_func(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        only_qv: bool = False,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Result:
        """See `jit_kernel.flash_attention_v3.flash_attn_varlen_func`."""
        call = locals().copy()
        del call["self"]
        chosen = self._chosen.get(key := ("flash_attn_varlen_func", plain_features(call))) or self._resolve(*key)
        result: Result = chosen(**call)
        return result

    def flash_attn_with_kvcache(
        self,
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        qv: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        cache_seqlens: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        page_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        max_seqlen_q: int | None = None,
        rotary_seqlens: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        only_qv: bool = False,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Result:
        """See `jit_kernel.flash_attention_v3.flash_attn_with_kvcache`."""
        call = locals().copy()
        del call["self"]
        chosen = self._chosen.get(key := ("flash_attn_with_kvcache", plain_features(call))) or self._resolve(*key)
        result: Result = chosen(**call)
        return result

    def flash_attn_func(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Result:
        """See `jit_kernel.flash_attention_v3.flash_attn_func`."""
        call = locals().copy()
        del call["self"]
        chosen = self._chosen.get(key := ("flash_attn_func", plain_features(call))) or self._resolve(*key)
        result: Result = chosen(**call)
        return result

    def get_scheduler_metadata(
        self,
        *,
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        headdim: int,
        cache_seqlens: Tensor,
        qkv_dtype: torch.dtype = torch.bfloat16,
        headdim_v: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        page_size: int | None = None,
        max_seqlen_k_new: int = 0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        has_softcap: bool = False,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> Tensor:
        """See `jit_kernel.flash_attention_v3.get_scheduler_metadata`."""
        call = locals().copy()
        del call["self"]
        left, right = window_size
        features = Features(
            dtype=DTYPE_NAMES[qkv_dtype],
            head_dim=headdim,
            head_dim_v=headdim if headdim_v is None else headdim_v,
            group=num_heads_q // num_heads_kv,
            aligned=True,
            ragged_q=cu_seqlens_q is not None,
            ragged_k=False,
            page_size=page_size or 0,
            seqused_q=False,
            seqused_k=True,
            append=max_seqlen_k_new > 0,
            ragged_append=cu_seqlens_k_new is not None and max_seqlen_k_new > 0,
            rotary=False,
            cache_batch_idx=False,
            cache_leftpad=cache_leftpad is not None,
            causal=causal or right == 0,
            window=left >= 0 or (right > 0 and not causal),
            chunk=attention_chunk > 0,
            softcap=has_softcap,
            qv=False,
            only_qv=False,
            descale=False,
            sinks=False,
            lse=False,
            split=num_splits != 1,
            metadata=True,
        )
        chosen: Callable[..., Any] = dispatch.resolve(self._target, features, "get_scheduler_metadata")
        made: Tensor = chosen(**call)
        return made

    def flash_attn_combine(
        self,
        *,
        out_partial: Tensor,
        lse_partial: Tensor,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `jit_kernel.flash_attention_v3.flash_attn_combine`."""
        combined: tuple[Tensor, Tensor] = self._first_with("flash_attn_combine")(
            out_partial=out_partial, lse_partial=lse_partial, out=out, out_dtype=out_dtype
        )
        return combined

    def merge_state(self, *, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `jit_kernel.flash_attention_v3.merge_state`."""
        merged: tuple[Tensor, Tensor] = self._first_with("merge_state")(
            out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b
        )
        return merged
