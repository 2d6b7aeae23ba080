"""Tensors as rows, and the launches over them that a call of the same tensors repeats."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel import jit
from jit_kernel.device import Target

Strides = tuple[int, int]
MOST_THREADS = 512  # of a block, as cuda/rows.cuh has it
_WARP, _FEW_ROWS, _MANY_HEADS = 32, 256, 16384
_KEPT, _BLOCKS_NUMBERS = 4, 16384
_MOST_PLANS = 4096  # of a kernel: batches of a serving engine have as many shapes as tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call of tensors of known dtypes, shapes and strides does: one launch with these numbers, or nothing."""

    launch: Callable[..., Any] | None
    numbers: tuple[Any, ...] = ()
    on_cpu: bool = False

    def __call__(self, *arguments: Any, then: tuple[Any, ...] = ()) -> None:
        """The launch: tensors, the plan's numbers, then those of the call."""
        if self.launch is None:
            return
        if self.on_cpu:
            self.launch(*arguments, *self.numbers, *then, torch.get_num_threads())
        else:
            self.launch(*arguments, *self.numbers, *then)


class Plans:
    """The plans of one kernel by what they depend on; `make` checks the tensors of a new one."""

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._known: dict[Any, Plan] = {}

    def of(self, *values: Any) -> Plan:
        """The plan for these tensors and other values, in the order of `make`'s parameters."""
        try:
            signatures = [_signature(value) if isinstance(value, Tensor) else value for value in values]
        except RuntimeError:  # a tensor without memory has no address: the checks name it
            return self._make(*values)
        key = (torch.is_grad_enabled(), *signatures)
        plan = self._known.get(key)
        if plan is None:
            if len(self._known) >= _MOST_PLANS:
                self._known.clear()
            plan = self._known[key] = self._make(*values)
        return plan


def _signature(value: Tensor) -> tuple[Any, ...]:
    # 1 us on a slow machine, of which the shape and the strides are half.
    if value.__class__ is not Tensor and value.__class__ is not Parameter:
        raise RuntimeError("a subclass may have no memory, or another's")
    kind = value.dtype, value.device, value.requires_grad, value.is_neg()
    return *kind, value.shape, value.stride(), value.data_ptr() & 15


@functools.cache
def cuda_kernel(file: str, entry: str, device: torch.device | str) -> jit.Kernel:
    """A kernel of ops/<file>.h for a GPU, or for a target."""
    architecture = str(device)
    overlaps = "sm_9" in architecture or "sm_1" in architecture
    if isinstance(device, torch.device):
        overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    return jit.cuda(None, f"ops/{file}.h", entry=f"jit_kernel::{entry}", device=device, programmatic=overlaps)


@functools.cache
def cpu_library(file: str) -> jit.Library:
    """The functions of ops/<file>.h for the CPU."""
    return jit.library(None, f"ops/{file}.h", exports=[f"JIT_KERNEL_EXPORT_{file.upper()}()"])


def on_cpu(file: str, name: str, numbers: tuple[Any, ...]) -> Plan:
    """One call of one of them."""
    return Plan(cpu_library(file).load()[name], numbers, on_cpu=True)


def declare(file: str, *entries: str) -> None:
    """Have the CPU's library and these instances compiled by `python -m jit_kernel.warmup --module jit_kernel.ops`."""

    def kernels(target: Target) -> list[jit.Kernel | jit.Library]:
        if target.vendor == "cpu":
            return [cpu_library(file)]
        return [cuda_kernel(file, entry, str(target)) for entry in entries]

    jit.declare(kernels)


def entry(name: str, *arguments: torch.dtype | bool | int) -> str:
    """An instance of a template; the types by the names of the headers, which are the same on both devices."""
    return f"{name}<{', '.join(map(_argument, arguments))}>"


def _argument(value: torch.dtype | bool | int) -> str:
    return jit.ctype(value, "cpu") if isinstance(value, torch.dtype) else str(value).lower()


def nested(named: Mapping[str, Tensor | None], trailing: int = 1) -> tuple[int, int, dict[str, Strides]]:
    """The rows of tensors of one shape but for its last dimensions: how many, those of the inner of two dimensions,
    and each tensor's strides over both.

    Raises ValueError where no two dimensions have all rows of all tensors.
    """
    found = [value for value in named.values() if value is not None]
    leading = tuple(found[0].shape[: found[0].ndim - trailing])
    kept = [place for place, size in enumerate(leading) if size != 1]
    for split in range(len(kept) + 1):
        outer, inner = kept[:split], kept[split:]
        strides = {
            name: (_one(value, outer), _one(value, inner)) if value is not None else (0, 0)
            for name, value in named.items()
        }
        if all(None not in pair for pair in strides.values()):
            return math.prod(leading), max(1, math.prod(leading[place] for place in inner)), strides  # type: ignore[return-value]
    listed = ", ".join(f"{name} {value.stride()}" for name, value in named.items() if value is not None)
    raise ValueError(f"strides are {listed}; together they must be those of rows in at most two dimensions")


