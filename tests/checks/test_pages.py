"""Which entries of a page table must name a page: those of keys that some query sees, and of new ones, no others.

The kernel says it of each entry, and so do the checks in Python, which are a GPU's.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.checks import call as checks
from jit_kernel.fa3.checks import indices, shapes
from tests.support import case_tensors, cases, hidden

SPACE = cases.Space("pages", dtypes=(torch.float32,), head_dims=((16, 16),), any_head_dim=0, qv_head_dims=(),
                    functions=(cases.VARLEN, cases.KVCACHE), page_sizes=(3, 8, 16), lengths=(50, 90, 90))  # fmt: skip


def message_of(make: Any, *arguments: Any, **named: Any) -> str:
    """What a ValueError about the page table says, nothing where there is none."""
    try:
        make(*arguments, **named)
    except ValueError as error:
        said = str(error)
    else:
        said = "page_table["
    assert said.startswith("page_table[")
    return said.removeprefix("page_table[")


def test_the_kernel_and_the_checks_need_the_same_entries() -> None:
    needed = free = 0
    for seed in range(150):
        plan = hidden.draw(seed, SPACE)
        if not plan.page_size:
            continue
        case = case_tensors.build(plan)
        function = getattr(fa3, plan.function)
        names = inspect.signature(function).parameters
        defaults = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
        arguments = calls.of(plan.function, defaults | case.arguments)
        facts = dataclasses.replace(shapes.check(calls.Call(*arguments)), on_host=False)
        call = checks.checked(arguments)
        whole = case.arguments["page_table"]
        for i in range(facts.batch):
            row, entries = hidden.needed_entries(case, i)
            for column in range(whole.shape[1]):
                table = whole.clone()
                table[row, column] = -1
                call.page_table = table
                by_python = message_of(indices.check, call, facts)
                by_kernel = message_of(function, **{**case.arguments, "page_table": table})
                assert by_python == by_kernel, (plan, row, column)
                assert bool(by_kernel) == (column in entries), (plan, row, column)
                needed += bool(by_kernel)
                free += not by_kernel
    assert min(needed, free) > 300, (needed, free)
