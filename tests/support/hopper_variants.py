"""The Hopper variants that tests compile without a GPU, and what NVRTC makes of one."""

from __future__ import annotations

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import compiler, nvrtc
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.jit import KernelSpec

TARGET = Target("cuda", "sm_90a")
# One of each tile, both dtypes, with and without mask and softcap: dtype, d, dv, is masked, has softcap.
NAMED = [
    ("bf16", 64, 64, False, False),
    ("bf16", 64, 64, True, False),
    ("bf16", 128, 128, False, False),
    ("bf16", 128, 128, True, False),
    ("bf16", 256, 256, False, False),
    ("bf16", 256, 256, True, False),
    ("fp16", 128, 128, True, True),
    ("fp16", 192, 128, True, False),
    ("bf16", 192, 192, True, False),
    ("fp16", 96, 96, False, False),
]

# Of e4m3: d, is masked, values are prepared.
NAMED_FP8 = [(d, masked, False) for d in hopper_kernels.FP8_HEAD_DIMS for masked in (False, True)]
NAMED_FP8 += [(d, masked, True) for d in hopper_kernels.PREPARED_HEAD_DIMS for masked in (False, True)]

# On cached keys: dtype, d, dv. Each tile has its own registers.
NAMED_CACHED = [("fp16" if d == 96 else "bf16", d, dv) for d, dv in hopper_kernels.HEAD_DIMS]

# With qv: dtype of the cache, dv, rows of a tile.
NAMED_MLA = [("bf16", 512, 64), ("fp16", 256, 64), ("bf16", 512, 16), ("fp16", 512, 32), ("bf16", 256, 16)]
NAMED_MLA += [("e4m3", 512, 64), ("e4m3", 512, 32), ("e4m3", 256, 16)]


def compile_variant(fields: tuple[str, int, int, bool, bool]) -> tuple[bytes, str]:
    """The cubin of a prefill variant and the compiler's log."""
    return compile_spec(hopper_kernels.forward_spec(*fields))


def compile_spec(spec: KernelSpec) -> tuple[bytes, str]:
    """The cubin of a kernel and the compiler's log; nothing is taken from NVRTC's own cache."""
    sources = config.kernel_sources_dir()
    return nvrtc.compile_cubin(
        spec.unit,
        name="unit.cu",
        architecture=TARGET.architecture,
        include_dirs=[sources, sources / "include"],
        flags=[*compiler.flags("cuda", TARGET, spec.flags)[1:], "--no-cache"],
    )
