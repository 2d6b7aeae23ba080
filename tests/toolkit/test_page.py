"""docs/toolkit.md, block by block, and the example: what they show is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from jit_kernel import config, jit
from jit_kernel.engine import nvrtc
from tests.support import children, house, outsider

PAGE = (house.ROOT / "docs" / "toolkit.md").read_text(encoding="utf-8")
EXAMPLE = house.ROOT / "examples" / "rms_norm.py"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(text: str, folder: Path) -> str:
    """What a program prints, in a process of its own that has this store."""
    environment = {"JIT_KERNEL_CACHE_DIR": str(config.cache_dir()), "JIT_KERNEL_LOG": "quiet"}
    outcome = children.run(outsider.run_program, text, str(folder), environment=environment, scratch=folder)
    assert outcome.error == "", outcome
    printed: str = outcome.result
    return printed


@pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")
def test_every_block_of_the_page_runs(tmp_path):
    """In one program; the commands run in the place where they stand."""
    pytest.importorskip("triton")
    lines = []
    kinds = []
    for kind, text in BLOCK.findall(PAGE):
        kinds.append(kind)
        assert kind in ("python", "sh")
        commands = [shlex.split(command) for command in text.splitlines()] if kind == "sh" else []
        assert all(words[:2] == ["python", "-m"] for words in commands)
        lines += [f"run_command(*{words[1:]!r})" for words in commands] or [text]
    assert kinds.count("python") >= 10 and "sh" in kinds
    printed = run("\n".join(lines), tmp_path)
    assert "fill (entry=fill<float>) for cuda:sm_90a: stored in" in printed
    assert "text/scale (exports=scale_f32)" in printed and "add (function=add, BLOCK=256)" in printed


def test_the_page_names_every_public_name():
    names = {name for name in jit.__all__ if name[0].islower()} - {"build", "load", "load_cubin", "is_stored"}
    assert {name for name in names if f"jit.{name}" not in PAGE} == set()


def test_the_newcomers_kernel_is_short_and_right(tmp_path):
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
    printed = run(EXAMPLE.read_text(encoding="utf-8"), tmp_path)
    assert f"RMS norm on {'cuda' if torch.cuda.is_available() else 'cpu'}" in printed
