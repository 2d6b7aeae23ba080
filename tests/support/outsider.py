"""A package that knows jit_kernel from outside, built and installed in a folder, and what its processes do."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME = "elsewhere"
TARGET = "cuda:sm_90a"

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "elsewhere"
version = "1.0"
""",
    "elsewhere/__init__.py": """\
from pathlib import Path
from jit_kernel import jit

SOURCES = jit.Sources(Path(__file__).parent / "csrc", name="elsewhere")
scale = jit.cuda(SOURCES, "scale.cuh", entry="scale<float>")
fill = jit.cuda(SOURCES, "fill.cuh", entry="elsewhere::fill")
host = jit.library(SOURCES, "host.h", exports=["scale"])
signature = {"x": "*fp32", "out": "*fp32", "n": "i32"}
twice = jit.triton("elsewhere.triton_kernels:twice", signature=signature, constants={"BLOCK": 128})
jit.declare(scale, fill, host)
jit.declare(lambda target: [twice])
""",
    "elsewhere/triton_kernels.py": """\
import triton
import triton.language as tl

from .factor import FACTOR


@triton.jit
def twice(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * FACTOR, mask=i < n)
""",
    "elsewhere/factor.py": "import triton.language as tl\n\nFACTOR: tl.constexpr = tl.constexpr(2)\n",
    "elsewhere/csrc/scale.cuh": """\
#pragma once
#include "common/factor.cuh"
#include "jit_kernel/cuda/math.cuh"
template <class T>
__global__ void scale(const T* __restrict__ x, T* out, float by, int n, bool negate) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] * by * factor() * (negate ? -1 : 1);
}
""",
    "elsewhere/csrc/common/factor.cuh": "#pragma once\n__device__ inline float factor() { return 1; }\n",
    "elsewhere/csrc/fill.cuh": """\
#pragma once
namespace elsewhere {
__global__ void fill(float* x, long long n, unsigned char seed) {
  for (long long i = threadIdx.x; i < n; i += blockDim.x) x[i] = seed;
}
}  // namespace elsewhere
""",
    "elsewhere/csrc/host.h": """\
#pragma once
#include "jit_kernel/host/ffi_arguments.h"
inline void scale(jit_kernel::TensorView x, jit_kernel::TensorView out, double by) {
  const float* from = static_cast<const float*>(x.data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<float*>(out.data_ptr())[i] = from[i] * static_cast<float>(by);
}
""",
}


def written(project: Path) -> Path:
    """The package's own files in a folder, which will do for sys.path where no wheel can be built."""
    for name, text in FILES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    return project


def installed(folder: Path) -> Path:
    """The package in a folder for sys.path: a wheel that was built from its own pyproject, unpacked; not editable."""
    project, site = written(folder / "project"), folder / "site"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")],
        cwd=project, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.rmtree(project)
    return site


def within(site: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` answers in a process that finds the package; for tests.support.children."""
    sys.path.insert(0, site)
    return work(importlib.import_module(NAME), *arguments)


def run_program(text: str, folder: str) -> str:
    """What a Python program prints that is run in a folder, which is on its path as a script's is."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(compile(text, "program", "exec"), {"__name__": "__main__", "run_command": run_command})
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"status {ended.code}: {printed.getvalue()}") from ended
    return printed.getvalue()


def run_command(*words: str) -> None:
    """`python -m <words>`, in this process: a new one would import torch for two seconds."""
    sys.argv = [words[1], *words[2:]]
    importlib.invalidate_caches()
    try:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{' '.join(words)}: status {ended.code}") from ended


def compiled() -> list[str]:
    """The kernels that this process compiled, by their place in the store."""
    from jit_kernel import jit

    return sorted(f"{event.spec.kernel}" for event in jit.events() if event.action == "compiled")


def warm_device_code(package: Any) -> list[str]:
    """Have both CUDA kernels for a GPU that is not here; answers with what was compiled."""
    from jit_kernel import jit
    from jit_kernel.device import Target

    for kernel in (package.scale, package.fill):
        jit.build(kernel.spec, Target.parse(TARGET))
    return compiled()


def warm_up(package: Any, *words: str) -> tuple[int, list[str], str]:
    """The status of `python -m jit_kernel.warmup --module`, what it compiled and what it printed."""
    from jit_kernel import warmup

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = warmup.main(["--module", package.__name__, *words])
    return status, compiled(), printed.getvalue()


def explain(package: Any, *words: str) -> tuple[int, str]:
    """The status and the words of `python -m jit_kernel why --module`."""
    from jit_kernel.commands import why

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = why.main(["--module", package.__name__, *words])
    return status, printed.getvalue()


def call_on_host(package: Any) -> tuple[bool, list[str]]:
    """Whether the CPU function is right, and what was compiled for it."""
    x = torch.randn(100)
    out = torch.empty_like(x)
    package.host.scale(x, out, 3.0)
    return torch.equal(out, x * 3), compiled()
