"""`python -m jit_kernel local-kernels`: the line that makes transformers, diffusers and sglang fetch jit_kernel.

    eval "$(python -m jit_kernel local-kernels)"

They ask the package `kernels` for FlashAttention-3 by three names; it takes a folder for each from LOCAL_KERNELS.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Print the line."""
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel local-kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args(argv)
    from jit_kernel.integrations import local_kernels  # torch, which a wrong argument does not pay for

    print(f'export LOCAL_KERNELS="{local_kernels.variable()}"')
    return 0
