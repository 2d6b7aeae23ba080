"""Warm-up and doctor as their users meet them: commands, output and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_a_field_that_is_selected_twice_means_either_value(store):
    """In one --select or in two; `why` reads them the same way."""
    words = ("--target", "cpu:native", "--select", "dtype=bf16", "dtype=fp32", "head_dim=128")
    either, *alone = (
        {entry["kernel"] + str(entry["variant"]) for entry in json.loads(answer.stdout)}
        for answer in (
            command("jit_kernel.warmup", "--list", "--json", *chosen, JIT_KERNEL_CACHE_DIR=store)
            for chosen in (words, words[:4] + words[5:], (*words[:3], "dtype=fp32", "--select", *words[5:]))
        )
    )
    assert either == alone[0] | alone[1] and alone[0] - alone[1] and alone[1] - alone[0]
    missing = command("jit_kernel", "cache", "why", *words, JIT_KERNEL_CACHE_DIR=store)
    assert len(missing.stdout.splitlines()) == len(either), missing.stderr


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
