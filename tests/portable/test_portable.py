"""The portable implementation without a GPU: interpreted, compiled ahead for every architecture, and its host side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from jit_kernel import config, device, jit
from jit_kernel.device import Target
from jit_kernel.engine import compiler, process, triton_compiler
from jit_kernel.fa3 import portable
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.portable import kernels as portable_kernels
from jit_kernel.fa3.portable import planning as portable_plan
from jit_kernel.fa3.portable import tiles as portable_tiles
from jit_kernel.jit import KernelSpec

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
CASES, PROCESSES = 160, 2


def test_random_cases_under_the_interpreter(say: list[str]) -> None:
    share = CASES // PROCESSES
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(ROOT / "tests" / "support" / "interpreted_portable.py"),
                str(i * share),
                str(share),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    worst, launched = [0.0, 0.0, 0.0], {"forward": 0, "combine": 0, "append": 0}
    count, hidden = 0, [0, 0]  # calls, those of them with hidden keys
    for child in children:
        out, err = child.communicate(timeout=1200)
        assert child.returncode == 0, err[-6000:]
        for line in out.splitlines():
            if line.startswith("case "):
                count += 1
                worst = [max(a, float(b)) for a, b in zip(worst, line.split()[2:], strict=True)]
            elif line.startswith("hidden "):
                hidden = [a + int(b) for a, b in zip(hidden, line.split()[1:], strict=True)]
            elif line.startswith("launched "):
                launched[line.split()[1]] += int(line.split()[2])
    assert count == CASES
    assert max(worst) <= 1
    assert hidden[0] == CASES // 4
    assert hidden[1] > CASES // 10
    assert min(launched.values()) > CASES // 10
    say.append(f"portable kernels interpreted: {count} random cases, worst shares (row, maximum, lse) {worst}")
    say.append(f"and {hidden[0]} with random masks, {hidden[1]} of them with hidden keys that are not finite")


# For each architecture the tiles that need most shared memory, and for each family a paged one with every branch, also
# with a draft mask; scores of qv and of both kinds of e4m3. What stands behind the head sizes are forward_spec's.
PLAIN, EVERY = (False, False, False, True), (True, True, True, True)
PAGED = (True, False, False, True)
AHEAD = [
    *((architecture, "bf16", 256, 256, "prefill", PLAIN, {}) for architecture in ARCHITECTURES),
    *((architecture, "bf16", 64, 512, "prefill", PAGED, {"qv": 1, "whole": True}) for architecture in ARCHITECTURES),
    ("sm_80", "bf16", 128, 128, "prefill", EVERY, {}),
    ("sm_86", "bf16", 256, 256, "decode", EVERY, {}),
    ("sm_90a", "bf16", 128, 128, "prefill", EVERY, {}),
    ("sm_90a", "bf16", 128, 128, "short", EVERY, {}),
    ("sm_80", "bf16", 128, 128, "draft", EVERY, {"draft": True}),
    ("sm_86", "bf16", 256, 256, "decode", EVERY, {"draft": True}),
    ("sm_90a", "bf16", 256, 256, "draft", EVERY, {"draft": True}),
    ("sm_90a", "bf16", 512, 512, "prefill", PLAIN, {}),
    ("sm_86", "bf16", 512, 512, "unaligned", (False, False, False, False), {}),
    ("sm_120", "fp16", 512, 512, "decode", PAGED, {}),
    ("sm_90a", "bf16", 64, 512, "decode", EVERY, {"qv": 2}),
    ("sm_80", "bf16", 64, 512, "decode", PAGED, {"qv": 1, "kv_dtype": "e4m3", "token_scales": True}),
    ("sm_90a", "e4m3", 128, 128, "prefill", PLAIN, {}),
    ("sm_89", "e4m3", 128, 128, "decode", PAGED, {"token_scales": True}),
    ("sm_80", "e4m3", 128, 128, "short", PAGED, {}),
    ("sm_90a", "fp16", 128, 128, "decode", PAGED, {"kv_dtype": "e4m3", "token_scales": True}),
]
Ahead = tuple[str, str, int, int, str, tuple[bool, ...], dict[str, Any]]


def _compiled(what: Ahead) -> tuple[bytes, dict[str, Any]]:
    architecture, dtype, head_dim, head_dim_v, kind, flags, more = what
    spec = portable_kernels.forward_spec(architecture, dtype, head_dim, head_dim_v, kind, *flags, **more)
    return _compile(spec, architecture)


def _compile(spec: KernelSpec, architecture: str) -> tuple[bytes, dict[str, Any]]:
    folder = config.kernel_sources_dir() / spec.kernel
    image, metadata, _ = triton_compiler.compile_unit(spec.unit, folder, Target("cuda", architecture))
    return image, metadata


@pytest.fixture(scope="module")
def ahead() -> Iterator[list[tuple[bytes, dict[str, Any]]]]:
    with ThreadPoolExecutor(2) as pool:
        yield list(pool.map(_compiled, AHEAD))


@pytest.mark.parametrize("index", range(len(AHEAD)), ids=[str(what) for what in AHEAD])
def test_compiled_ahead_within_the_architecture(index: int, ahead: Any, tmp_path: Path) -> None:
    image, metadata = ahead[index]
    architecture, dtype, head_dim, head_dim_v, kind, _, more = AHEAD[index]
    qv, kv_dtype = more.get("qv", 0), more.get("kv_dtype", dtype)
    tile = portable_tiles.tile(architecture, head_dim, head_dim_v, kind, qv, kv_dtype)
    assert 0 < metadata["shared"] <= triton_compiler.shared_limit(architecture)
    assert metadata["threads"] == 32 * tile.num_warps
    assert len(metadata["types"]) == len(metadata["arguments"])
    registers, stack = _resources(image, tmp_path)
    assert registers * metadata["threads"] <= 65536
    assert registers <= 255
    assert stack <= 512, "the kernel spills"


def _resources(image: bytes, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a cubin's kernel, as the disassembler that Triton carries reads them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(image)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "spec",
    [
        portable_kernels.combine_spec("fp32", "fp16", 96, False, 8),
        portable_kernels.append_spec("bf16", 40, 24, True),
        portable_kernels.append_spec("bf16", 128, 128, True, "e4m3", "bf16"),
        portable_kernels.forward_spec("sm_80", "fp16", 192, 128, "decode", False, True, False, False),
        portable_kernels.forward_spec("sm_90a", "bf16", 40, 24, "unaligned", False, True, False, False),
    ],
    ids=["combine", "append", "append that quantises", "forward of two head sizes", "forward of unaligned rows"],
)
def test_kernels_of_odd_sizes_compile(spec: KernelSpec) -> None:
    image, metadata = _compile(spec, "sm_80")
    assert image[:4] == b"\x7fELF"
    assert metadata["name"] == dict(spec.variant)["function"]
    assert str(ROOT).encode() not in image, "a cubin must not depend on where the sources lie"


def test_the_compiler_leaves_the_users_triton_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = tmp_path / "users"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(users))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    image, _ = _compile(portable_kernels.combine_spec("fp32", "bf16", 64, True, 2), "sm_90a")
    assert image
    assert not users.exists()
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_refusal_keeps_the_compilers_message() -> None:
    spec = portable_kernels.combine_spec("fp32", "bf16", 64, True, 2)
    folder = config.kernel_sources_dir() / spec.kernel
    unit = json.loads(spec.unit) | {"function": "nothing"}
    with pytest.raises(triton_compiler.TritonError, match="no attribute 'nothing'") as caught:
        triton_compiler.compile_unit(json.dumps(unit), folder, Target("cuda", "sm_80"))
    assert "Traceback" in caught.value.log


def test_a_block_that_is_too_large_is_refused() -> None:
    unit = json.loads(portable_kernels.forward_spec(*("sm_90a", "bf16", 128, 128, "prefill"), *[False] * 3, True).unit)
    folder = config.kernel_sources_dir() / portable_kernels.FOLDER
    with pytest.raises(triton_compiler.TritonError, match="bytes of shared memory"):
        triton_compiler.compile_unit(json.dumps(unit), folder, Target("cuda", "sm_86"))


def test_every_architecture_and_size_has_a_tile() -> None:
    for architecture in (*ARCHITECTURES, "sm_87", "sm_103", "sm_110", "sm_121", "sm_130"):
        for head_dim, head_dim_v, qv in (*((d, 16, 0) for d in (1, 64, 65, 129, 256, 512)), (64, 256, 1), (64, 512, 2)):
            for kind in ("prefill", "unaligned", "draft", *portable_tiles.ROWS):
                tile = portable_tiles.tile(architecture, head_dim, head_dim_v, kind, qv)
                assert portable_tiles.tile(architecture, head_dim, head_dim_v, kind, qv, "e4m3").block_m >= 16
                # Rows of 512 values fill the registers: few of them are two tiles of 32.
                rows = min(portable_tiles.ROWS.get(kind, 16), 32 if 512 in (head_dim, head_dim_v) else 64)
                assert tile.block_m >= rows
                # Rows of keys and values of the stages that are loading, at the least.
                rows = portable_tiles.padded(head_dim) + portable_tiles.padded(head_dim_v)
                held = tile.block_n * 2 * rows * (tile.num_stages - 1)
                assert held <= triton_compiler.shared_limit(architecture)


def test_without_splits_the_tile_knows_no_length() -> None:
    assert {portable_plan.tile_kind(1, rows, True, False) for rows in (1, 16, 17, 64, 65, 10**6)} == {"prefill"}
    assert {portable_plan.tile_kind(1, rows, True, True) for rows in (1, 16, 17, 64, 65, 10**6)} == {"draft"}
    for drafted in (False, True):
        assert {portable_plan.tile_kind(1, rows, False, drafted) for rows in (1, 16, 17, 64, 65, 10**6)} == {
            "unaligned"
        }
    kinds = [portable_plan.tile_kind(0, rows, True, False) for rows in (1, 16, 17, 64, 65)]
    assert kinds == ["decode", "decode", "short", "short", "prefill"]
    kinds = [portable_plan.tile_kind(0, rows, True, True) for rows in (1, 16, 17, 64, 65)]
    assert kinds == ["decode", "decode", "draft", "draft", "draft"]


def test_no_matrix_descriptor_is_loop_invariant() -> None:
    for architecture in ("sm_90a", "sm_100"):
        for (kind, size), tile in portable_tiles.TILES[portable_tiles.family(architecture)].items():
            takes_wgmma = tile.block_m >= 64 and tile.num_warps % 4 == 0
            assert not takes_wgmma or tile.num_stages >= 3, (architecture, kind, size)


@pytest.mark.parametrize(
    ("programs", "slots", "keys", "least", "most"),
    [
        (512, 528, 8192, 1, 1),  # the device is full
        (8, 528, 8192, 55, 64),  # few programs, long keys: as many parts as there is work for
        (8, 528, 300, 1, 1),  # too few keys to share
        (128, 528, 8192, 4, 4),
        (1, 10**6, 10**9, 109, 128),
    ],
)
def test_splits_fill_the_device(programs: int, slots: int, keys: int, least: int, most: int) -> None:
    assert least <= portable_plan.best_splits(programs, slots, keys) <= most


def test_who_is_served() -> None:
    assert isinstance(portable.supports(Target("cuda", "sm_80")), Accepted)
    for target in (Target("cuda", "sm_75"), Target("musa", "mp_31"), device.cpu_target()):
        assert isinstance(portable.supports(target), Rejected)
    assert portable_kernels.unserved("bf16", 512, 17) is None
    assert portable_kernels.unserved("e4m3", 64, 64) is None
    assert "513" in str(portable_kernels.unserved("fp16", 64, 513))
    assert "fp32" in str(portable_kernels.unserved("fp32", 64, 64))


@pytest.fixture(scope="module")
def launcher() -> Any:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    return jit.load(portable_kernels.LAUNCHER, Target("cuda", "sm_90a"))  # as tests/toolkit/ has it


def test_the_launcher_builds_without_a_driver_and_refuses_bad_launches(launcher: Any) -> None:
    launch = launcher["launch"]
    handle = launcher["load_kernel"](b"no cubin", "kernel", "pilf", 128, 0)
    with pytest.raises(TypeError, match="argument 0 is a tensor that is not on CUDA"):
        launch(handle, 1, torch.zeros(2), 1, 2, 0.5)
    with pytest.raises(TypeError, match="3 kernel arguments; it must be 4"):
        launch(handle, 1, None, 1, 2)
    with pytest.raises(TypeError, match="argument 1 is 2147483648, an int that 32 bits cannot hold"):
        launch(handle, 1, None, 2**31, 1, 0.5)
    with pytest.raises(TypeError, match="argument 3 is None; it must be a float"):
        launch(handle, 1, None, 1, 1, None)
    with pytest.raises(ValueError, match="no kernel has handle"):
        launch(10**6, 1)
    with pytest.raises(ValueError, match="at most 2\\^31 - 1"):
        launch(handle, 2**31, None, 1, 2, 0.5)
    with pytest.raises(ValueError, match="32 to 1024 threads"):
        launcher["load_kernel"](b"", "kernel", "", 5000, 0)
    assert launch(handle, 0, None, 1, 2, 0.5) is None
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"libcuda\.so\.1|CUDA_ERROR"):
            launcher["prepare"](0)


@pytest.mark.parametrize("output", ["", "\n", "a warning", "[]", '{"metadata": {}}', '{"image": "?", "metadata": 1}'])
def test_a_compiler_that_ends_well_without_an_answer(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind its work, or with another program's words in its output."""
    spec = portable_kernels.combine_spec("fp32", "bf16", 64, True, 2)
    monkeypatch.setattr(process, "run", lambda *_, **__: process.Ended(0, output, "its log"))
    with pytest.raises(triton_compiler.TritonError, match=r"portable for cuda:sm_80: .* answered no cubin") as caught:
        triton_compiler.compile_unit(spec.unit, config.kernel_sources_dir() / spec.kernel, Target("cuda", "sm_80"))
    assert caught.value.log == "its log"
