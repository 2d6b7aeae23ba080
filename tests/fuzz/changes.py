"""Ways to change a valid call, each a small function of a random source, the call and the name of one argument.

A change gives the call's new arguments and whether it must still be served; None where it does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.support.cases import FP8

Call = dict[str, Any]
MOST = 2**22
Change = Callable[[Random, Call, str], Call | None]

INTS = (
    *(-1, 0, 1, 2, 3, 64, 255, 256, 257, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63)),
    *(True, False, None, 1.0, 2.5, "3", math.nan, math.inf, numpy.int64(3), numpy.int32(-1), [1], (1,), object()),
)
FLOATS = (
    *(0.0, -0.0, 1.0, 0.1, -1.0, math.nan, math.inf, -math.inf, 1e39, 1e308, 1e-300, 1e-45, 1e-38, 3.4e38, 1, 2, 2**63),
    *(10**30, 10**400, -(10**30), None, "8", True, numpy.float32(0.5), numpy.float64(math.nan), Fraction(1, 3)),
    *(Decimal("0.5"), 1j, [0.5]),
)
BOOLS = (True, False, 0, 1, 2, None, "yes", "", numpy.bool_(True), [], 0.0)
WINDOWS = (
    *((-1, -1), (0, 0), (3, 0), (0, 3), (-1, 0), (5, -1), [2, 2], None, (None, None), (None, 0), 3, "ab", (1,)),
    *((1, 2, 3), (-2, 0), (0, -2), (2**31, 0), (2**31 - 1, 2**31 - 1), (0, 2**63), (10**30, 0), (1.0, 0), (True, 1)),
    *((math.nan, 0), ("1", "2"), {}, range(2), (numpy.int64(2), numpy.int32(0))),
)
TENSOR_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8, torch.float8_e5m2, torch.int8, torch.uint8),
    *(torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.uint32),
)
DTYPES = (*TENSOR_DTYPES, None, "bf16", 6, float)
BY_NAME = {
    "causal": BOOLS, "return_softmax_lse": BOOLS, "pack_gqa": BOOLS, "only_qv": BOOLS, "deterministic": BOOLS,
    "rotary_interleaved": BOOLS, "has_softcap": BOOLS, "softmax_scale": FLOATS, "softcap": FLOATS,
    "window_size": WINDOWS, "qkv_dtype": DTYPES, "out_dtype": DTYPES,
}  # fmt: skip


def scalar(random: Random, call: Call, name: str) -> Call | None:
    """Another number, a wrong one, or none."""
    if isinstance(call.get(name), Tensor):
        return None
    pool: Any = BY_NAME.get(name, INTS)
    tensors = torch.tensor(2), torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(2, device="meta")
    return {name: random.choice((*pool, *tensors))}


def no_tensor(random: Random, call: Call, name: str) -> Call | None:
    value = call.get(name)
    if not isinstance(value, Tensor):
        return None
    wrong = (None, "text", 3, 2.5, [], [1.0, 2.0], numpy.zeros(3), object(), (value, value), torch.float32, True)
    return {name: random.choice(wrong)}


def of_tensor(function: Callable[[Random, Tensor], Tensor | None]) -> Change:
    def change(random: Random, call: Call, name: str) -> Call | None:
        value = call.get(name)
        if type(value) is not Tensor or value.layout is not torch.strided or value.numel() > MOST:
            return None  # a giant one has no memory, and a change of it would take some
        made = function(random, value)
        return None if made is None else {name: made}

    change.__name__ = function.__name__
    return change


@of_tensor
def dtype(random: Random, x: Tensor) -> Tensor:
    wanted = random.choice(TENSOR_DTYPES)
    return (x.float() if x.dtype == FP8 else x).to(wanted)


@of_tensor
def bits(random: Random, x: Tensor) -> Tensor:
    """The same memory read as another dtype of the same size."""
    return x.view({1: torch.int8, 2: torch.bfloat16, 4: random.choice((torch.int32, torch.float32))}[x.element_size()])


@of_tensor
def shape(random: Random, x: Tensor) -> Tensor | None:
    """One dimension more or less, another size, other dimensions' order."""
    place = random.randrange(x.dim()) if x.dim() else 0
    ways: list[Callable[[], Tensor]] = [lambda: x[None], lambda: x[..., None]]
    if x.dim():
        size = x.shape[place]
        ways += [
            lambda: x.flatten(),
            lambda: x.narrow(place, 0, 0),
            lambda: x.narrow(place, 0, max(size - 1, 0)),
            lambda: x.narrow(place, min(1, size), max(size - 1, 0)),
            lambda: torch.cat([x, x], place) if x.dtype != FP8 else x.repeat_interleave(2, place),
            lambda: x.transpose(place, random.randrange(x.dim())),
            lambda: x.select(place, 0) if size else x[None],
            lambda: x.narrow(place, 0, min(1, size)),
            lambda: x.flatten()[0] if x.numel() else x[None],
            lambda: x.new_empty(()),
        ]
    return random.choice(ways)()


