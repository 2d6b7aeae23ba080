"""Random tensors of a case, from the seed of its plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.cases import FP8, Plan


def raw(x: Tensor) -> Tensor:
    """x, or its bytes where torch has no indexing for its dtype."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


class Maker:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = torch.Generator().manual_seed(plan.seed)
        self.batch = len(plan.lengths_q)
        self.slots: Callable[[int, int, int], tuple] = lambda i, a, b: ()  # where tokens a to b of sequence i lie

    def roll(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.random))

    def normal(self, *shape: int, dtype: torch.dtype | None = None, factor: float = 1.0) -> Tensor:
        dtype = dtype or self.plan.dtype
        values = torch.randn(*shape, generator=self.random) * factor
        return values.clamp(-440, 440).to(self.plan.device).to(dtype)

    def ints(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.plan.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None, strided: bool = False) -> Tensor:
        """All NaN; when strided, a view with a unit last stride into something larger."""
        step = self.plan.stride_step
        kind = self.roll(4) if strided else 0
        if kind == 0:
            return self._nans(shape, dtype)
        if kind == 1:  # rows wider than they say, starting off the beginning
            wide = step * (1 + self.roll(5))
            padded = -(-shape[-1] // step) * step + 2 * wide
            return self._nans((*shape[:-1], padded), dtype)[..., wide : wide + shape[-1]]
        if kind == 2:  # heads outside of tokens
            *front, tokens, heads, d = shape
            return self._nans((*front, heads, tokens, -(-d // step) * step), dtype).transpose(-2, -3)[..., :d]
        between = self._nans((shape[0], 2, *shape[1:-1], -(-shape[-1] // step) * step), dtype)
        return between[:, self.roll(2), ..., : shape[-1]]  # another tensor's rows in between

    def _nans(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        x = torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.plan.device)
        return x.view(torch.uint8).fill_(0x7F).view(FP8) if x.dtype == FP8 else x.fill_(torch.nan)
