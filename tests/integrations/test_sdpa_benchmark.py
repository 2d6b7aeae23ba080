"""The benchmark of SDPA without a GPU: what it makes of its cells' lines, and that none that was measured is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from jit_kernel.integrations import counters

sys.path.append(str(config.package_dir().parent / "benchmarks"))

import sdpa as benchmark

RATIOS = ({"ratio": 2.0, "training_ratio": 1.5}, {"ratio": 8.0, "training_ratio": 6.0})


@pytest.fixture(autouse=True)
def _cleared():
    counters.clear()
    yield
    counters.clear()


def test_both_ratios_are_summed_up() -> None:
    first, second = benchmark.summaries([*RATIOS])
    assert first == {"case": "summary of ratio", "ratio": pytest.approx(4.0), "least": 2.0}
    assert second == {"case": "summary of training_ratio", "ratio": pytest.approx(3.0), "least": 1.5}
    assert benchmark.summaries([]) == []


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, fails_at: int | None) -> None:
    """The two cells of head size 64 and 1024 tokens, with times of no GPU."""
    measured: list[str] = []

    def cell(d: int, length: int, causal: bool, rounds: int) -> dict[str, Any]:
        if len(measured) == fails_at:
            raise RuntimeError("out of memory")
        ratios = RATIOS[len(measured)]
        measured.append(f"bf16 d{d} {length}{' causal' if causal else ''}")
        counters.count("sdpa", "served")
        times = {"ours_ms": 1.0, "torch_ms": ratios["ratio"], "gradients_ours": 0.3, "gradients_torch": 0.3}
        return {"case": measured[-1], **times, **ratios}

    monkeypatch.setattr(benchmark, "cell", cell)
    monkeypatch.setattr(benchmark.record, "circumstances", lambda device: {"device": device})
    options = ["--device", "cuda", "--select", "d64 1024", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["sdpa.py", *options])
    benchmark.main()


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sdpa.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_its_cells_and_summaries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _run(monkeypatch, tmp_path, None)
    cells = ["bf16 d64 1024", "bf16 d64 1024 causal"]
    lines = _lines(tmp_path)
    assert [line["case"] for line in lines] == [*cells, "summary of ratio", "summary of training_ratio"]
    assert all(line["device"] == "cuda:0" for line in lines)
    assert [line["served"] for line in lines[:2]] == [1, 1]


def test_a_run_that_fails_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        _run(monkeypatch, tmp_path, 1)
    assert [line["case"] for line in _lines(tmp_path)] == ["bf16 d64 1024"]
