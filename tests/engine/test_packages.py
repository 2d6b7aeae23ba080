"""What is built for the index: the wheel and the source distribution, and what they hold."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jit_kernel import config


def test_the_wheel_is_small_and_whole(tmp_path):
    """The wheel holds the kernel sources, is at most 1 MB, and works from where it is unpacked."""
    import zipfile

    root = config.checkout_root()
    if root is None:
        pytest.skip("not a checkout")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB")
    assert wheel.stat().st_size <= 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    probe = (
        "from jit_kernel import config; print(config.checkout_root(), config.kernel_sources_dir(), config.cache_dir())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert answer.stdout.split() == [
        "None",
        str(tmp_path / "site" / "jit_kernel" / "kernel_sources"),
        str(tmp_path / "home" / ".cache" / "jit_kernel"),
    ]
    assert (
        tmp_path / "site" / "jit_kernel" / "kernel_sources" / "flash_attention_v3" / "cpu" / "entry" / "forward.h"
    ).exists()
