"""FlashInfer and FlashAttention-3 on the tensors of a cell, where they can be imported; what plans is not timed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from serving_cells import Cell
from serving_inputs import Inputs

Call = Callable[[], torch.Tensor]
_MODULES = {"flashinfer": ("flashinfer",), "fa3": ("flash_attn_interface", "flash_attn_3.flash_attn_interface")}
PEERS = tuple(_MODULES)
_WORKSPACE_BYTES = 512 << 20


def importable(names: Sequence[str]) -> dict[str, str]:
    """By peer: its version. One that is installed and cannot be imported is said on standard error and left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            module = _imported(name)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if module is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found


def _imported(name: str) -> Any:
    """A peer's module, None where none of its names is there."""
    for module in _MODULES[name]:
        try:
            if importlib.util.find_spec(module) is not None:
                return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in module.split("."):  # not the peer is missing, but what it needs
                raise
    return None


def calls(names: Sequence[str], cell: Cell, inputs: Inputs) -> dict[str, Call]:
    """By competitor: what computes the cell. FlashInfer has two kernels for more than one query token."""
    found: dict[str, Call] = {}
    if cell.tree or cell.latent:
        return found
    for name in names:
        if name == "fa3":
            found["fa3"] = _fa3_call(inputs)
        elif cell.queries == 1:
            found["flashinfer"] = _flashinfer_decode(cell, inputs)
        else:
            found |= {f"flashinfer_{each}": _flashinfer_prefill(cell, inputs, each) for each in ("fa2", "fa3")}
    return found


def _fa3_call(inputs: Inputs) -> Call:
    function = _imported("fa3").flash_attn_with_kvcache

    def call() -> torch.Tensor:
        return function(
            inputs.q, inputs.k_cache, inputs.v_cache, cache_seqlens=inputs.lengths, page_table=inputs.page_table,
            causal=True,
        )  # fmt: skip

    return call


def page_lists(cell: Cell, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's form of a page table: where each sequence's pages begin, all pages, rows of each last page."""
    lengths = inputs.lengths
    counts = (lengths + cell.page - 1) // cell.page
    starts = torch.zeros(cell.batch + 1, dtype=torch.int32, device=lengths.device)
    starts[1:] = counts.cumsum(0)
    used = torch.arange(inputs.page_table.shape[1], device=lengths.device) < counts[:, None]
    return starts, inputs.page_table[used], (lengths - 1) % cell.page + 1


def _workspace() -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _flashinfer_decode(cell: Cell, inputs: Inputs) -> Call:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
    wrapper.plan(
        *page_lists(cell, inputs), cell.heads, cell.kv_heads, cell.head_dim, cell.page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q, caches = inputs.q.flatten(0, 1), (inputs.k_cache, inputs.v_cache)
    return lambda: wrapper.run(q, caches)


def _flashinfer_prefill(cell: Cell, inputs: Inputs, backend: str) -> Call:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=backend)
    queries = torch.arange(cell.batch + 1, dtype=torch.int32, device="cuda") * cell.queries
    wrapper.plan(
        queries, *page_lists(cell, inputs), cell.heads, cell.kv_heads, cell.head_dim, cell.page, causal=True,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q, caches = inputs.q.flatten(0, 1), (inputs.k_cache, inputs.v_cache)
    return lambda: wrapper.run(q, caches)
