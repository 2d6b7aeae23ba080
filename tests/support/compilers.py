"""Compilers in the place of the real one: they count how often they are started, and take as long as a test wants."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def counting_compiler(folder: Path, before: str = "", version: str = "") -> tuple[str, Path]:
    """A compiler that writes each of its starts to a file, then is the real one.

    `before` is shell code that runs first, `version` the answer to --version instead of the real one. Returns the
    compiler's path and the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    real = shutil.which("g++") or shutil.which("clang++")
    starts, script = folder / "starts", folder / "c++"
    answer = f'case "$*" in *--version*) echo "{version}"; exit 0;; esac\n' if version else ""
    script.write_text(f'#!/bin/sh\necho "$@" >> "{starts}"\n{answer}{before}\nexec "{real}" "$@"\n')
    script.chmod(0o755)
    starts.touch()
    return str(script), starts


def compilations(starts: Path) -> int:
    """How often a counting compiler compiled something."""
    return sum("unit.cpp" in line for line in starts.read_text().splitlines())


def processes_inside(folder: Path) -> list[str]:
    """The processes whose working folder is below `folder`: compilers that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append(process.name)
        except OSError:
            continue
    return found
