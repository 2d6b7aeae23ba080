"""What stands behind jit_kernel.jit: kernels of anybody's sources, made and called (docs/toolkit.md)."""
