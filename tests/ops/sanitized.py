"""The ops' random cases on CPU kernels with the sanitizers of tests/fuzz/sanitized.py: part of `make fuzz-sanitize`.

JIT_KERNEL_TEST_CASES=300 python -m tests.ops.sanitized
"""

from __future__ import annotations

import subprocess
import sys

from tests.fuzz.sanitized import ROOT, environment_for

if __name__ == "__main__":
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu",
        "tests/ops",
        *sys.argv[1:],
    ]
    left_out = ["--deselect", "tests/ops/test_ops.py"]  # torch.compile: another program's memory
    environment = environment_for("--module", "jit_kernel.ops")
    sys.exit(subprocess.run([*command, *left_out], env=environment, cwd=ROOT, check=False).returncode)
