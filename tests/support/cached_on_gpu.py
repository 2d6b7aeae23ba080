"""The Hopper kernels on cached keys, called as the public functions are, with checks and without the dispatcher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Result
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.hopper import cached
from tests.support import cases

# Sequences around the kernels' tiles of 128 and 192 rows and of 80 to 128 keys, and pages of every kind: copied row by
# row, in boxes of 8 rows to a whole block, smaller and larger than a block.
SPACE = cases.Space(
    "cached",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    any_head_dim=256,
    head_dim_step=8,
    qv_head_dims=(),
    functions=(cases.VARLEN, cases.KVCACHE),
    features=cases.FEATURES - {"append", "new_ragged", "rotary", "qv", "only_qv", "odd_head_size"},
    page_sizes=(1, 2, 3, 8, 16, 19, 24, 48, 64, 80, 96, 100, 128, 256),
    lengths=(150, 500, 1500),
    max_heads=16,
    stride_step=8,
)


def _call(function: str, **arguments: Any) -> Result:
    names = inspect.signature(getattr(fa3, function)).parameters
    defaults = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
    return cached.attend(checked(calls.of(function, {**defaults, **arguments})))


FUNCTIONS: Mapping[str, Callable[..., Result]] = {name: partial(_call, name) for name in SPACE.functions}


def has_cache(plan: cases.Plan) -> bool:
    """Whether the keys of a plan lie in a cache: in pages, or as flash_attn_with_kvcache takes them."""
    return plan.function == cases.KVCACHE or plan.page_size > 0


def plans(first: int, count: int, draw: Callable[[int, cases.Space], cases.Plan] = cases.draw) -> list[cases.Plan]:
    """The next plans on a cache, from a seed on."""
    found: list[cases.Plan] = []
    seed = first
    while len(found) < count:
        plan = draw(seed, SPACE)
        found += [plan] if has_cache(plan) else []
        seed += 1
    return found
