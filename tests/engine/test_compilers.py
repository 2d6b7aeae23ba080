"""Compilers that are named wrongly, do not answer, or make something else: one clear error each, and no entry."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import artifact, compiler, installed
from tests.support import children, tiny

CALL = tiny.call
REAL = shutil.which("g++") or shutil.which("clang++") or ""
ERRORS = ("CompilerNotFoundError", "CompileError")
NEEDING = "echo 'void gone(); void* f = (void*)gone;'"
PATCH = "dd of=kernel.so bs=1 conv=notrunc"
# What stands in the place of "compile": the answer to --version is right.
MADE = {
    "nothing": "exit 0",
    "an empty file": ": > kernel.so",
    "a text": "echo hello > kernel.so",
    "a folder": "mkdir kernel.so",
    "a link to nothing": "ln -s nowhere kernel.so",
    "a program": f"echo 'int main() {{}}' | {REAL} -x c++ - -o kernel.so",
    "a library without functions": f"echo 'int x;' | {REAL} -shared -fPIC -x c++ - -o kernel.so",
    "a library cut short": f'{REAL} "$@" && truncate -s 6000 kernel.so',
    "a library for another architecture": f"{REAL} \"$@\" && printf '\\267' | {PATCH} seek=18",
    "a library for 32 bits": f"{REAL} \"$@\" && printf '\\001' | {PATCH} seek=4",
    "a library of an unknown symbol": f"sed -i 's/times/other/' unit.cpp && {REAL} \"$@\"",
    "a library that needs what is not there": f'cp unit.cpp kept; {NEEDING} >> unit.cpp; {REAL} "$@"; mv kept unit.cpp',
    "another unit's library": f'echo >> unit.cpp; {REAL} "$@"',
}
EXPORTING = """
#include "jit_kernel/host/ffi_arguments.h"
static void multiply(jit_kernel::FfiArguments&) {}
JIT_KERNEL_EXPORT(times, 1, multiply)
"""


def script(folder: Path, compiling: str, version: str = "echo stand-in 1.0", name: str = "c++") -> str:
    """A compiler that runs `version` for --version and `compiling` for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {version}; exit;; esac\n{compiling}\n')
    path.chmod(0o755)
    return str(path)


def refused(tmp_path: Path, chosen: str, *words: str, **environment: str | None) -> children.Outcome:
    """A call under this CXX: it fails with these words in its message, and leaves no entry and no private folder."""
    store = tmp_path / "store"
    variables = {"JIT_KERNEL_CACHE_DIR": str(store), "CXX": chosen, **environment}
    outcome = children.Child(tiny.twice, environment=variables, scratch=tmp_path).outcome(120)
    for answer in outcome.result:
        assert answer is not True and answer[0] in ERRORS, outcome
        for word in ("CXX", *words):
            assert word in answer[1], f"{word!r} is not in: {answer[1]}"
        assert "Traceback" not in answer[1] and len(answer[1]) < 4000
    assert tiny.entries(store) == []
    assert not list(store.glob(".tmp/*"))
    variables["CXX"] = None
    healed = children.run(CALL, environment=variables, scratch=tmp_path)
    assert healed.error == "" and healed.result["right"], healed
    return outcome


NAMED: dict[str, tuple[str, ...]] = {
    "g++ 'x": ("g++ 'x", "quot"),
    "ccache g++": ("'ccache'", "no such program"),
    "no-such-compiler -O3": ("'no-such-compiler'",),
    "/no/such/folder/g++": ("'/no/such/folder/g++'",),
    "{folder}": ("is a folder",),
    "{folder}/plain": ("cannot be executed", "chmod +x"),
    "{folder}/my tools/c++ -m64": ("/my'", "quote"),
    "env nothing-such": ("'nothing-such'", "no such program"),
    "''": ("''",),
    "{folder}/garbage": ("garbage --version", "format"),
    "{folder}/missing-interpreter": ("missing-interpreter --version",),
}


@pytest.mark.parametrize("chosen", NAMED)
def test_a_cxx_that_names_no_compiler(tmp_path, chosen):
    (tmp_path / "plain").write_text("")
    (tmp_path / "garbage").write_bytes(bytes(range(1, 256)))
    (tmp_path / "missing-interpreter").write_text("#!/no/such/shell\n")
    for name in ("garbage", "missing-interpreter"):
        (tmp_path / name).chmod(0o755)
    script(tmp_path / "my tools", f'exec {REAL} "$@"')
    words = NAMED[chosen] if "format" not in NAMED[chosen] else NAMED[chosen][:1]
    refused(tmp_path, chosen.replace("{folder}", str(tmp_path)), *words)


