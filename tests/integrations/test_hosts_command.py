"""`python -m jit_kernel hosts`: versions without an import, what is active, and the calls that programs counted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from jit_kernel.commands import hosts
from jit_kernel.integrations import counters, local_kernels, sdpa
from tests.support.commands import command

BY_NAME = {host.name: host for host in hosts.HOSTS}


def of(facts: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in facts["hosts"] if each["host"] == name)
    return found


def program(text: str, **environment: str) -> str:
    """Run a program with these variables; its standard error."""
    variables = {**os.environ, "PYTHONPATH": str(config.package_dir().parent), **environment}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_no_host_is_imported() -> None:
    program(
        "import sys\nfrom jit_kernel.commands import hosts\nhosts.text(hosts.report())\n"
        f"packages = {sorted({host.package for host in hosts.HOSTS})}\n"
        "assert not [name for name in packages if name in sys.modules]\n"
    )


def test_every_host_and_the_versions_that_are_here() -> None:
    """A host that these tests run with is one of a tested version: the table is raised with them."""
    facts = hosts.report()
    folder = config.package_dir() / "integrations"
    there = {path.stem for path in folder.iterdir()} & set(BY_NAME)
    assert there | {"LOCAL_KERNELS"} == set(BY_NAME)
    for each in facts["hosts"]:
        try:
            version = importlib.metadata.version(each["package"])
        except importlib.metadata.PackageNotFoundError:
            assert each["version"] is None and each["tested"] is None
            continue
        assert each["version"] == version
        assert each["tested"] is True, f"{each['package']} {version} is no tested version: see HOSTS"


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.42.1", True),
        ("0.35.0+local", True),
        ("0.34.9", False),
        ("0.43.0", False),
        ("0.40.0.dev0", True),
        ("x", False),
    ],
)
def test_tested_versions(monkeypatch: pytest.MonkeyPatch, version: str, tested: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    assert of(hosts.report(), "diffusers")["tested"] is tested
    assert f"diffusers {version}, {'' if tested else 'not '}tested (>=0.35,<0.43" in hosts.text(hosts.report())


def test_a_host_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "diffusers is not installed (tested: >=0.35,<0.43" in hosts.text(hosts.report())


def test_what_is_active_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {each["host"] for each in hosts.report()["hosts"] if each["active"]}
    with sdpa.active():
        assert of(hosts.report(), "sdpa")["active"] is True
        assert "active here" in hosts.text(hosts.report()).splitlines()[0]
    assert of(hosts.report(), "sdpa")["active"] is False
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())
    monkeypatch.setenv("JIT_KERNEL_PLUGINS", "vllm")
    config.reload()
    active = {each["host"] for each in hosts.report()["hosts"] if each["active"]}
    monkeypatch.undo()
    config.reload()
    assert active - before == {"LOCAL_KERNELS", "vllm"}


PROGRAM = """
import multiprocessing, os
from jit_kernel.integrations import counters
def child():
    counters.count("sdpa", "served")
for _ in range(2):
    counters.count("sdpa", "served")
counters.count("sdpa", "passed on", "dropout")
process = multiprocessing.get_context("fork").Process(target=child)
process.start(); process.join()
if os.fork() == 0:
    assert counters.read() == {}
    os._exit(0)
os.wait()
"""


def test_calls_of_programs_that_have_ended(tmp_path: Path) -> None:
    file = tmp_path / "counts.jsonl"
    for _ in range(2):
        program(PROGRAM, JIT_KERNEL_COUNTERS=str(file))
    program("import jit_kernel.integrations.counters", JIT_KERNEL_COUNTERS=str(file))  # it counts nothing
    ended = counters.read_file(file)
    assert [each["hosts"]["sdpa"]["served"] for each in ended] == [1, 2, 1, 2]
    assert len({each["process"] for each in ended}) == 4
    shown = command("jit_kernel", "hosts", "--json", "--counters", str(file))
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert of(facts, "sdpa")["calls"] == {"served": 6, "passed_on": {"dropout": 2}}
    assert of(facts, "diffusers")["calls"] == {"served": 0, "passed_on": {}}
    assert [each["hosts"] for each in facts["processes"]] == [["sdpa"]] * 4
    lines = command("jit_kernel", "hosts", "--counters", str(file)).stdout.splitlines()
    assert "  calls   6 served" in lines and "  calls   2 passed on: dropout" in lines
    assert f"Calls are those of 4 processes in {file}" in lines


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    program("from jit_kernel.integrations import counters\ncounters.count('sdpa', 'served')", **environment)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    told = program(
        "from jit_kernel.integrations import counters\ncounters.count('sdpa', 'served')",
        JIT_KERNEL_COUNTERS=str(tmp_path / "missing" / "counts.jsonl"),
    )
    assert "JIT_KERNEL_COUNTERS: the counts are lost" in told and "missing" in told


@pytest.mark.parametrize(
    "text", [None, "{}", "no JSON", '{"process": 1, "program": "", "ended": "", "hosts": {"a": 1}}']
)
def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    file = tmp_path / "counts.jsonl"
    if text is not None:
        file.write_text(text + "\n")
    assert hosts.main(["--counters", str(file)]) == 1
    told = capsys.readouterr()
    assert f"--counters is '{file}', which cannot be read" in told.err and told.out == ""
    if text is not None:
        assert f"line 1 is {text[:80]!r}; it must be counts of one process" in told.err


def test_a_programs_own_calls() -> None:
    counters.clear()
    counters.count("diffusers", "passed on", "dropout")
    assert "  calls   1 passed on: dropout" in hosts.text(hosts.report())
    counters.clear()
