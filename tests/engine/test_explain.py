"""Why a kernel is not stored: the part of its key that differs from the nearest entry, by name and with both values."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit
from jit_kernel.commands import cache
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import explain
from jit_kernel.engine.store import Store
from tests.support import children, loader_work

INPUTS = {"unit": "u1", "a/one.h": "1", "include/two.h": "2"}
INPUTS |= {"flags": "-O3 -fPIC", "target": "cpu:x86-64-v3", "tvm-ffi": "0.1"}
SPEC = jit.KernelSpec("family/kernel", "unit", "host", (("dtype", "fp32"),))
HERE = Target("cpu", "x86-64-v3")


def put(root: Path, name: str, target: str = "cpu:x86-64-v3", created: str = "2026", **changes: Any) -> None:
    folder = root / "family" / "kernel" / target / f"{name * 32}-00000000"
    folder.mkdir(parents=True)
    manifest = {"key": name * 32, "variant": {"dtype": "fp32"}, "inputs": INPUTS, "created": created, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def told(root: Path, key: str = "f" * 32, **inputs: str | None) -> str | None:
    wanted = {name: value for name, value in {**INPUTS, **inputs}.items() if value is not None}
    return explain.why_missed(SPEC, HERE, key, wanted, [Store(root)])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"flags": "-O3 -fPIC -mavx2"}, "flags (+-mavx2)"),
        ({"flags": "-O2 -fPIC"}, "flags (--O3 +-O2)"),
        ({"tvm-ffi": "0.2"}, "tvm-ffi (0.1 is stored, 0.2 is wanted)"),
        ({"include/two.h": "3"}, "include/two.h"),
        ({"a/one.h": None, "a/new.h": "1"}, "a/new.h (new), a/one.h (gone)"),
        ({"unit": "u2", "include/two.h": "3"}, "include/two.h, unit"),
    ],
)
def test_what_differs_is_named(tmp_path, inputs, words):
    put(tmp_path, "0")
    assert told(tmp_path, **inputs) == f"changed since the last build: {words}"


def test_the_nearest_entry_is_the_same_key_then_the_newest_then_another_targets(tmp_path):
    assert told(tmp_path) is None
    far = {**INPUTS, "target": "cpu:x86-64", "flags": "-O3 -fPIC -old"}
    put(tmp_path, "1", "cpu:x86-64", inputs=far)
    assert told(tmp_path) == (
        "changed since the last build: flags (--old), target (cpu:x86-64 is stored, cpu:x86-64-v3 is wanted)"
    )
    put(tmp_path, "2", created="2025", inputs={**INPUTS, "include/two.h": "old"})
    put(tmp_path, "3", created="2026", inputs={**INPUTS, "a/one.h": "old"})
    put(tmp_path, "4", created="2027", variant={"dtype": "bf16"})
    assert told(tmp_path) == "changed since the last build: a/one.h"
    put(tmp_path, "5", created="2020", compiler={"name": "g++", "version": "g++ 9.4.0\nmore"})
    assert told(tmp_path, "5" * 32) == ("changed since the last build: the compiler; the stored entry is by g++ 9.4.0")


def changed_header(folder: str) -> list[str]:
    """Compile, change a header, compile again; answers with what the log said of each."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("jit_kernel").addHandler(Keep())
    logging.getLogger("jit_kernel").setLevel(logging.INFO)
    header = Path(folder, "include", "where.h")
    for number in (1, 2):
        header.write_text(f"inline const char* where() {{ return __FILE__; }} // {number}\n")
        loader_work.with_sources(folder, lambda: jit.build(WHERE, cpu_target()))
    return lines


_UNIT = """#include "where.h"
extern "C" __attribute__((visibility("default"))) int __tvm_ffi_where(void*, const void*, int, void* result) {
  static_cast<long*>(result)[0] = 1;
  static_cast<long*>(result)[1] = reinterpret_cast<long>(where());
  return 0;
}
"""
WHERE = jit.KernelSpec("where", _UNIT, "host")


def test_a_miss_is_one_line_that_names_the_header(tmp_path):
    """And the libraries of two folders of sources are the same bytes, though a header holds its own path."""
    made = []
    for name in ("one", "two/deeper"):
        folder, store = tmp_path / name / "sources", tmp_path / name / "store"
        (folder / "include").mkdir(parents=True)
        environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store)}
        outcome = children.run(changed_header, str(folder), environment=environment, scratch=tmp_path)
        assert outcome.error == "", outcome
        first, second = [line for line in outcome.result if line.startswith("miss ")]
        assert first.endswith(": no entry") and second.endswith(": changed since the last build: include/where.h")
        made.append(sorted(path.read_bytes() for path in store.rglob("kernel.so")))
    assert made[0] == made[1] and len(made[0]) == 2 and b"kernel_sources/include/where.h" in made[0][0]


def test_cache_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path / "store")
    words = ["why", "--target", "cpu:x86-64-v3", "--select", "dtype=fp32", "function=forward"]
    assert cache.main(words) == 1
    assert capsys.readouterr().out.endswith("(function=forward, dtype=fp32, head_dim=any): no entry\n")
    assert not (tmp_path / "store").exists()