@pytest.mark.parametrize("quoted", [False, True])
def test_a_path_with_a_space_is_one_program(tmp_path, quoted):
    path = script(tmp_path / "my tools", f'exec {REAL} "$@"')
    environment = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": shlex.quote(path) if quoted else path}
    outcome = children.run(CALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"], outcome


@pytest.mark.parametrize("made", MADE)
def test_a_compiler_that_makes_something_else(tmp_path, made):
    refused(tmp_path, script(tmp_path / "bin", MADE[made]), str(tmp_path / "bin" / "c++"))


def test_a_compiler_killed_for_memory(tmp_path):
    for index, killed in enumerate(
        ("kill -KILL $$", "kill -KILL 0", "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1")
    ):
        (tmp_path / str(index)).mkdir()
        refused(tmp_path / str(index), script(tmp_path / "bin", killed), "memory", "SIGKILL")


def test_a_compiler_that_crashes(tmp_path):
    refused(tmp_path, script(tmp_path / "bin", "kill -SEGV $$"), "SIGSEGV")


def test_the_log_of_a_compiler_that_prints_50_mb_is_bounded(tmp_path):
    chatter = "echo 'unit.cpp:1:1: error: the first'; yes 'and more of it' | head -c 50000000; echo the last; exit 1"
    refused(tmp_path, script(tmp_path / "bin", chatter), "error: the first")
    (log,) = (tmp_path / "store" / ".failed").rglob("compile.log")
    assert log.stat().st_size < 4e6
    assert all(words in log.read_text() for words in ("error: the first", "bytes are left out here", "the last"))


VERSIONS = {
    "garbage": ("head -c 3000 /dev/urandom; printf '\\377\\000\\200'", True),
    "nothing": ("true", False),
    "a failure": ("echo broken licence >&2; exit 3", False),
    "a crash": ("kill -ABRT $$", False),
}


@pytest.mark.parametrize("answer", VERSIONS)
def test_a_strange_answer_to_version(tmp_path, answer):
    """Garbage identifies a compiler as well as words do, as long as it compiles; no answer is an error."""
    line, works = VERSIONS[answer]
    chosen = script(tmp_path / "bin", f'exec {REAL} "$@"', version=line)
    if not works:
        refused(
            tmp_path, chosen, "--version", {"a failure": "broken licence", "a crash": "SIGABRT"}.get(answer, "version")
        )
        return
    environment = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": chosen}
    outcome = children.run(CALL, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"], outcome


def impatient() -> list[Any]:
    installed._SLOW_SECONDS, installed._LIMIT_SECONDS = 0.1, 0.5
    return tiny.twice()


def test_a_version_that_never_comes(tmp_path):
    """It says that it waits, gives up, and leaves no process behind."""
    chosen = script(tmp_path / "bin", "exit 1", version="sleep 600")
    environment = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": chosen}
    outcome = children.Child(impatient, environment=environment, scratch=tmp_path).outcome(60)
    for error, message in outcome.result:
        assert error == "CompilerNotFoundError" and "no answer in" in message and "CXX" in message
    assert f"waiting for the answer of: {chosen} --version" in outcome.stderr
    assert installed._SLOW_SECONDS <= 2 and installed._LIMIT_SECONDS <= 30


def test_nvcc_gets_the_host_compiler_that_cxx_names(tmp_path, monkeypatch):
    """With its options, and without a compiler cache before it, which nvcc would hand its own options."""
    script(tmp_path, "", name="nvcc")
    host = script(tmp_path, "", name="g++-99")
    script(tmp_path, "", name="ccache")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(config, "cuda_compiler", lambda: "nvcc")
    commands = {}
    for chosen in ("", "g++-99", "g++-99 -m64 -pipe", "ccache g++-99"):
        monkeypatch.setenv("CXX", chosen)
        found = compiler.require("cuda")
        commands[chosen] = compiler.program_command(found, Target("cuda", "sm_90a"), ())[1:4]
    assert not any("ccbin" in word for word in commands[""])
    assert commands["g++-99"][0] == f"-ccbin={host}" == commands["ccache g++-99"][0]
    assert commands["g++-99 -m64 -pipe"] == [f"-ccbin={host}", "-Xcompiler=-m64", "-Xcompiler=-pipe"]


def test_a_compiler_replaced_behind_a_compiler_cache_is_seen(tmp_path, monkeypatch):
    script(tmp_path, "", name="ccache")
    host = Path(script(tmp_path, "", name="g++-99"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", "ccache g++-99")
    before = compiler.fingerprint(compiler.require("host"))
    host.write_text("#!/bin/sh\n# another one\n")
    assert compiler.fingerprint(compiler.require("host")) != before


def test_the_functions_that_a_unit_exports_are_known():
    sources = config.kernel_sources_dir()
    from tests.support.loader_work import SMALL

    assert artifact.exported(SMALL.unit, sources) == {"combine", "merge_state"}
    assert artifact.exported(EXPORTING, sources) == {"times"}
    assert artifact.exported(f"#if 0\n{EXPORTING}\n#endif\n", sources) == set()
    assert artifact.exported(f"// JIT_KERNEL_EXPORT(a, 1, f)\n{EXPORTING}", sources) == {"times"}


def exporting() -> None:
    jit.build(jit.KernelSpec("tiny", EXPORTING, "host"), cpu_target())


def test_a_library_without_the_functions_of_its_unit(tmp_path):
    """Seen before it is published: warm-up does not load what it compiles."""
    chosen = script(tmp_path / "bin", f"sed -i 's/EXPORT(times/EXPORT(other/' unit.cpp && {REAL} \"$@\"")
    environment = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": chosen}
    outcome = children.run(exporting, environment=environment, scratch=tmp_path)
    assert outcome.error == "CompileError" and "without times" in outcome.message and "CXX" in outcome.message, outcome
    assert tiny.entries(tmp_path / "store") == []
