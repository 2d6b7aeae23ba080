"""The 800 recorded calls of MATE v0.2.2's front end, as tensors, and what becomes of them when they are made of us.

Run as a program (also under python -O) it prints the outcome of each call made through our functions as JSON.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from tests.support.mate_signatures import DATA
from tests.support.musa_device import MusaTensor, machine, to_musa

OURS = (ValueError, TypeError, NotImplementedError)


def load() -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((DATA / "mate_calls.json.gz").read_bytes()))


def decoded(value: Any) -> Any:
    """A recorded argument as Python has it."""
    if isinstance(value, dict):
        dtype = getattr(torch, value["dtype"])
        if "values" in value:
            return torch.tensor(value["values"], dtype=dtype)
        if value.get("contiguous") is False:
            *lead, last = value["tensor"]
            return torch.zeros(*lead, 2 * last, dtype=dtype)[..., ::2]
        return torch.zeros(value["tensor"], dtype=dtype)
    if isinstance(value, list):
        if value and value[0] == "__mla_workspace__":
            return torch.zeros(1 << 20, dtype=torch.uint8), value[1]
        return tuple(value)
    return value


def outcome(record: dict[str, Any]) -> str:
    """Make a recorded call of our public function: "served", or the type of our error. Anything else is raised."""
    arguments = {name: decoded(value) for name, value in record["kwargs"].items()}
    arguments["return_softmax_lse"] = arguments.get("return_softmax_lse", False)
    metadata = arguments.pop("scheduler_metadata", None)
    if metadata is not None and isinstance(metadata, Tensor):
        try:
            arguments["scheduler_metadata"] = _our_metadata(arguments)
        except OURS as error:
            return type(error).__name__
    try:
        result = getattr(flash_attention_v3, record["function"])(**to_musa(arguments))
    except OURS as error:
        return type(error).__name__
    for part in result if isinstance(result, tuple) else (result,):
        if not isinstance(part, MusaTensor):
            raise RuntimeError(f"a result on {part.device}")
    return "served"


def _our_metadata(a: dict[str, Any]) -> Tensor:
    q, cu, table = a["q"], a.get("cu_seqlens_q"), a.get("page_table")
    held = a["k_cache"].shape[1] * (1 if table is None else table.shape[1])
    made = flash_attention_v3.get_scheduler_metadata(
        batch_size=q.shape[0] if cu is None else cu.shape[0] - 1,
        max_seqlen_q=q.shape[1] if cu is None else a["max_seqlen_q"],
        max_seqlen_k=held,
        num_heads_q=q.shape[-2],
        num_heads_kv=a["k_cache"].shape[-2],
        headdim=q.shape[-1],
        headdim_v=a["v_cache"].shape[-1],
        qkv_dtype=q.dtype,
        **to_musa({name: a.get(name) for name in ("cache_seqlens", "cu_seqlens_q", "cache_leftpad")}),
        **{name: a[name] for name in ("causal", "window_size", "num_splits", "pack_gqa") if name in a},
    )
    return made.inner  # type: ignore[attr-defined]


def outcomes(asserts: bool) -> list[str]:
    """Of every recorded call, with a MATE whose asserts are or are not there."""
    with tempfile.TemporaryDirectory() as folder, machine(Path(folder) / "site", None, asserts=asserts):
        return [outcome(record) for record in load()]


if __name__ == "__main__":
    print(json.dumps({"optimised": sys.flags.optimize, "outcomes": outcomes(asserts=not sys.flags.optimize)}))
