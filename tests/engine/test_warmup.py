"""Warm-up and doctor as their users meet them: commands, output and exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jit_kernel import config
from jit_kernel.engine.store import Store
from tests.support.commands import command
from tests.support.compilers import compilations, counting_compiler


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_warmup_compiles_once(tmp_path, store):
    compiler, starts = counting_compiler(tmp_path / "bin")
    words = ("jit_kernel.warmup", "--target", "cpu:native", "--select", "dtype=fp32", "head_dim=128")
    dry = command(*words, "--dry-run", JIT_KERNEL_CACHE_DIR=store, CXX=compiler)
    assert dry.returncode == 0 and "missing cpu:" in dry.stdout and compilations(starts) == 0
    first = command(*words, JIT_KERNEL_CACHE_DIR=store, CXX=compiler)
    assert first.returncode == 0, first.stderr
    made = compilations(starts)
    assert made == len(dry.stdout.splitlines()) >= 1 and f"{made} compiled, 0 already stored" in first.stdout
    assert f"[{made}/{made}]" in first.stderr, "no plain progress lines where there is no terminal"
    again = command(*words, "--json", JIT_KERNEL_CACHE_DIR=store, CXX=compiler)
    outcome = json.loads(again.stdout)
    assert outcome["compiled"] == [] and len(outcome["stored"]) == made and compilations(starts) == made


def test_warmup_lists_every_variant(store):
    answer = command("jit_kernel.warmup", "--list", "--json", "--target", "cpu:native", JIT_KERNEL_CACHE_DIR=store)
    assert answer.returncode == 0, answer.stderr
    listed = json.loads(answer.stdout)
    dtypes = {entry["variant"].get("dtype") for entry in listed}
    assert {"fp32", "bf16", "fp16", "e4m3"} <= dtypes
    assert not any(entry["stored"] for entry in listed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--select", "colour=red"), "colour"),
        (("--select", "dtype"), "it must be field=value"),
        (("--select", "dtype=int3"), "no variant"),
        (("--target", "cpu"), "target is 'cpu'"),
        (("--jobs", "0"), "--jobs is 0"),
    ],
)
def test_warmup_refuses_wrong_arguments(store, words, message):
    answer = command("jit_kernel.warmup", *words, JIT_KERNEL_CACHE_DIR=store)
    assert answer.returncode == 2 and message in answer.stderr


def test_warmup_ends_non_zero_when_something_failed(tmp_path, store):
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo broken;; *) echo "unit.cpp:1:1: error: no" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    answer = command(
        "jit_kernel.warmup", "--target", "cpu:native", "--select", "dtype=fp32", "head_dim=128",
        JIT_KERNEL_CACHE_DIR=store, CXX=str(broken),
    )  # fmt: skip
    assert answer.returncode == 1
    assert "FAILED" in answer.stderr and "error: no" in answer.stderr and "0 compiled" in answer.stdout


def test_doctor_tells_what_is_here(store):
    answer = command("jit_kernel", "doctor", "--json", JIT_KERNEL_CACHE_DIR=store)
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["implementations"]["cpu"]["cpu"] == "Accepted"
    assert all(
        text.startswith(("Accepted", "Rejected: "))
        for each in facts["implementations"].values()
        for text in each.values()
    )
    host = facts["compilers"]["host"]
    assert host[0]["chosen"] and host[0]["reason"] and host[0]["version"]
    assert facts["cache"]["folder"] == store and facts["cache"]["exists"] is False
    text = command("jit_kernel", "doctor", JIT_KERNEL_CACHE_DIR=store).stdout
    assert facts["devices"]["cpu"]["target"] in text and store in text
    assert not Path(store).exists(), "doctor made the store"


def test_doctor_without_a_compiler_says_what_to_install(store):
    answer = command("jit_kernel", "doctor", JIT_KERNEL_CACHE_DIR=store, PATH="", CXX="")
    assert answer.returncode == 0 and "apt-get install g++" in answer.stdout


def test_the_cache_commands(tmp_path, store):
    words = ("--target", "cpu:native", "--select", "dtype=fp32", "head_dim=128")
    assert command("jit_kernel.warmup", *words, JIT_KERNEL_CACHE_DIR=store).returncode == 0
    listed = command("jit_kernel", "cache", "list", JIT_KERNEL_CACHE_DIR=store)
    entries = list(Store(Path(store)).manifests())
    assert len(listed.stdout.splitlines()) == len(entries) >= 1
    assert command("jit_kernel", "cache", "verify", JIT_KERNEL_CACHE_DIR=store).returncode == 0
    os.truncate(entries[0][0] / "kernel.so", 10)
    verified = command("jit_kernel", "cache", "verify", JIT_KERNEL_CACHE_DIR=store)
    assert verified.returncode == 1 and "1 damaged" in verified.stdout
    cleared = command("jit_kernel", "cache", "clear", JIT_KERNEL_CACHE_DIR=store)
    assert f"{len(entries)} entries removed" in cleared.stdout and list(Path(store).iterdir()) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
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
