"""One call of every family of the Hopper kernels, small, for compute-sanitizer: `make sanitize-gpu`."""

from __future__ import annotations

import os

os.environ.setdefault("JIT_KERNEL_IMPLEMENTATION", "hopper")

import torch

from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func

MANY_TILES_A_BLOCK = 130  # multiprocessors left free: 2 of 132 blocks take all tiles


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def main() -> None:
    """Every head size with and without mask and softcap, both dtypes, dense and ragged, one and many tiles a block."""
    torch.manual_seed(0)
    count = 0
    starts = torch.tensor([0, 100, 100, 390, 420], device="cuda", dtype=torch.int32)
    used = torch.tensor([100, 0, 200, 30], device="cuda", dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim, head_dim_v in hopper_kernels.HEAD_DIMS:
            for masked in (False, True):
                for softcap in (0.0, 5.0):
                    q = normal(1, 420, 2, head_dim, dtype=dtype)
                    k, v = normal(1, 420, 1, head_dim, dtype=dtype), normal(1, 420, 1, head_dim_v, dtype=dtype)
                    flash_attn_func(q, k, v, causal=masked, softcap=softcap, sm_margin=MANY_TILES_A_BLOCK)
                    flash_attn_varlen_func(
                        q[0],
                        k[0],
                        v[0],
                        starts,
                        starts,
                        seqused_q=used,
                        seqused_k=used,
                        causal=masked,
                        window_size=(70, 0) if masked else (-1, -1),
                        softcap=softcap,
                        sinks=normal(2, dtype=dtype),
                        return_softmax_lse=True,
                    )
                    count += 2
    torch.cuda.synchronize()
    print(f"{count} calls done")


if __name__ == "__main__":
    main()
