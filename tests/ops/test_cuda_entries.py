"""The ops' CUDA kernels as NVRTC makes them, without a GPU: what a call passes is what the entry's parameters are."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jit_kernel import jit, ops
from jit_kernel.device import Target
from jit_kernel.ops import launch
from tests.support.hopper_variants import compile_spec
from tests.support.ops import E4M3, Draw

HOPPER = Target.parse("cuda:sm_90a")
ELEMENTS = {torch.float32: "f", torch.float16: "h", torch.bfloat16: "b", E4M3: "8", torch.int32: "i", torch.int64: "l"}


def fits(value: object, passed: str, element: str) -> bool:
    """Whether a launch takes a value for a parameter of these letters (jit_kernel/cuda/entry_table.cuh)."""
    if passed == "p":
        return value is None or (isinstance(value, torch.Tensor) and element in ("*", ELEMENTS[value.dtype]))
    if passed in "li":
        return type(value) is int and (passed == "l" or abs(value) < 1 << 31)
    return type(value) is {"f": float, "?": bool}[passed]


class Entry:
    """What stands for a jit.Kernel: compiled, and looked at instead of launched."""

    def __init__(self, file: str, entry: str) -> None:
        kernel = jit.cuda(None, f"ops/{file}.h", entry=f"jit_kernel::{entry}", device=str(HOPPER), programmatic=True)
        self.made: dict[str, Any] = jit.load_cubin(kernel.spec, HOPPER).metadata
        self.launches = 0

    def __getitem__(self, shape: object) -> Callable[..., None]:
        def look(*arguments: object) -> None:
            self.launches += 1
            names, passed, elements = (self.made[key] for key in ("arguments", "types", "elements"))
            assert len(arguments) == len(names)
            for value, name, letter, element in zip(arguments, names, passed, elements, strict=True):
                assert fits(value, letter, element), f"{name} gets {value!r}"

        return look


@pytest.mark.parametrize("op", ops.__all__)
def test_what_a_call_passes_is_what_the_entry_takes(monkeypatch, op):
    known: dict[tuple[str, str], Entry] = {}

    def kernel(file: str, entry: str, device: object) -> Entry:
        if (file, entry) not in known:
            known[file, entry] = Entry(file, entry)
        return known[file, entry]

    monkeypatch.setattr(launch, "cuda_kernel", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    monkeypatch.setattr(sys.modules[f"jit_kernel.ops.{op}"]._plans, "_known", {})
    cases = importlib.import_module(f"tests.ops.test_{op}")
    monkeypatch.setattr(cases, "assert_close", lambda *_: None)  # nothing is computed
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    for seed in range(3):
        cases.check(Draw(seed, "cpu"))
    assert sum(entry.launches for entry in known.values()) >= 2


@pytest.mark.parametrize(
    ("op", "entry"),
    [
        ("rms_norm", "rms_norm<jit_kernel::bf16, jit_kernel::bf16, jit_kernel::bf16, true, true, 4>"),
        ("quantize_fp8", "quantize_rows<jit_kernel::bf16, true, 4>"),
        ("apply_rope", "apply_rope<jit_kernel::bf16, float, jit_kernel::bf16, true, 4>"),
        ("merge_states", "merge_states<float, jit_kernel::bf16, true>"),
    ],
)
def test_a_row_stays_in_registers(op, entry):
    """The instances with the most of them spill nothing, with 128 for each of a block's 512 threads."""
    kernel = jit.cuda(None, f"ops/{op}.h", entry=f"jit_kernel::{entry}", flags=("--ptxas-options=-v",))
    _, log = compile_spec(kernel.spec)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]
    assert int(re.findall(r"Used (\d+) registers", log)[0]) <= 128
