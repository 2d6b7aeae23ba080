"""A double of MATE's Python front end, versions 0.1.3 to 0.2.2, for machines without a Moore Threads GPU.

It answers as MATE does: signatures as recorded, the same checks in the same order with the same exception types, the
same choice between prebuilt kernels ("mubin"), compiled ones ("jit") and MLA decode ("mla"), ignored arguments ignored,
metadata sliced by the batch of the call that uses it. It must agree with every answer in data/mate_calls.json.
`mate_kernels.Kernels` computes the numbers, mistakes of the real kernels included; without it results stay empty.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.support.mate_layout import STRIDED, VARLEN_ONLY, Layout, last_dim_dense, mask_of, resolved, rounded
from tests.support.mate_signatures import wrapper_signatures

HALF = (torch.float16, torch.bfloat16)
_PAIRS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512))


@dataclass
class Call:
    """One call that reached a kernel: the path it took, what the kernel is compiled for, and its arguments."""

    function: str
    path: str
    compiled_for: dict[str, bool]
    arguments: dict[str, Any] = field(repr=False)


class Launcher(Protocol):
    """What stands behind the front end."""

    def attend(self, call: Call, out: Tensor, lse: Tensor) -> None: ...
    def metadata(self, arguments: dict[str, Any]) -> Tensor: ...


class Mate:
    """An installed MATE of one version. `asserts=False` is MATE under python -O; `calls` is what its kernels ran."""

    def __init__(self, version: str = "0.2.2", launcher: Launcher | None = None, *, asserts: bool = True):
        self.version, self.launcher, self.asserts = version, launcher, asserts
        self.calls: list[Call] = []
        bodies = {
            "flash_attn_varlen_func": self._varlen,
            "flash_attn_func": self._dense,
            "flash_attn_with_kvcache": self._kvcache,
            "get_scheduler_metadata": self._metadata,
        }
        self.functions = {
            name: self._bound(name, signature, bodies[name]) for name, signature in wrapper_signatures(version).items()
        }

    @staticmethod
    def _bound(name: str, signature: inspect.Signature, body: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return body(**bound.arguments)

        function.__name__ = name
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    def _require(self, condition: bool, message: str = "") -> None:
        if self.asserts and not condition:
            raise AssertionError(message)

    def _dense(self, **a: Any) -> Any:
        return self._varlen(**{**dict.fromkeys(VARLEN_ONLY), **a})

    def _varlen(self, **a: Any) -> Any:
        with_lse = a["return_softmax_lse"] or a.get("return_attn_probs", False)
        a = resolved(a)
        a["page_table"] = a.get("page_table") if a.get("page_table") is not None else a.get("block_table")
        a.setdefault("out", None)
        mubin = self._takes_mubin(a)
        if mubin:
            self._require(a["window_size"][0] is None or a["window_size"][0] < 0)
            self._require(a["window_size"][1] is None or a["window_size"][1] < 0)
            out, lse = self._run("flash_attn_varlen_func", "mubin", {}, a)
        else:
            a = {k: last_dim_dense(x) if k in STRIDED else x for k, x in a.items()}
            out, lse, _ = self._jit("flash_attn_varlen_func", a)
        return (out, lse) if with_lse else out

    def _takes_mubin(self, a: dict[str, Any]) -> bool:
        q, k, v = a["q"], a["k"], a["v"]
        d, dv = q.shape[-1], v.shape[-1]
        left, right = a["window_size"]
        if not (
            q.dtype in HALF
            and q.dtype == k.dtype == v.dtype
            and q.dim() in (3, 4)
            and q.dim() == k.dim() == v.dim()
            and ((d, dv) == (192, 128) or (d == dv and d <= 128))
            and all(a.get(name) is None for name in ("page_table", "seqused_q", "seqused_k", "qv", "sinks"))
            and (left is None or left < 0)
            and (right is None or right <= 0)
            and a["softcap"] == 0.0
            and a["attention_chunk"] == 0
            and a["cp_world_size"] == 1
        ):
            return False
        if q.dim() == 4:
            return k.shape == (q.shape[0], k.shape[1], k.shape[2], d) and v.shape == (*k.shape[:3], dv)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if a[name] is None:
                raise AttributeError("'NoneType' object has no attribute 'is_musa'")
        return (
            k.shape == (*k.shape[:2], d)
            and v.shape == (*k.shape[:2], dv)
            and a["cu_seqlens_k"].numel() == a["cu_seqlens_q"].numel()
            and a["max_seqlen_q"] is not None
            and a["max_seqlen_k"] is not None
        )

    def _kvcache(self, **a: Any) -> Any:
        a = resolved(a)
        self._require(a["k_cache"].stride(-1) == 1, "k_cache must have contiguous last dimension")
        self._require(a["v_cache"].stride(-1) == 1, "v_cache must have contiguous last dimension")
        if isinstance(a["cache_seqlens"], int):
            rows = a["k_cache"].shape[0]  # of pages, when the cache is paged
            a["cache_seqlens"] = torch.full((rows,), a["cache_seqlens"], dtype=torch.int32)
        if a["qv"] is not None and a["qv"].shape[-1] == 512 and a["q"].shape[-1] == 64:
            return self._mla(a)
        inner = {**a, "k": a["k_cache"], "v": a["v_cache"], "k_new": a["k"], "v_new": a["v"], "out": None}
        inner |= {"seqused_q": None, "seqused_k": a["cache_seqlens"], "cu_seqlens_k": None, "max_seqlen_k": None}
        out, lse, rest = self._jit("flash_attn_with_kvcache", inner)
        return (out, lse, *rest) if a["return_softmax_lse"] else out

    def _mla(self, a: dict[str, Any]) -> Any:
        metadata = a["scheduler_metadata"]
        if metadata is not None:
            a["workspace"], a["workspace_is_ready"] = metadata[0], metadata[1]  # a bare tensor is indexed too
        q = a["q"]
        shape, lse_shape = (*q.shape[:-1], 512), q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
        out, lse = self._run("flash_attn_with_kvcache", "mla", {}, a, (shape, lse_shape))
        return (out, lse) if a["return_softmax_lse"] else out

    def _jit(self, function: str, a: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
        layout = self._checked_layout(a)
        if a["sinks"] is not None:
            a["num_splits"], a["scheduler_metadata"] = -1, None
        causal, local = mask_of(a, layout)
        self._require(a["cp_world_size"] == 1 or not local)
        if a["out"] is not None:
            self._require(a["out"].shape == layout.out_shape and a["out"].dtype == a["q"].dtype)
        metadata = a["scheduler_metadata"]
        if metadata is not None:
            self._require(metadata.shape[0] >= 4 * layout.batch, "metadata buffer is too small")
        pair = (rounded(a["q"].shape[-1]), rounded(a["v"].shape[-1]))
        self._require(pair in _PAIRS, f"Add config for headdim {pair[0]}-{pair[1]}")
        compiled_for = {
            "has_metadata": metadata is not None,
            "has_learnable_sink": a["sinks"] is not None,
            "is_local": local,
            "is_causal": causal,
            "has_cu_seqlens_k_new": a.get("cu_seqlens_k_new") is not None,
            "is_append_kv": a.get("k_new") is not None,
            "paged_kv": a["page_table"] is not None,
        }
        out, lse = self._run(function, "jit", compiled_for, a, (layout.out_shape, layout.lse_shape))
        return out, lse, [torch.empty(1), torch.empty(1)]  # the splits' partial results, unallocated

    def _checked_layout(self, a: dict[str, Any]) -> Layout:
        q, k, v, table, cu_q, cu_k = (a[name] for name in ("q", "k", "v", "page_table", "cu_seqlens_q", "cu_seqlens_k"))
        k_new, v_new, require = a.get("k_new"), a.get("v_new"), self._require
        require(a["qv"] is None, "qv parameter is not supported yet")
        require((k_new is None) == (v_new is None), "k_new and v_new must be provided together")
        if cu_q is not None:
            require(a["max_seqlen_q"] is not None)
        batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        seqlen_q = q.shape[1] if cu_q is None else a["max_seqlen_q"]
        seqlen_k = table.shape[1] * k.shape[1] if table is not None else k.shape[-3]
        rows_k = k.shape[0] if cu_k is None else cu_k.shape[0] - 1
        batch_k = table.shape[0] if table is not None else rows_k
        require(q.dtype in HALF, "inputs must be float16 or bfloat16")
        require(q.dtype == k.dtype == v.dtype, "inputs must have the same dtype")
        require(k_new is None or k_new.dtype == q.dtype == v_new.dtype)
        names = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k", "cache_leftpad")
        for t in (a.get(name) for name in names):
            require(t is None or (t.dtype == torch.int32 and t.stride(0) == 1), "must be int32 and contiguous")
        self._check_indices(a, batch)
        if a["sinks"] is not None:
            require(a["sinks"].shape == (q.shape[-2],))
            require(a["sinks"].dtype == torch.bfloat16, "learnable_sink must be bfloat16")
        if a.get("cache_batch_idx") is None:
            require(batch_k == batch, "batch_size must equal batch_size_k when kv_batch_idx is None")
        hk, d, dv = k.shape[-2], q.shape[-1], v.shape[-1]
        leading = k.shape[:2] if table is not None else (batch_k, seqlen_k) if cu_k is None else (seqlen_k,)
        require(k.shape == (*leading, hk, d) and v.shape == (*leading, hk, dv))
        if k_new is not None:
            self._check_append(a, batch, hk, d, dv)
        require(q.shape[-2] % hk == 0, "num_head must be divisible by num_head_kv")
        rows = (batch, seqlen_q) if cu_q is None else (q.shape[0],)
        lse_shape = (batch, q.shape[-2], seqlen_q) if cu_q is None else (q.shape[-2], q.shape[0])
        return Layout(batch, seqlen_q, seqlen_k, (*rows, q.shape[-2], dv), lse_shape)

    def _check_indices(self, a: dict[str, Any], batch: int) -> None:
        require, table = self._require, a["page_table"]
        if table is not None:
            require(a["cu_seqlens_k"] is None, "page_table is not supported with cu_seqlens_k")
            require(table.dtype == torch.int32 and table.stride(-1) == 1, "page_table must be int32, contiguous")
        for name in ("cache_batch_idx", "cache_leftpad"):
            t = a.get(name)
            require(t is None or (t.dtype == torch.int32 and t.shape == (batch,) and t.stride(0) == 1), name)
        for name in ("seqused_q", "seqused_k"):
            require(a[name] is None or a[name].shape == (batch,), f"{name} must have shape (batch_size,)")
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            require(a[name] is None or a[name].shape == (batch + 1,), f"{name} must have shape (batch + 1,)")

    def _check_append(self, a: dict[str, Any], batch: int, hk: int, d: int, dv: int) -> None:
        k_new, v_new, cu, require = a["k_new"], a["v_new"], a["cu_seqlens_k_new"], self._require
        leading = (batch, k_new.shape[1]) if cu is None else (k_new.shape[0],)
        require(k_new.shape == (*leading, hk, d) and v_new.shape == (*leading, hk, dv))
        if cu is not None:
            require(cu.shape == (batch + 1,))
            require(cu[-1].item() == k_new.shape[0], "cu_seqlens_k_new[-1] must equal total_k_new")
        cos, sin = a["rotary_cos"], a["rotary_sin"]
        if cos is not None:
            require(sin is not None and cos.shape == sin.shape)
            require(2 * cos.shape[1] <= d and 2 * cos.shape[1] % 16 == 0)
            require(cos.dtype == sin.dtype == a["q"].dtype)
            if a["page_table"] is not None:
                held = a["page_table"].shape[1] * a["k"].shape[1]
                require(cos.shape[0] >= held, "cos/sin seqlen must be at least the seqlen of KV cache")

    def _run(
        self,
        function: str,
        path: str,
        compiled_for: dict[str, bool],
        a: dict[str, Any],
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        q = a["q"]
        if shapes is None:
            lse = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
            shapes = ((*q.shape[:-1], a["v"].shape[-1]), lse)
        given = a.get("out")
        out = given if given is not None else torch.full(shapes[0], math.nan, dtype=q.dtype)
        lse = torch.full(shapes[1], math.nan, dtype=torch.float32)
        call = Call(function, path, compiled_for, a)
        if self.launcher is not None:
            self.launcher.attend(call, out, lse)
        self.calls.append(call)
        return out, lse

    def _metadata(self, **a: Any) -> Tensor:
        require, b = self._require, a["batch_size"]
        if a["window_size"] is None:
            a["window_size"] = (-1, -1)
        cu_q, used = a["cu_seqlens_q"], a["cache_seqlens"]
        require(cu_q is None or a["max_seqlen_q"] is not None)
        require(cu_q is None or cu_q.shape == (b + 1,), "cu_seqlens_q must have shape (batch_size + 1,)")
        require(used is None or used.shape == (b,), "seqused_k must have shape (batch_size,)")
        for t in (cu_q, used, a["cache_leftpad"]):
            require(t is None or (t.dtype == torch.int32 and t.stride(0) == 1), "must be int32 and contiguous")
        require(a["num_heads_q"] % a["num_heads_kv"] == 0)
        a["headdim_v"] = a["headdim_v"] or a["headdim"]
        require((rounded(a["headdim"]), rounded(a["headdim_v"])) in _PAIRS)
        if self.launcher is None:
            return torch.zeros(4 * b, dtype=torch.int32)
        return self.launcher.metadata(a)
