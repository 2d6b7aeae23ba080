"""Launches pure_read.cuh: the time that reading the pages of a cache takes where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jit_kernel.device import Target, device_target
from jit_kernel.engine import cubin
from jit_kernel.jit import Cubin, KernelSpec

FOLDER = "benchmarks/pure_read"
NAME = "read_pages"
TYPES = "ppppiiii"  # units, k, v, sums; how many units, bytes of a row, of a page, of a piece
WARPS = 8  # this and the next: as in the source
RING_BYTES = 128 * 1024
MOST_PIECE_BYTES = RING_BYTES // WARPS // 2  # two in flight a warp at least
MOST_PIECES = 2**30  # turns beyond the last are counted in 32 bits, too


def spec() -> KernelSpec:
    """The kernel; its text is the unit, because it lies outside the kernel sources."""
    source = Path(__file__).with_name("pure_read.cuh").read_text(encoding="utf-8")
    unit = source.replace("#pragma once\n", "")  # of a file that is not included NVRTC warns
    return KernelSpec(FOLDER, unit, "cuda", (("function", NAME),), ("--ptxas-options=-v",))


class PureRead(cubin.DeviceKernels):
    """The kernel on one GPU, through the launcher that knows no kernel."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index, self._target(index), cubin.launcher_of(FOLDER))
        self.handle = self.load((NAME,), spec())

    @staticmethod
    def _target(index: int) -> Target:
        target = device_target(torch.device("cuda", index))
        if target.architecture != "sm_90a":
            raise NotImplementedError(f"bulk copies need cuda:sm_90a, not {target}")
        return target

    def _keep(self, functions: Any) -> None:
        self.launch = functions["launch"]

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        return NAME, TYPES, 32 * WARPS, RING_BYTES

    def reader(
        self, units: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, sums: torch.Tensor | None = None
    ) -> Callable[[], None]:
        """What reads the pages of `units` once; the words that were read are added to `sums`, int32, where given."""
        arguments = launch_arguments(units, k_cache, v_cache)
        return lambda: self.launch(self.handle, self.multiprocessors, units, k_cache, v_cache, sums, *arguments)

    def check(self, units: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Raises RuntimeError where the kernel does not read every word of the pages once."""
        sums = torch.zeros(1, dtype=torch.int32, device=units.device)
        self.reader(units, k_cache, v_cache, sums)()
        read, right = int(sums) % 2**32, sum_of_words(units, k_cache, v_cache)
        if read != right:
            raise RuntimeError(f"the pure read sums its words to {read}; they are {right}")


def launch_arguments(units: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int, int]:
    """The kernel's numbers for contiguous caches (pages, page_size, heads, d) of the same shape."""
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous and of one shape")
    row_bytes = k_cache[0, 0].numel() * k_cache.element_size()
    if row_bytes % 16:
        raise ValueError(f"a row of the cache has {row_bytes} bytes; bulk copies need a multiple of 16")
    page_bytes = row_bytes * k_cache.shape[1]
    piece_bytes = min(page_bytes, MOST_PIECE_BYTES)
    pieces = 2 * units.shape[0] * -(-page_bytes // piece_bytes)
    if pieces > MOST_PIECES:
        raise ValueError(f"the pages make {pieces} pieces; the kernel counts to {MOST_PIECES}")
    return units.shape[0], row_bytes, page_bytes, piece_bytes


def units_of(page_table: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """(n, 2) int32: each page that holds keys, in the order of the sequences, and how many rows of it are keys."""
    starts = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    rows = (lengths[:, None] - starts).clamp(0, page_size).int()
    return torch.stack((page_table.int(), rows), dim=-1)[rows > 0].contiguous()


def in_order(units: torch.Tensor) -> torch.Tensor:
    """The same number of pages, each behind the one before it in memory."""
    pages = torch.arange(units.shape[0], dtype=torch.int32, device=units.device)
    return torch.stack((pages, units[:, 1]), dim=-1).contiguous()


def sum_of_words(units: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> int:
    """The sum of the 32-bit words in the rows of `units`, modulo 2^32."""
    total = 0
    for cache in (k_cache, v_cache):
        by_row = cache.view(torch.int32).sum(dim=(2, 3), dtype=torch.int64)[units[:, 0].long()]
        counted = torch.arange(cache.shape[1], device=units.device) < units[:, 1:]
        total += int(by_row[counted].sum())
    return total % 2**32
