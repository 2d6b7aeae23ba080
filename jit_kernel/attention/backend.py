"""FlashAttentionBackend: the two attention functions and the metadata function, chosen once, for a serving engine.

The engine hands plain tensors, a `ForwardMetadata` and an `AttentionLayer`; none of its classes are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3, moore_threads
from jit_kernel.attention import step as steps
from jit_kernel.attention.cascade import merged
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.plan import GraphMetadata
from jit_kernel.attention.step import ForwardContext
from jit_kernel.device import detect_device

Result = Tensor | tuple[Tensor, Tensor]
VERSIONS = (3,)

_owners = itertools.count(1)


class FlashAttentionBackend:
    """Attention for the layers of one model on one device.

    fa_impl_ver: 3, FlashAttention-3's functions; any other version raises ValueError with what exists.
    device: a torch.device or its string; without one the detected device. Raises NotImplementedError with every missing
        part when nothing serves it.
    deterministic: a sequence's result does not depend on what else is in the batch. Keys in a cache are cut as
        `flash_attn_with_kvcache(deterministic=True)` says, with the bound on query rows that it names; without a cache,
        and on MUSA, never.
    plan_ahead: compute scheduler metadata once a step for calls with a cache; by default on MUSA, whose kernels split
        keys only when they are given it. Other implementations plan inside the call.

    An instance shares nothing that can be written with another: two models, or a draft and its target, do not meet.
    """

    def __init__(
        self,
        fa_impl_ver: int = 3,
        device: torch.device | str | None = None,
        deterministic: bool = False,
        plan_ahead: bool | None = None,
    ) -> None:
        if fa_impl_ver not in VERSIONS:
            raise ValueError(
                f"fa_impl_ver is {fa_impl_ver!r}; it must be 3 (FlashAttention-3), the only version that exists here"
            )
        self.device = resolved_device(device)
        flash_attention_v3._load_fa3_kernels(self.device)  # raises with the reasons when nothing serves it
        self.fa_impl_ver = fa_impl_ver
        self.num_splits = 1 if deterministic else 0  # without a cache
        # With one: MATE has no argument for it, but does not split where it is told so.
        fixed = deterministic and self.device.type != "musa"
        self._of_cache = {"num_splits": 0 if fixed else self.num_splits, "deterministic": fixed}
        self._varlen: Callable[..., Any] = flash_attention_v3.flash_attn_varlen_func
        self._kvcache: Callable[..., Any] = flash_attention_v3.flash_attn_with_kvcache
        self._merge: Callable[..., tuple[Tensor, Tensor]] = flash_attention_v3.merge_state
        plans = self.device.type == "musa" if plan_ahead is None else plan_ahead
        self._maker = flash_attention_v3.get_scheduler_metadata if plans else None
        self._owner = next(_owners)

    def step(self, graph: GraphMetadata | None = None) -> AbstractContextManager[ForwardContext]:
        """One forward pass: calls inside share scheduler metadata where every parameter agrees, calls outside never do.

        With `graph`, metadata lies in static memory: run the step once, capture it, and before each replay call
        `graph.refresh`. Steps may nest (a draft inside a target's) and run in threads and tasks.
        """
        return steps.entered(self._owner, self.device, graph)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        metadata: ForwardMetadata,
        layer: AttentionLayer | None = None,
        *,
        k_cache: Tensor | None = None,
        v_cache: Tensor | None = None,
        qv: Tensor | None = None,
        return_softmax_lse: bool = False,
        out: Tensor | None = None,
    ) -> Result:
        """Prefill. With metadata.cache_seqlens over the cache, which holds the new keys already; else over k and v.

        q: (total_q, hq, d); k: (total_k, hk, d), v: (total_k, hk, dv); k_cache, v_cache: dense or paged as
        `flash_attn_with_kvcache` takes them. Returns (total_q, hq, dv), with return_softmax_lse also lse (hq, total_q).
        """
        layer = layer or AttentionLayer()
        if metadata.has_cache:
            caches = _need_caches(k_cache, v_cache)
            return self._with_cache(q, *caches, metadata, layer, qv, return_softmax_lse, out, {})
        if k is None or v is None:
            raise ValueError("k and v are None; they must be given when metadata has no cache_seqlens")
        if qv is not None:
            raise ValueError("qv is given without cache_seqlens; it must go with a cache (MLA decode)")
        result: Result = self._varlen(
            q=q,
            k=k,
            v=v,
            **metadata.raw_arguments(),
            **layer.arguments(),
            num_splits=self.num_splits,
            return_softmax_lse=return_softmax_lse,
            out=out,
        )
        return result

    def forward_decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: ForwardMetadata,
        layer: AttentionLayer | None = None,
        *,
        k: Tensor | None = None,
        v: Tensor | None = None,
        qv: Tensor | None = None,
        return_softmax_lse: bool = False,
        out: Tensor | None = None,
    ) -> Result:
        """Decode over a cache. Keys k and v (b, s_new, hk, d / dv), where given, are appended first.

        q: (b, sq, hq, d), or (total_q, hq, d) with metadata.cu_seqlens_q. metadata.cache_seqlens counts what the cache
        holds before appending. Returns q's leading shape with (hq, dv), with return_softmax_lse also lse.
        """
        if not metadata.has_cache:
            raise ValueError("metadata.cache_seqlens is None; forward_decode needs the lengths of the cache")
        new = {} if k is None and v is None else {"k": k, "v": v}
        return self._with_cache(
            q, k_cache, v_cache, metadata, layer or AttentionLayer(), qv, return_softmax_lse, out, new
        )

    def forward_cascade(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        prefix: ForwardMetadata,
        suffix: ForwardMetadata,
        layer: AttentionLayer | None = None,
        *,
        return_softmax_lse: bool = False,
    ) -> Result:
        """A shared prefix and each sequence's own suffix, in two calls that are merged by their lse.

        `prefix` groups the tokens of q by the prefix that they share (one group: cu_seqlens_q of [0, total_q]); all of
        its keys are seen by all of the group's queries. `suffix` has the sequences with their own keys, causal as the
        layer says. Together they are one call over prefix + suffix. A part of length 0 adds nothing; sinks count once.
        Raises NotImplementedError with a window or an attention chunk, whose bounds run across both parts.
        """
        out, lse = merged(
            self.forward_decode, self.merge, q, k_cache, v_cache, prefix, suffix, layer or AttentionLayer()
        )
        return (out, lse) if return_softmax_lse else out

    def merge(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        """`merge_state` as chosen for this backend."""
        return self._merge(out_a, lse_a, out_b, lse_b)

    def _with_cache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: ForwardMetadata,
        layer: AttentionLayer,
        qv: Tensor | None,
        return_softmax_lse: bool,
        out: Tensor | None,
        new: dict[str, Tensor | None],
    ) -> Result:
        plan = None
        # With new keys the lengths that count are known only inside the call.
        if self._maker is not None and not new and qv is None:
            context = steps.current(self._owner)
            key = steps.key_for(context, metadata, layer, q, k_cache, v_cache, self._of_cache["num_splits"])
            plan = steps.obtain(context, key, metadata, self._maker, q.device)
        result: Result = self._kvcache(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            **new,
            qv=qv,
            **metadata.cache_arguments(),
            **layer.arguments(),
            scheduler_metadata=plan,
            **self._of_cache,
            return_softmax_lse=return_softmax_lse,
            out=out,
        )
        return result


def _need_caches(k_cache: Tensor | None, v_cache: Tensor | None) -> tuple[Tensor, Tensor]:
    if k_cache is None or v_cache is None:
        raise ValueError("k_cache and v_cache are None; they must be given when metadata has cache_seqlens")
    return k_cache, v_cache


def resolved_device(device: torch.device | str | None) -> torch.device:
    """The device to serve. Raises NotImplementedError with what is missing for MUSA on a machine without it."""
    name = detect_device() if device is None else str(device)
    if name.partition(":")[0] == "musa" and not moore_threads.probe().usable:
        lines = "\n  ".join(str(part) for part in moore_threads.probe().missing)
        raise NotImplementedError(f"device is {name!r}, and no Moore Threads GPU can be used here:\n  {lines}")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be cpu, cuda or musa, with an index or without") from error
    if found.type != "cpu" and found.index is None:
        index = torch.get_device_module(found).current_device()
        return torch.device(found.type, index)
    return found
