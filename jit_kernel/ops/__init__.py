"""The small kernels that stand beside attention in a serving engine (docs/ops.md): one file each."""

from jit_kernel.ops.apply_rope import apply_rope
from jit_kernel.ops.gather_kv import gather_kv
from jit_kernel.ops.merge_states import merge_states
from jit_kernel.ops.quantize_fp8 import quantize_fp8
from jit_kernel.ops.rms_norm import rms_norm
from jit_kernel.ops.silu_and_mul import silu_and_mul
from jit_kernel.ops.store_kv import store_kv

__all__ = ["apply_rope", "gather_kv", "merge_states", "quantize_fp8", "rms_norm", "silu_and_mul", "store_kv"]
