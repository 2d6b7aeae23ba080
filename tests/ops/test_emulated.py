"""The ops' CUDA kernels on this machine's CPU: the random cases of each op, block by block, without a GPU.

    python -m pytest -m emulated tests/ops

Each instance of a kernel is compiled by g++ (2 s), so this is left out unless asked for.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi
import tvm_ffi.libinfo

from jit_kernel import config
from jit_kernel.ops import launch
from tests.support.ops import Draw, seeds

SOURCES = config.kernel_sources_dir()
SHIM = Path(__file__).resolve().parents[1] / "support" / "emulated" / "host_cuda.h"
OPS = ("rms_norm", "silu_and_mul", "apply_rope", "store_kv", "gather_kv", "quantize_fp8", "merge_states")


def arguments_of(file: str, kernel: str) -> int:
    """How many arguments a `__global__` function of a source has."""
    text = (SOURCES / "ops" / f"{file}.h").read_text(encoding="utf-8")
    (declared,) = re.findall(rf"__global__ void\s+__launch_bounds__\(kMostThreads\)\s+{kernel}\(([^)]*)\)", text)
    return declared.count(",") + 1


def compiled(file: str, entry: str, folder: Path) -> Callable[..., None]:
    """An instance as a function of the grid, the block and its arguments."""
    unit = (
        f'#include "{SHIM}"\n#include "ops/{file}.h"\nusing namespace jit_kernel;\n'
        f"EMULATE(kernel, {arguments_of(file, entry.partition('<')[0])}, {entry})\n"
    )
    source = folder / f"{len(list(folder.glob('*.cpp')))}.cpp"
    source.write_text(unit)
    includes = [f"-I{path}" for path in (SOURCES, SOURCES / "include", *tvm_ffi.libinfo.include_paths())]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", *includes, str(source), "-o", f"{source}.so"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[:4000]
    function: Callable[..., None] = tvm_ffi.load_module(f"{source}.so")["kernel"]
    return function


class Emulated:
    """What stands for a jit.Kernel."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, shape: tuple[Any, Any]) -> Callable[..., None]:
        sizes = [(*(each if isinstance(each, tuple) else (each,)), 1)[:2] for each in shape]
        return lambda *arguments: self.function(*sizes[0], *sizes[1], *arguments)


@pytest.fixture
def emulation(monkeypatch, tmp_path):
    """Tensors of the CPU go the way of a GPU's, to kernels that are emulated."""
    known: dict[tuple[str, str], Emulated] = {}

    def kernel(file: str, entry: str, device: object) -> Emulated:
        if (file, entry) not in known:
            known[file, entry] = Emulated(compiled(file, entry, tmp_path))
        return known[file, entry]

    monkeypatch.setattr(launch, "cuda_kernel", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    return known


@pytest.mark.emulated
@pytest.mark.parametrize("op", OPS)
def test_random_cases(emulation, monkeypatch, op):
    plans = sys.modules[f"jit_kernel.ops.{op}"]._plans  # those of other tests launch on the CPU
    monkeypatch.setattr(plans, "_known", {})
    monkeypatch.setattr(sys.modules["jit_kernel.ops.quantize_fp8"], "_PARTS", 3)  # 528 blocks take a minute a call
    cases = importlib.import_module(f"tests.ops.test_{op}")
    for seed in seeds(25):
        cases.check(Draw(seed, "cpu"))
    assert emulation
