"""The commands of `python -m jit_kernel`."""
