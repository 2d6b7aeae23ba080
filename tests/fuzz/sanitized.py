"""The fuzzer on CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in them: `make fuzz-sanitize`.

The kernels are compiled by g++ into a store of their own, at -O1, which takes minutes the first time; then the fuzzer
runs in a Python with the sanitizers' libraries preloaded. Arguments go on to tests.fuzz.calls.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cache" / "sanitized"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
# -O1 has to stand behind the package's own -O3, so that words of CXX, which stand before it, would not do.
WRAPPER = f'#!/bin/sh\nexec g++ "$@" {FLAGS}\n'


def library(name: str) -> str:
    """Where g++ keeps one of its libraries."""
    answer = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(answer.stdout.strip()).resolve())


def environment_for(*warmup: str) -> dict[str, str]:
    """The environment of a Python whose CPU kernels have the sanitizers in them; what `warmup` names is compiled."""
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    wrapper = FOLDER / "sanitizing-g++"
    if not wrapper.exists() or wrapper.read_text() != WRAPPER:  # its age is part of a compiled kernel's identity
        wrapper.write_text(WRAPPER)
        wrapper.chmod(stat.S_IRWXU)
    environment = {
        **os.environ,
        "CXX": str(wrapper),
        "JIT_KERNEL_CACHE_DIR": str(FOLDER / "store"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    subprocess.run(
        [sys.executable, "-m", "jit_kernel.warmup", "--target", "cpu:native", *warmup], env=environment, check=True
    )
    return environment | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=4096:"
        "handle_segv=2:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "PYTHONMALLOC": "malloc",
    }


def main() -> int:
    environment = environment_for()
    command = [sys.executable, "-m", "tests.fuzz.calls", "--no-guards", "--limit", "300", *sys.argv[1:]]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
