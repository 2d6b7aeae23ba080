"""A CUDA image without g++, nvcc and Triton: calls from a pack, and cold by NVRTC with a platform wheel's launchers.

SHIPPED names a folder that `python -m tests.support.gpu_pack build` filled on another machine; without it the pack is
made here first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from tests.support import gpu_pack

pytestmark = pytest.mark.gpu
ALLOWED = {"prefill": 2e-2, "decode": 2e-2, "portable": 2e-2, "op": 4e-2, "own": 0.0}


def run(action: str, folder: Path, **environment: str) -> Any:
    """One action in a process of its own; what it answered."""
    variables = {**os.environ, "PYTHONPATH": f"{config.package_dir().parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-m", "tests.support.gpu_pack", action, str(folder)], text=True, check=False,
                          capture_output=True, env={**variables, **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("SHIPPED"):
        return Path(os.environ["SHIPPED"])
    made = tmp_path_factory.mktemp("shipped")
    run("build", made, JIT_KERNEL_CACHE_DIR=str(made / "built"))
    return made


def right(errors: dict[str, float]) -> bool:
    return all(error <= ALLOWED[name] for name, error in errors.items())


def test_calls_from_a_pack_without_any_compiler(folder, tmp_path):
    """Sealed, PATH empty, Triton hidden: right, nothing compiled, and nothing loaded or put on the GPU by a call."""
    found = run("serve", folder, PATH="", JIT_KERNEL_CACHE_DIR=str(tmp_path / "store"))
    assert set(found["errors"]) == set(ALLOWED) and right(found["errors"]), found
    assert (found["compiled"], found["after"], found["put"]) == (0, [], []), found
    assert found["loaded"] == len(gpu_pack.kernels())


def test_cold_with_a_wheels_launchers_and_no_host_compiler(folder, tmp_path):
    """NVRTC compiles the kernels of the calls; no library is compiled."""
    layers = {"JIT_KERNEL_CACHE_LAYERS": str(folder / "launchers")}
    found = run("cold", folder, PATH="", JIT_KERNEL_CACHE_DIR=str(tmp_path / "store"), **layers)
    assert right(found["errors"]) and set(found["compiled"]) == {"cuda"}, found
