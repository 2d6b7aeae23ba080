"""A serving engine as the attention layer meets it: caches, random batches, and the right answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.attention import AttentionLayer, ForwardMetadata
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.musa_device import to_cpu, to_musa

PAGE = 4


class Engine:
    """A model's caches on musa:index, or on the CPU for None, and metadata for random batches."""

    def __init__(self, index: int | None, seed: int, heads: tuple[int, int]) -> None:
        self.index, self.random = index, torch.Generator().manual_seed(seed)
        self.hq, self.hk = heads
        pages = torch.randn(2, 64, PAGE, self.hk, 64, generator=self.random).bfloat16()
        self.k, self.v = self.place((pages[0], pages[1]))

    def place(self, tree: Any) -> Any:
        return tree if self.index is None else to_musa(tree, self.index)

    def roll(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.random))

    def batch(self, size: int, tag: str, rows: int = 1, ragged: bool = False) -> tuple[Tensor, ForwardMetadata]:
        """Queries and metadata of `size` sequences with random lengths."""
        lengths = torch.randint(rows, 6 * PAGE, (size,), generator=self.random, dtype=torch.int32)
        table = torch.randint(0, 64, (size, 6), generator=self.random, dtype=torch.int32)
        shape = (size * rows, self.hq, 64) if ragged else (size, rows, self.hq, 64)
        q = torch.randn(shape, generator=self.random).bfloat16()
        cu = torch.arange(0, size * rows + 1, rows, dtype=torch.int32) if ragged else None
        metadata = ForwardMetadata(cu, rows, lengths, self.roll(6, 12) * PAGE, table, tag=tag)
        return self.place(q), ForwardMetadata(**self.place(vars(metadata)))


def expected(q: Tensor, engine: Engine, metadata: ForwardMetadata, layer: AttentionLayer) -> Tensor:
    plain = {name: to_cpu(x) for name, x in vars(metadata).items()}
    out: Tensor = CPU["flash_attn_with_kvcache"](
        q=to_cpu(q),
        k_cache=to_cpu(engine.k),
        v_cache=to_cpu(engine.v),
        **{name: plain[name] for name in ("cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q")},
        causal=layer.causal,
        window_size=layer.window_size,
        softmax_scale=1 / 8,
    )
    return out


FULL, SWA = AttentionLayer(), AttentionLayer(window_size=(9, 0))


def close(found: Tensor, wanted: Tensor) -> None:
    assert torch.allclose(to_cpu(found).float(), wanted.float(), rtol=2e-2, atol=2e-2)
