"""Choose a command: `python -m jit_kernel doctor | cache | why | hosts | local-kernels`, installed as `jit-kernel`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each is a file of commands/ with a `main`; it is imported only when it is chosen.
COMMANDS = {
    "doctor": "devices, compilers, versions, cache and implementations",
    "cache": "list, verify, explain, prune, pack and unpack the store of compiled kernels",
    "why": "which implementation serves a call, and why the others do not",
    "hosts": "which programs can run on jit_kernel, the line for each, and what it cannot do",
    "local-kernels": "the line that makes transformers, diffusers and sglang fetch jit_kernel as FlashAttention-3",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; answers with its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jit_kernel", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = parser.parse_args(words[:1]).command
    status: int = importlib.import_module(f"jit_kernel.commands.{chosen.replace('-', '_')}").main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
