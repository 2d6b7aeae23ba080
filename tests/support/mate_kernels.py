"""What stands behind the double of MATE's front end: numbers from given kernels, and the real kernels' mistakes.

Right calls are computed by functions with the public signatures (the CPU's). What MATE's C++ does to other calls is
done here too, because a guard can only be tested against the fault that it guards against: metadata is sliced by the
batch of the call that uses it, splits beyond the bound that the page table gives lose keys, prebuilt kernels read no
cu_seqlens for a single sequence and stop after k.numel() elements of a strided k. `strict` refuses foreign metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.mate_double import Call


class ForeignMetadataError(Exception):
    """Scheduler metadata was used for a call that it was not made for."""


_SCALARS = ("batch_size", "max_seqlen_q", "num_heads_q", "num_heads_kv", "headdim", "headdim_v", "causal")
_SCALARS += ("window_size", "attention_chunk", "num_splits", "pack_gqa")
_TENSORS = ("cache_seqlens", "cu_seqlens_q", "cache_leftpad")
MLA_PARTS = 64  # the device's multiprocessors, which bound MLA's workspace


def splits_of(max_seqlen_k: int, num_splits: int) -> int:
    """How many splits the kernels make: never fewer for longer keys, as the real heuristic."""
    return num_splits if num_splits > 0 else min(128, max(1, math.ceil(max_seqlen_k / 64)))


class Kernels:
    """The launcher of a `Mate`. `functions` have the public keyword signatures."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], *, strict: bool = True, version: str = "0.2.2"):
        self.functions, self.strict, self.version = functions, strict, version
        self.launched_on = 0  # the device of the call that runs
        self.issued: list[dict[str, Any]] = []
        self.workspaces: dict[int, dict[str, Any]] = {}
        self.reused = 0  # how often metadata served a call: a test that never reuses proves nothing

    def metadata(self, a: dict[str, Any]) -> Tensor:
        b, window = a["batch_size"], tuple(a["window_size"])
        if self.version < "0.2.1":  # these versions' metadata does not know of windows
            window, a = (-1, -1), {**a, "attention_chunk": 0}
        made_for = {name: a[name] for name in _SCALARS} | {"max_seqlen_k": a["max_seqlen_k"]}
        made_for["window_size"] = window
        made_for |= {name: None if a[name] is None else a[name].clone() for name in _TENSORS}
        made_for |= {"new": a["cu_seqlens_k_new"], "max_seqlen_k_new": a["max_seqlen_k_new"]}
        made_for["device"] = self.launched_on
        self.issued.append(made_for)
        lengths = a["cache_seqlens"] if a["cache_seqlens"] is not None else torch.full((b,), a["max_seqlen_k"])
        order = torch.argsort(lengths.cpu(), descending=True, stable=True)
        cu = a["cu_seqlens_q"]
        rows = (cu[1:] - cu[:-1]).cpu() if cu is not None else torch.full((b,), a["max_seqlen_q"])
        parts = [
            torch.full((b,), splits_of(a["max_seqlen_k"], a["num_splits"])),
            order,
            rows[order],  # one row to a block
            torch.full((b,), len(self.issued)),
        ]
        return torch.cat(parts).to(torch.int32)

    def attend(self, call: Call, out: Tensor, lse: Tensor) -> None:
        a = call.arguments
        if call.path == "mubin":
            self._mubin(a, out, lse)
        elif call.path == "mla":
            self._mla(a, out, lse)
        else:
            self._jit(call.function, a, out, lse)

    def _mubin(self, a: dict[str, Any], out: Tensor, lse: Tensor) -> None:
        if not out.is_contiguous() or any(a[name].stride(-1) != 1 for name in ("q", "k", "v")):
            raise RuntimeError("out must be contiguous; q, k, v must have contiguous last dimension")
        q, k, v, cu_q, cu_k = a["q"], _first_numel(a["k"]), a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"]
        if q.dim() == 3 and cu_q.shape[0] == 2:  # one sequence: taken as dense, whatever cu_seqlens says
            q, k, v, cu_q, cu_k = q[None], k[None], v[None], None, None
        result, norm = self.functions["flash_attn_varlen_func"](
            **self._common(a, "flash_attn_varlen_func")
            | {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            | {"return_softmax_lse": True, "window_size": (-1, -1)}
            | {"max_seqlen_q": None, "max_seqlen_k": None}  # a prebuilt kernel reads its buffers to their end
        )
        out.copy_(result.reshape(out.shape))
        lse.copy_(norm.reshape(lse.shape))

    def _jit(self, function: str, a: dict[str, Any], out: Tensor, lse: Tensor) -> None:
        metadata = a["scheduler_metadata"]
        if metadata is not None and a["num_splits"] > 128:
            raise ValueError("num_splits must be at most 128")
        kwargs = self._common(a, function)
        if function == "flash_attn_with_kvcache":
            kwargs |= {"k_cache": a["k_cache"], "v_cache": a["v_cache"], "k": a["k_new"], "v": a["v_new"]}
        sinks = a["sinks"]
        kwargs |= {"sinks": None if sinks is None else sinks.float(), "return_softmax_lse": True}
        used = a.get("seqused_q")
        if used is not None or a["cu_seqlens_q"] is not None:  # rows past the lengths stay as they were
            result, norm = self.functions[function](**kwargs | {"out": out.clone()})
        else:
            result, norm = self.functions[function](**kwargs)
        if metadata is not None:
            self._as_scheduled(metadata, a, result, norm)
        out.copy_(result)
        lse.copy_(norm)

    def _common(self, a: dict[str, Any], function: str) -> dict[str, Any]:
        """The arguments of the public function that MATE honours, under the same names."""
        names = ["q", "cu_seqlens_q", "max_seqlen_q", "page_table", "softmax_scale", "causal", "window_size"]
        names += ["attention_chunk", "softcap"]
        if function == "flash_attn_varlen_func":
            names += ["k", "v", "cu_seqlens_k", "max_seqlen_k", "seqused_q", "seqused_k"]
        else:
            names += ["cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new", "rotary_cos"]
            names += ["rotary_sin", "rotary_seqlens", "rotary_interleaved"]
        return {name: a.get(name) for name in names}

    def _as_scheduled(self, metadata: Tensor, a: dict[str, Any], out: Tensor, lse: Tensor) -> None:
        """Do what metadata says: only the sequences, blocks and splits that it lists are computed."""
        cu = a["cu_seqlens_q"]
        b = a["q"].shape[0] if cu is None else cu.shape[0] - 1
        splits, table, blocks, ids = (metadata[b * i : b * (i + 1)].tolist() for i in range(4))
        table_k = a["page_table"]
        bound = a["k_cache"].shape[1] * (table_k.shape[1] if table_k is not None else 1)
        if self.strict:
            self._refuse_foreign(ids, b, bound, a)
        self.reused += 1
        kept_out, kept_lse = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
        for count, row, rows in zip(splits, table, blocks, strict=True):
            if not 0 <= row < b or count > splits_of(bound, a["num_splits"]):
                continue  # out of range, or the last keys are lost
            if cu is None:
                kept_out[row, :rows], kept_lse[row, :, :rows] = out[row, :rows], lse[row, :, :rows]
            else:
                first = int(cu[row])
                last = min(first + rows, int(cu[row + 1]))
                kept_out[first:last], kept_lse[:, first:last] = out[first:last], lse[:, first:last]
        if cu is not None:
            kept_out[int(cu[-1]) :], kept_lse[:, int(cu[-1]) :] = out[int(cu[-1]) :], lse[:, int(cu[-1]) :]
        out.copy_(kept_out)
        lse.copy_(kept_lse)

    def _refuse_foreign(self, ids: list[int], b: int, bound: int, a: dict[str, Any]) -> None:
        if len(set(ids)) != 1 or not 1 <= ids[0] <= len(self.issued):
            raise ForeignMetadataError(f"sliced by batch {b}, metadata names calls {sorted(set(ids))}")
        made_for, q, k = self.issued[ids[0] - 1], a["q"], a["k_cache"]
        call = {
            "batch_size": b,
            "max_seqlen_q": q.shape[1] if a["cu_seqlens_q"] is None else a["max_seqlen_q"],
            "num_heads_q": q.shape[-2],
            "num_heads_kv": k.shape[-2],
            "headdim": q.shape[-1],
            "headdim_v": a["v_cache"].shape[-1],
        }
        call |= {name: a[name] for name in ("causal", "window_size", "attention_chunk", "num_splits", "pack_gqa")}
        for name in _SCALARS:
            if made_for[name] != call[name]:
                raise ForeignMetadataError(f"{name} was {made_for[name]}, now {call[name]}")
        for name in _TENSORS:
            was, now = made_for[name], a[name]
            if (was is None) != (now is None) or (was is not None and not torch.equal(was, now)):
                raise ForeignMetadataError(f"{name} was {was}, now {now}")
        if made_for["max_seqlen_k"] > bound:
            raise ForeignMetadataError(f"max_seqlen_k {made_for['max_seqlen_k']} exceeds the table's {bound}")
        new = 0 if a["k_new"] is None else a["k_new"].shape[1] if a["cu_seqlens_k_new"] is None else None
        if a["k_new"] is None and made_for["new"] is not None:
            raise ForeignMetadataError("cu_seqlens_k_new without new keys is added to the lengths")
        if new is not None and made_for["max_seqlen_k_new"] != new:
            raise ForeignMetadataError(f"max_seqlen_k_new was {made_for['max_seqlen_k_new']}, now {new}")
        if made_for["device"] != self.launched_on:
            raise ForeignMetadataError(f"made on device {made_for['device']}, used on {self.launched_on}")

    def _mla(self, a: dict[str, Any], out: Tensor, lse: Tensor) -> None:
        workspace, q, v = a.get("workspace"), a["q"], a["v_cache"]
        b = q.shape[0] if a["cu_seqlens_q"] is None else a["cu_seqlens_q"].shape[0] - 1
        if workspace is None or workspace.dtype != torch.uint8 or workspace.dim() != 1:
            raise RuntimeError("MLA needs a workspace: 1-D uint8 on q's device")
        if workspace.device != q.device or workspace.numel() < MLA_PARTS * 32 + (b + 1) * 4:
            raise RuntimeError("the workspace is on another device or too small")
        if a["page_table"] is None or v.shape[1] != 64 or v.shape[-1] != 512 or a["cache_seqlens"] is None:
            raise RuntimeError("MLA decode wants pages of 64 tokens, ckv 512, rope 64, and the lengths")
        if a["workspace_is_ready"]:
            state = self.workspaces.get(id(workspace))
            if state is None or not torch.equal(state["lengths"], a["cache_seqlens"]):
                raise ForeignMetadataError("the workspace holds another step's schedule")
        else:
            self.workspaces[id(workspace)] = {"lengths": a["cache_seqlens"].clone()}
        names = ("q", "k_cache", "v_cache", "qv", "cache_seqlens", "page_table", "cu_seqlens_q")
        names += ("max_seqlen_q", "softmax_scale", "causal")  # all the rest is ignored
        result, norm = self.functions["flash_attn_with_kvcache"](
            **{name: a[name] for name in names}, return_softmax_lse=True
        )
        out.copy_(result)
        lse.copy_(norm.transpose(1, 2) if q.dim() == 4 else norm)


def _first_numel(k: Tensor) -> Tensor:
    """k as the prebuilt kernels see it: elements that lie k.numel() or farther from its start read as zero."""
    offset = torch.zeros(k.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(k.shape, k.stride(), strict=True)):
        shape = [1] * k.dim()
        shape[dim] = size
        offset = offset + (torch.arange(size) * stride).reshape(shape)
    return k.masked_fill(offset >= k.numel(), 0)
