"""The toolkit's public door: sources in, kernels out (docs/toolkit.md); and the only way to compiled code.

Behind every name stands the same way: memory, then disk, then the compiler.
"""

from __future__ import annotations

from jit_kernel.engine.build import is_stored
from jit_kernel.engine.cubin import LAUNCHER, DeviceKernels
from jit_kernel.engine.events import Stats, on_event, stats
from jit_kernel.engine.installed import CompileError, CompilerError, CompilerNotFoundError
from jit_kernel.engine.memory import Cubin, build, load, load_cubin
from jit_kernel.engine.seal import SealedError, seal
from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import Event, KernelSpec, recorded
from jit_kernel.engine.store import CacheError
from jit_kernel.toolkit.cuda import ctype, cuda
from jit_kernel.toolkit.declared import declare, warm
from jit_kernel.toolkit.kernels import Kernel, TritonKernel
from jit_kernel.toolkit.library import Library, library
from jit_kernel.toolkit.operators import operator
from jit_kernel.toolkit.triton import triton

__all__ = [
    "LAUNCHER",
    "CacheError",
    "CompileError",
    "CompilerError",
    "CompilerNotFoundError",
    "Cubin",
    "DeviceKernels",
    "Event",
    "Kernel",
    "KernelSpec",
    "Library",
    "SealedError",
    "Sources",
    "Stats",
    "TritonKernel",
    "build",
    "ctype",
    "cuda",
    "declare",
    "events",
    "is_stored",
    "library",
    "load",
    "load_cubin",
    "on_event",
    "operator",
    "seal",
    "stats",
    "triton",
    "warm",
]


def events() -> list[Event]:
    """What this process compiled and loaded so far, in order."""
    return list(recorded)