def _one(value: Tensor, places: Sequence[int]) -> int | None:
    """The stride of several dimensions taken as one; None if they are not evenly apart."""
    if not places:
        return 0
    for place, following in itertools.pairwise(places):
        if value.stride(place) != value.stride(following) * value.shape[following]:
            return None
    return value.stride(places[-1])


def wide(elements: int, *values: Tensor | None) -> bool:
    """Whether tensors can be read in pieces of so many elements: addresses, strides and sizes are such multiples."""
    for value in values:
        if value is None:
            continue
        steps = [step for size, step in zip(value.shape[:-1], value.stride(), strict=False) if size > 1]
        aligned = value.data_ptr() % min(16, elements * value.element_size()) == 0
        if not aligned or value.shape[-1] % elements or any(step % elements for step in steps):
            return False
    return True


def block_of(pieces: int, rows: int, few: int = 1) -> tuple[tuple[int, int], int]:
    """The block for rows of so many 16-byte pieces: its threads and rows, and the pieces that a thread keeps.

    A thread has four pieces on their way, so that enough are, or of few rows `few`, so that each takes less long.
    """
    many = rows > _FEW_ROWS
    if pieces <= _WARP:
        each = (4 if pieces >= 16 else 2 if pieces >= 8 else 1) if many else 1
        return _short(math.ceil(pieces / each)), each
    each = _KEPT if many else few
    while each < 4 and math.ceil(pieces / each) > MOST_THREADS:
        each *= 2
    threads = math.ceil(math.ceil(pieces / each) / _WARP) * _WARP
    return (min(threads, MOST_THREADS), 1), each


def _short(pieces: int) -> tuple[int, int]:
    """The block for rows of so many threads, at most a warp: a power of two, and the rows."""
    threads = 1 << max(pieces - 1, 0).bit_length()
    return threads, max(1, 4 * _WARP // threads)


def on_gpu(
    file: str,
    name: str,
    device: torch.device,
    rows: int,
    block: tuple[int, int],
    numbers: tuple[Any, ...],
    columns: int = 1,
) -> Plan:
    """One launch of an instance over rows, each by `columns` blocks. Raises ValueError for more than it counts."""
    if rows >= 1 << 31:
        raise ValueError(f"there are {rows} rows; there must be fewer than 2^31")
    kernel = cuda_kernel(file, name, device)
    return Plan(kernel[(math.ceil(rows / block[1]), columns), block], numbers)


def columns_of(pieces: int, rows: int) -> tuple[tuple[int, int], int, int]:
    """For numbers that need no others of their row: the block, how many share a row, and a thread's pieces."""
    if pieces <= _WARP:
        return _short(pieces), 1, 1
    each, most = (1, 4 * _WARP) if rows <= _FEW_ROWS else (2, 8 * _WARP)
    threads = min(most, math.ceil(math.ceil(pieces / each) / _WARP) * _WARP)
    return (threads, 1), math.ceil(pieces / (threads * each)), each


def head_block(threads: int) -> tuple[int, int]:
    """The block for heads of so many threads each."""
    return _short(threads) if threads <= _WARP else (2 * _WARP, 1)


def heads_each(threads: int, heads: int) -> int:
    """How many heads of a token the threads of one take, which are at most a warp where they are several."""
    return 4 if threads <= _WARP and heads > _MANY_HEADS else 1


def warps_each(turns: int, tokens: int) -> int:
    """How many warps share a token whose pieces are so many turns of one: all of them where tokens are few."""
    return turns if tokens <= _FEW_ROWS else min(turns, 8)


def even(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in rows of one size, where a size suits them: a long row alone would be one block's."""
    size = math.gcd(x.numel(), 8192)
    if size < 1024 or not (x.is_contiguous() and out.is_contiguous()):
        return x, out
    return x.view(-1, size), out.view(-1, size)


def fits_a_block(x: Tensor, out: Tensor) -> bool:
    """Whether one block of a GPU keeps a whole tensor in registers: then one kernel does what else takes two."""
    return not x.is_cpu and 0 < x.numel() <= _BLOCKS_NUMBERS and x.is_contiguous() and out.is_contiguous()


def grouped(x: Tensor, groups: int) -> Tensor:
    """A view of x with its last dimension in groups."""
    return x.as_strided((*x.shape[:-1], groups, x.shape[-1] // groups), (*x.stride()[:-1], x.shape[-1] // groups, 1))