@of_tensor
def strides(random: Random, x: Tensor) -> Tensor | None:
    """Gaps in the last dimension, repeated rows, elements that overlap."""
    if not x.dim() or x.numel() > 2**20:
        return None
    place = random.randrange(x.dim())

    def gaps() -> Tensor:
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]

    def overlapping() -> Tensor:
        new = list(x.stride())
        new[place] = random.choice((1, 0, max(new[place] - 1, 0)))
        return x.as_strided(x.shape, new, x.storage_offset())

    def by_columns() -> Tensor:
        return x.transpose(-1, place).contiguous().transpose(-1, place)

    repeated = x.narrow(place, 0, min(1, x.shape[place])).expand(x.shape) if x.shape[place] else x
    return random.choice((gaps, overlapping, by_columns, lambda: repeated))()


@of_tensor
def giant(random: Random, x: Tensor) -> Tensor | None:
    """A dimension as large as can be said, without memory for it."""
    if not x.dim() or 0 in x.shape or max(x.shape) > 2**20:
        return None
    place = random.randrange(x.dim())
    size = random.choice((2**31 - 1, 2**31, 2**31 + 5, 2**32, 2**32 + x.shape[place], 2**40))
    return x.narrow(place, 0, 1).expand(*x.shape[:place], size, *x.shape[place + 1 :])


@of_tensor
def index_values(random: Random, x: Tensor) -> Tensor | None:
    """Other numbers in an index tensor."""
    if x.dtype not in (torch.int32, torch.int64) or not x.numel():
        return None
    made = x.clone().flatten()
    place, n = random.randrange(made.numel()), int(made.max())
    ways = {
        "one": lambda: made.__setitem__(place, random.choice((-1, -(2**31), 2**31 - 1, n + 1, 0, n, 1 << 20, -n - 1))),
        "all": lambda: made.fill_(random.choice((0, -1, 2**31 - 1, 1, n))),
        "order": lambda: made.copy_(made[torch.randperm(made.numel())]),
        "next": lambda: made.add_(random.choice((-1, 1, 1000))),
    }
    ways[random.choice(list(ways))]()
    return made.view(x.shape)


@of_tensor
def int64(random: Random, x: Tensor) -> Tensor | None:
    return x.long() if x.dtype == torch.int32 else None


def _floats(function: Callable[[Random, Tensor], Tensor]) -> Change:
    def change(random: Random, x: Tensor) -> Tensor | None:
        if not x.is_floating_point() or not x.numel() or x.numel() > 2**20 or x.dtype.itemsize == 8:
            return None
        spans = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride == 0 and size > 1]
        if spans:
            return None
        with torch.no_grad():
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            made.copy_(function(random, x.float()).to(x.dtype))
        return made

    change.__name__ = function.__name__
    return of_tensor(change)


@_floats
def some_nan(random: Random, x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    rows = x.view(-1, x.shape[-1])
    rows[random.randrange(rows.shape[0])] = random.choice((math.nan, math.inf, -math.inf))
    return x


@_floats
def many_nan(random: Random, x: Tensor) -> Tensor:
    return torch.where((torch.rand(x.shape[: x.dim() - 1]) < 0.5)[..., None].to(x.device), x, math.nan)


@_floats
def zeros(random: Random, x: Tensor) -> Tensor:
    return x * 0.0


@_floats
def tiny(random: Random, x: Tensor) -> Tensor:
    return x * random.choice((1e-3, 1e-6, 1e-20))


@_floats
def huge(random: Random, x: Tensor) -> Tensor:
    return (x * random.choice((30.0, 400.0, 1e4))).clamp(-400, 400) if random.random() < 0.5 else x * 30.0


@_floats
def equal(random: Random, x: Tensor) -> Tensor:
    return x.flatten()[0].expand(x.shape) if bool(x.flatten()[0].isfinite()) else x


def sharing(random: Random, call: Call, name: str) -> Call | None:
    """This argument in the memory of another one: at its start, behind it, or wholly the same tensor."""
    value = call.get(name)
    others = [other for other, x in call.items() if other != name and type(x) is Tensor and x.numel()]
    if type(value) is not Tensor or not others or not value.numel() or value.numel() > 2**20:
        return None
    other = random.choice(others)
    x = call[other]
    if random.random() < 0.3:
        return {name: x}
    shift = random.choice((0, 0, 1, 8, 64))
    if x.dtype != value.dtype or x.numel() > 2**20:
        return None
    memory = torch.zeros(shift + max(x.numel(), value.numel()) + 64, dtype=x.dtype, device=x.device)
    first = memory[: x.numel()].view(x.shape)
    second = memory[shift : shift + value.numel()].view(value.shape)
    second.view(torch.uint8).copy_(value.contiguous().view(torch.uint8))
    first.view(torch.uint8).copy_(x.contiguous().view(torch.uint8))
    return {other: first, name: second}


def missing(random: Random, call: Call, name: str) -> Call | None:
    return {name: None} if call.get(name) is not None else None


# Those after which the call must still be served are named in VALID.
CHANGES: dict[Change, int] = {
    scalar: 30, no_tensor: 6, dtype: 8, bits: 2, shape: 12, strides: 10, giant: 5, index_values: 14, int64: 2,
    some_nan: 6, many_nan: 4, zeros: 2, tiny: 3, huge: 5, equal: 2, sharing: 8, missing: 4,
}  # fmt: skip
VALID: dict[Change, int] = {some_nan: 3, many_nan: 2, zeros: 2, tiny: 3, huge: 4, equal: 2}
