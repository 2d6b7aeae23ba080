"""Appends by the Hopper kernel, on a GPU or compiled for the CPU, against the CPU implementation's, byte by byte."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jit_kernel import device, flash_attn_with_kvcache, jit
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.hopper import append, kernels
from tests.support import case_run, case_tensors, cases

FEATURES = frozenset(
    {"ragged", "paged", "append", "new_ragged", "rotary", "batch_idx", "leftpad", "causal", "window", "chunk"}
    | {"seqused_k", "strides", "groups", "empty", "hot", "tail", "large"}
)


def space(name: str, stride_step: int) -> cases.Space:
    """Calls with a cache. With a stride_step of 1, rows begin anywhere."""
    return cases.Space(
        name, dtypes=(torch.bfloat16, torch.float16), any_head_dim=256, head_dim_step=8, qv_head_dims=(),
        functions=(cases.KVCACHE,), features=FEATURES, stride_step=stride_step,
    )  # fmt: skip


def mixed_space(name: str, stride_step: int) -> cases.Space:
    """The same over a cache in e4m3, quantised by factors of sequences and tokens or stored as they come."""
    plain = space(name, stride_step)
    return dataclasses.replace(plain, features=FEATURES | cases.FP8_CACHES, head_dim_step=16)


def fp8_space(name: str, stride_step: int) -> cases.Space:
    """The same beside queries in e4m3: new keys and values are the cache's bytes, but for keys that are turned."""
    return dataclasses.replace(mixed_space(name, stride_step), dtypes=(cases.FP8,))


def with_append(space: cases.Space, count: int) -> list[cases.Plan]:
    """The first plans of a space that append."""
    plans = (cases.draw(seed, space) for seed in itertools.count())
    return list(itertools.islice((plan for plan in plans if plan.lengths_new is not None), count))


class OnHost:
    """Stands for a GPU's loaded kernels: the same sources, compiled for the CPU."""

    def __init__(self) -> None:
        unit = Path(__file__).with_name("append_on_host.h").read_text(encoding="utf-8")
        flags = ("-ffp-contract=off",)
        library = jit.load(jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "append_on_host"),), flags),
                           device.cpu_target())  # fmt: skip
        self.quotient = library["quotient"]
        self.append = library["append"]
        elements = (torch.float16, torch.bfloat16, cases.FP8)
        self.handles = {("append", dtype, quantises): library["load"](element, quantises)
                        for element, dtype in enumerate(elements) for quantises in (False, True)}  # fmt: skip


def moved(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Copies of all tensors with the memory around them; tensors that share memory share its copy."""
    memory: dict[int, Tensor] = {}
    copies = dict(arguments)
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = case_run.storage_bytes(x).clone().to(where)
        copies[name] = case_run.same_view(x, memory[storage.data_ptr()])
    return copies


def call_of(arguments: dict[str, Any]) -> Call:
    """The checked call of flash_attn_with_kvcache with these arguments."""
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return checked(calls.of(calls.KVCACHE, defaults | arguments))


def poisoned_like(q: Tensor) -> Tensor:
    """Memory for the rotated q, every row of it NaN."""
    return torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device)


def rotated_queries(arguments: dict[str, Any]) -> Tensor:
    """What the rotated q must hold: products and sums of float32, rounded once; NaN where no query is."""
    q, cos, sin = arguments["q"], arguments["rotary_cos"].float(), arguments["rotary_sin"].float()
    expected = poisoned_like(q)
    lengths = arguments["cache_seqlens"]
    batch = q.shape[0] if "cu_seqlens_q" not in arguments else len(arguments["cu_seqlens_q"]) - 1
    starts = arguments.get("rotary_seqlens", lengths)
    advances = (
        arguments.get("causal") or max(arguments.get("window_size", (-1, -1))) >= 0 or arguments.get("attention_chunk")
    )
    for i in range(batch):
        where: Any = i
        if "cu_seqlens_q" in arguments:
            where = slice(int(arguments["cu_seqlens_q"][i]), int(arguments["cu_seqlens_q"][i + 1]))
        rows = q[where].float()
        start = int(starts if isinstance(starts, int) else starts[i])
        positions = start + (torch.arange(len(rows)) if advances else torch.zeros(len(rows), dtype=torch.int64))
        half = cos.shape[1]
        interleaved = arguments.get("rotary_interleaved", True)
        first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
        a, b, c, s = rows[..., first].clone(), rows[..., second].clone(), cos[positions, None], sin[positions, None]
        rows[..., first], rows[..., second] = a * c - b * s, b * c + a * s
        expected[where] = rows.to(q.dtype)
    return expected


def compare(plan: cases.Plan, loaded: Any, where: str = "cpu") -> bool:
    """As `compare_arguments`, for the arguments of a plan."""
    return compare_arguments(case_tensors.build(plan).arguments, loaded, where, repr(plan))


def compare_arguments(arguments: dict[str, Any], loaded: Any, where: str = "cpu", name_of_case: str = "") -> bool:
    """Make the append of a call. False where a cache's rows are not aligned, so that nothing may be written.

    Raises AssertionError where a byte of any argument's memory, or of the rotated q, differs from the CPU's.
    """
    theirs, ours = moved(arguments, "cpu"), moved(arguments, where)
    rotates = "rotary_cos" in arguments
    rotated = poisoned_like(ours["q"]) if rotates else None
    answer = append.append(loaded, call_of(ours), rotated)
    launched = answer is not None
    if launched:
        flash_attn_with_kvcache(**theirs)
        assert answer is (rotated if rotates else answer)
    for name, x in theirs.items():
        if isinstance(x, Tensor):
            same = torch.equal(case_run.storage_bytes(ours[name]).cpu(), case_run.storage_bytes(x))
            assert same, f"memory of {name} differs: {name_of_case}"
    if rotated is not None:
        expected = rotated_queries(arguments) if launched else poisoned_like(rotated)
        assert torch.equal(_bits(rotated), _bits(expected)), f"rotated q differs: {name_of_case}"
    return launched


def _bits(x: Tensor) -> Tensor:
    """Its numbers as they lie in memory, every NaN the same."""
    bits = x.cpu().view(torch.uint8 if x.element_size() == 1 else torch.int16)
    return bits.masked_fill(x.cpu().isnan(), 0x7F)
