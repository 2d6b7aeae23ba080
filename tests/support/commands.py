"""The package's commands as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys

from jit_kernel import config


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m <words>` with these variables beside the environment's own."""
    variables = {**os.environ, "PYTHONPATH": str(config.package_dir().parent), **environment}
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=variables, check=False)
