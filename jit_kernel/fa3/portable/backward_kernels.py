"""The portable backward kernels as things to compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jit_kernel import jit
from jit_kernel.device import Target
from jit_kernel.fa3.portable import backward_tiles, kernels
from jit_kernel.fa3.portable.tiles import padded
from jit_kernel.jit import KernelSpec

DTYPES = ("bf16", "fp16")
MAX_HEAD_DIM = 256
STRIDE_UNIT = 8  # elements of 16 bytes, which every stride is a multiple of
BLOCK_ROWS = 64  # of a program that sums rows of grad_out * out


def rows_spec(dtype: str, head_dim_v: int) -> KernelSpec:
    """The kernel that makes delta and the sinks' gradient."""
    constants = {
        "HEAD_DIM_V": head_dim_v,
        "HEAD_DIM_V_PADDED": padded(head_dim_v),
        "BLOCK_M": BLOCK_ROWS,
        "STRIDE_UNIT": STRIDE_UNIT,
    }
    return _spec("backward_rows", {"dtype": dtype, "head_dim_v": head_dim_v}, dtype, constants, 4, 1)


def main_spec(kernel: str, architecture: str, dtype: str, head_dim: int, head_dim_v: int, softcap: bool) -> KernelSpec:
    """The kernel of one variant that makes the gradients of "queries", "keys", "values", or "pairs" of the latter."""
    tile = backward_tiles.tile(architecture, kernel, head_dim, head_dim_v)
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "HEAD_DIM_PADDED": padded(head_dim),
        "HEAD_DIM_V_PADDED": padded(head_dim_v),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SOFTCAP": softcap,
        "STRIDE_UNIT": STRIDE_UNIT,
        "INTERPRETED": False,
    }
    function = "backward_queries" if kernel == "queries" else "backward_keys"
    if kernel != "queries":
        constants |= {"WITH_K": kernel != "values", "WITH_V": kernel != "keys"}
    variant = {"part": kernel, "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v, "softcap": softcap}
    return _spec(function, variant, dtype, constants, tile.num_warps, tile.num_stages)


def _spec(
    function: str, variant: dict[str, Any], dtype: str, constants: dict[str, int], num_warps: int, num_stages: int
) -> KernelSpec:
    return jit.triton(
        f"{kernels.FOLDER}/{function}.py:{function}",
        signature=None,
        types={"element": dtype},
        constants=constants,
        aligned=None,
        num_warps=num_warps,
        num_stages=num_stages,
        variant={"function": function, **variant},
    ).spec


def all_specs(target: Target) -> Iterator[KernelSpec]:
    """What warm-up compiles for a GPU beside the launcher; softcap and other head sizes compile at the first call."""
    for dtype in DTYPES:
        for head_dim_v in sorted({pair[1] for pair in kernels.WARM_HEAD_DIMS}):
            yield rows_spec(dtype, head_dim_v)
        for head_dim, head_dim_v in kernels.WARM_HEAD_DIMS:
            for kernel in (*backward_tiles.parts(target.architecture, head_dim, head_dim_v), "queries"):
                yield main_spec(kernel, target.architecture, dtype, head_dim, head_dim_v, False)
