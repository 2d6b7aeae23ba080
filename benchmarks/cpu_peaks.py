"""The machine's own peaks, which the CPU benchmark divides by: cpu_peaks.cpp."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jit_kernel import device
from jit_kernel.engine import compiler

PEAK_SECONDS = 0.02  # a peak's share of each round
LOOPS = ("peak_fma", "peak_bf16_dot", "peak_i16_dot", "peak_amx", "peak_amx_fp16")


class Peaks:
    """cpu_peaks.cpp, compiled for the target that the kernels are compiled for and for this machine."""

    def __init__(self, target: device.Target, threads: int) -> None:
        self._ours, self._machine = (self._compile(x) for x in (target, device.cpu_target()))
        self._threads = threads
        self._memory = torch.ones(1 << 29, dtype=torch.uint8)
        present = [name for name in LOOPS if self._rate(self._ours, name) > 0]
        best = {
            torch.bfloat16: ("peak_amx", "peak_bf16_dot"),
            torch.float16: ("peak_amx_fp16", "peak_i16_dot"),
            torch.float32: (),
        }
        self._best = {x: next((n for n in names if n in present), "peak_fma") for x, names in best.items()}

    def _compile(self, target: device.Target) -> ctypes.CDLL:
        source = Path(__file__).with_suffix(".cpp")
        found = compiler.require("host")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peaks.so"
            flags = [*compiler.flags("host", target), "-pthread"]
            subprocess.run([*found.command, *flags, str(source), "-o", str(path)], check=True)
            library = ctypes.CDLL(str(path))
        for name in (*LOOPS, "read_bandwidth"):
            getattr(library, name).restype = ctypes.c_double
        return library

    def _rate(self, library: ctypes.CDLL, name: str, *more: Any) -> float:
        return float(getattr(library, name)(self._threads, ctypes.c_double(PEAK_SECONDS), *more))

    def measure(self, kind: str, dtype: torch.dtype) -> dict[str, float]:
        """What bounds "memory" (GB/s) or "products" of a dtype (GFLOP/s): the loop of the instruction that the build
        uses; then, for bf16, that of VDPBF16PS."""
        if kind == "memory":
            size = ctypes.c_int64(self._memory.numel())
            return {"read": self._rate(self._ours, "read_bandwidth", ctypes.c_void_p(self._memory.data_ptr()), size)}
        name = self._best[dtype]
        rates = {name.removeprefix("peak_"): self._rate(self._ours, name)}
        if dtype == torch.bfloat16 and name != "peak_bf16_dot":
            rates["bf16_dot"] = self._rate(self._machine, "peak_bf16_dot")
        return rates


def torch_products() -> float:
    """GFLOP/s of torch's own bf16 product: it tells whether torch has AMX."""
    a, n = torch.randn(2048, 2048).bfloat16(), 0
    torch.mm(a, a)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.2:
        torch.mm(a, a)
        n += 1
    return n * 2 * 2048**3 / (time.perf_counter() - start) * 1e-9
