"""Random tensors for the ops, in the layouts that engines have, and the rule that judges results against float64."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from jit_kernel.ops import launch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
# Of each op on each device: 40 in `make test`, all with JIT_KERNEL_TEST_CASES=300; a GPU takes all of them.
CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "40"))
ON_GPU = int(os.environ.get("JIT_KERNEL_TEST_CASES", "300"))
# Half the distance of two neighbours over the smaller one, and half the smallest number.
_ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    E4M3: (2.0**-4, 2.0**-10),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cases(device: str) -> Iterator[int]:
    """The seeds of a device's random cases."""
    return seeds(CASES if device == "cpu" else ON_GPU)


def seeds(count: int) -> Iterator[int]:
    """So many seeds; with every second one a call is launched on a GPU as one of many rows is."""
    few = launch._FEW_ROWS, launch._MANY_HEADS
    try:
        for seed in range(count):
            launch._FEW_ROWS, launch._MANY_HEADS = (0, 0) if seed % 2 else few
            yield seed
    finally:
        launch._FEW_ROWS, launch._MANY_HEADS = few


class Draw:
    """One random case: numbers and layouts by a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.random = random.Random(seed)
        self.device = device
        self._torch = torch.Generator(device).manual_seed(seed)

    def size(self, most: int) -> int:
        """A size up to `most`: often a multiple of a vector, else any."""
        step = self.random.choice((1, 1, 8, 16, 64))
        return max(1, self.random.randint(1, max(1, most // step)) * step)

    def rows(self, most: int = 12) -> int:
        """A number of rows, at times none."""
        return self.random.choice((0, 1, 1, self.random.randint(2, most), self.random.randint(2, most)))

    def normal(self, *shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        """Random numbers in a random layout: dense, or a part of wider rows, at times off a vector's boundary."""
        return self.laid((torch.randn(shape, generator=self._torch, device=self.device) * spread).to(dtype))

    def laid(self, value: Tensor) -> Tensor:
        """The same numbers in a random layout, NaN around them."""
        if not value.ndim or self.random.random() < 0.4:
            return value
        before, behind = self.random.choice(((0, 8), (16, 0), (1, 2), (8, 24), (3, 0)))
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.element_size()]
        wide = torch.full((*value.shape[:-1], before + value.shape[-1] + behind), -1, dtype=bits, device=self.device)
        inside = wide.view(value.dtype)[..., before : before + value.shape[-1]]
        inside.view(bits).copy_(value.view(bits)) if value.numel() else None
        return inside

    def poisoned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for a result in a random layout, NaN in it."""
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        return self.laid(torch.full(shape, -1, dtype=bits, device=self.device).view(dtype))


def surroundings(value: Tensor) -> Tensor:
    """A copy of all bytes of the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage()).clone()


def assert_close(found: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """`found` is `exact` (float64) rounded once, of numbers that may be off by `slack`, and NaN where that is."""
    relative, smallest = _ROUNDING[found.dtype]
    exact = exact.clamp(-448, 448) if found.dtype == E4M3 else exact
    allowed = exact.abs() * relative * 1.0001 + smallest + slack
    error = (found.double() - exact).abs()
    wrong = ~((error <= allowed) | (found.double().isnan() & exact.isnan()))
    assert found.shape == exact.shape
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, the first: {found[wrong][0].item()} for {exact[wrong][0].item()}"
        f", off by {error[wrong][0].item():.3g} where {allowed[wrong][0].item():.3g} is allowed"
    )
