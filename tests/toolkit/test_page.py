"""docs/toolkit.md, block by block, and the example: what they show is what happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jit_kernel import jit
from jit_kernel.engine import nvrtc
from tests.support import house

PAGE = (house.ROOT / "docs" / "toolkit.md").read_text(encoding="utf-8")
EXAMPLE = house.ROOT / "examples" / "rms_norm.py"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(script: Path, folder: Path, *words: str) -> str:
    """What a Python program prints, in a folder and with this store."""
    done = subprocess.run([sys.executable, *words, *([str(script)] if script.name else [])], cwd=folder,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")
def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    """In one program; the commands run in the place where they stand."""
    pytest.importorskip("triton")
    monkeypatch.setenv("PYTHONPATH", str(house.ROOT))
    lines = ["import subprocess, sys"]
    kinds = []
    for kind, text in BLOCK.findall(PAGE):
        kinds.append(kind)
        assert kind in ("python", "sh")
        if kind == "python":
            lines.append(text)
            continue
        for command in text.splitlines():
            python, *words = shlex.split(command)
            assert python == "python"
            lines.append(f"print(subprocess.run([sys.executable, *{words!r}], check=True, capture_output=True).stdout)")
    assert kinds.count("python") >= 10 and "sh" in kinds
    (tmp_path / "page.py").write_text("\n".join(lines), encoding="utf-8")
    printed = run(tmp_path / "page.py", tmp_path)
    assert "fill (entry=fill<float>) for cuda:sm_90a: stored in" in printed
    assert "text/scale (exports=scale_f32)" in printed and "add (function=add, BLOCK=256)" in printed


def test_the_page_names_every_public_name():
    names = {name for name in jit.__all__ if name[0].islower()} - {"build", "load", "load_cubin", "is_stored"}
    assert {name for name in names if f"jit.{name}" not in PAGE} == set()


def test_the_newcomers_kernel_is_short_and_right(tmp_path):
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
    printed = run(EXAMPLE, tmp_path)
    assert f"RMS norm on {'cuda' if torch.cuda.is_available() else 'cpu'}" in printed
