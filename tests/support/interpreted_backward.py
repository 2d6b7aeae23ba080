"""The portable backward kernels under Triton's interpreter, on the CPU: run as a program with seeds, a line a case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernel_sources"), str(ROOT)]

from tests.support import interpreted_portable as interpreted  # noqa: E402  (first: it sets the interpreter up)

import torch  # noqa: E402  isort: skip
from flash_attention_v3.portable.backward_keys import backward_keys  # noqa: E402
from flash_attention_v3.portable.backward_queries import backward_queries  # noqa: E402
from flash_attention_v3.portable.backward_rows import backward_rows  # noqa: E402

from jit_kernel.device import Target  # noqa: E402
from jit_kernel.fa3.portable import backward, backward_tiles  # noqa: E402
from jit_kernel.fa3.portable import forward as portable_forward  # noqa: E402
from jit_kernel.jit import KernelSpec  # noqa: E402
from tests.support import portable_backward as cases  # noqa: E402

SIZES = ((16, 16), (32, 32), (40, 24), (20, 12), (64, 32))
SPACE = cases.Space((torch.bfloat16, torch.float16), SIZES, 40, most_sequences=2)
FUNCTIONS = {each.__name__: each for each in (backward_rows, backward_keys, backward_queries)}
# Small, so that a small case has full, masked and partly empty tiles on both sides.
TILES = {part: backward_tiles.Tile(16, 32, 1, 1) for part in ("pairs", "keys", "values")}
TILES["queries"] = backward_tiles.Tile(32, 16, 1, 1)


class InterpretedKernels:
    """Double of DeviceKernels: a handle is a function and its spec's constants, a launch interprets the grid."""

    target = Target("cuda", "sm_80")

    def __init__(self) -> None:
        self.handles: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}

    def load(self, key: tuple[Any, ...], spec: KernelSpec) -> tuple[str, dict[str, Any]]:
        unit = json.loads(spec.unit)
        constants = dict(unit["constants"])
        if "INTERPRETED" in constants:
            constants["INTERPRETED"] = True
        self.handles[key] = unit["function"], constants
        return self.handles[key]

    def launch(self, handle: tuple[str, dict[str, Any]], grid: int, *arguments: Any) -> None:
        # The interpreter has no null pointer; a flag keeps an absent tensor from being read.
        given = [torch.zeros(1, dtype=torch.int32) if value is None else value for value in arguments]
        FUNCTIONS[handle[0]][(grid,)](*given, **handle[1])


def install() -> None:
    """Let `backward.gradients` reach the interpreted kernels with tensors on the CPU."""
    interpreted._mend_interpreter()
    kernels = InterpretedKernels()
    portable_forward.kernels_of = lambda device: kernels  # type: ignore[assignment, return-value]
    backward_tiles.tile = lambda architecture, kernel, d, dv: TILES[kernel]
    backward_tiles.parts = lambda architecture, d, dv: ("pairs",) if d < 64 else ("values", "keys")
    backward.on_served_device = lambda device: True


def main(first: int, count: int) -> None:
    install()
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        call = cases.draw(seed, SPACE)
        found = backward.gradients(call)
        print(f"case {seed} {cases.judge(call, found):.4f}", flush=True)
        if seed % 10 == 0:
            cases.twice(call, found, backward.gradients(call))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
