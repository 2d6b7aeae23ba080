"""The portable backward kernels without a GPU: interpreted, compiled ahead, and what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3 import portable
from jit_kernel.fa3.decision import Rejected
from jit_kernel.fa3.gradients.call import Backward
from jit_kernel.fa3.portable import backward, backward_kernels, backward_tiles
from tests.support import portable_backward as cases

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
CASES, PROCESSES = 12, 2
# The tile that needs most shared memory, those that spill most, and one with every branch.
AHEAD = [
    ("sm_80", "rows", 256, 256, False),
    ("sm_90a", "keys", 256, 256, False),
    ("sm_90a", "pairs", 64, 64, True),
    ("sm_100", "pairs", 128, 128, False),
]


def test_random_cases_under_the_interpreter(say: list[str]) -> None:
    """Against float64; a row of no sequence is 0, NaN behind every length reaches nothing, twice has the same bits."""
    share = CASES // PROCESSES
    program = str(ROOT / "tests" / "support" / "interpreted_backward.py")
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(i * share), str(share)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    shares = []
    for child in children:
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0, err[-6000:]
        shares += [float(line.split()[2]) for line in out.splitlines() if line.startswith("case ")]
    assert len(shares) == CASES
    assert max(shares) <= 1
    say.append(f"portable backward kernels interpreted: {CASES} random cases, worst share {max(shares)}")


@pytest.mark.parametrize("head_dim", [60, 64])
def test_rows_are_runs_of_memory_whatever_the_order_of_dimensions(head_dim: int) -> None:
    x = torch.randn(2, 16, 3, head_dim, dtype=torch.float16)
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)):
        strided = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
        rows = backward._in_rows(strided)
        assert rows.stride(-1) == 1, order
        assert not any(stride % 8 for stride in rows.stride()[:-1]), order
        assert torch.equal(rows[..., :head_dim], x), order
        assert not rows[..., head_dim:].any(), order


def _compiled(architecture: str, kernel: str, head_dim: int, head_dim_v: int, softcap: bool) -> tuple[bytes, dict]:
    if kernel == "rows":
        spec = backward_kernels.rows_spec("bf16", head_dim_v)
    else:
        spec = backward_kernels.main_spec(kernel, architecture, "bf16", head_dim, head_dim_v, softcap)
    folder = config.kernel_sources_dir() / spec.kernel
    image, metadata, _ = triton_compiler.compile_unit(spec.unit, folder, Target("cuda", architecture))
    return image, metadata


def test_compiled_ahead_within_the_architecture(tmp_path: Path) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda what: _compiled(*what), AHEAD))
    for what, (image, metadata) in zip(AHEAD, made, strict=True):
        path = tmp_path / "kernel.cubin"
        path.write_bytes(image)
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
        assert found, done.stdout
        assert 0 < metadata["shared"] <= triton_compiler.shared_limit(what[0]), what
        assert int(found[1]) * metadata["threads"] <= 65536, what
        assert int(found[2]) <= 512, (what, "the kernel spills")


def test_every_architecture_and_size_has_tiles() -> None:
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "sm_130"):
        for head_dim, head_dim_v in ((1, 1), (64, 64), (65, 16), (128, 128), (192, 128), (256, 256)):
            parts = backward_tiles.parts(architecture, head_dim, head_dim_v)
            assert parts in (("pairs",), ("values", "keys"))
            for kernel in (*parts, "queries"):
                tile = backward_tiles.tile(architecture, kernel, head_dim, head_dim_v)
                assert min(tile.block_m, tile.block_n) >= 16
    specs = backward.variants(Target("cuda", "sm_90a"))
    assert len({spec.unit for spec in specs}) == len(specs)
    assert set(specs) <= set(portable.all_variants(Target("cuda", "sm_90a")))


def small(dtype: torch.dtype = torch.bfloat16, d: int = 16, dv: int = 16) -> Backward:
    call = cases.draw(1, cases.Space((dtype,), ((d, dv),), 8))
    return cases.copy(call, softmax_scale=0.25)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (small(torch.float32), "q is torch.float32: its backward kernels serve bf16 and fp16"),
        (small(d=264), "q and v have head sizes 264/16: its backward kernels serve up to 256"),
        (small(dv=257), "q and v have head sizes 16/257"),
        (small(), "q is on cpu: its backward kernels serve NVIDIA GPUs of compute capability 8.0"),
    ],
    ids=["fp32", "d", "dv", "device"],
)
def test_what_it_does_not_serve_is_refused_by_name(call: Backward, reason: str) -> None:
    decision = backward.decide(call)
    assert isinstance(decision, Rejected)
    assert decision.reason.startswith(reason)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        backward.gradients(call)
