"""What the loader costs: the first call, the next process, a warm call; on the CPU.

Cold: a fresh process with an empty store. Loaded: a fresh process with a full one. Both are medians over
processes. The smallest call is timed in one process, beside torch's SDPA on the same tensors, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent

CALL = """
import json, sys, time
started = time.perf_counter()
import torch, tvm_ffi
libraries = time.perf_counter()
from jit_kernel import flash_attn_func
from jit_kernel import jit
imported = time.perf_counter()
dtype = getattr(torch, sys.argv[1])
q, k, v = (torch.randn(1, 128, 8, 64, dtype=dtype) for _ in range(3))
begin = time.perf_counter()
out = flash_attn_func(q, k, v, causal=True)
end = time.perf_counter()
assert out.isfinite().all()
events = jit.events()
print(json.dumps({
    "libraries_s": libraries - started,
    "import_s": imported - libraries,
    "first_call_s": end - begin,
    "loader_s": sum(event.seconds for event in events),
    "compiled": sum(event.action == "compiled" for event in events),
    "peak_bytes": max((event.peak_bytes for event in events), default=0),
}))
"""


def process(store: Path, dtype: str) -> dict[str, Any]:
    """One call in a fresh process; how often a compiler was started is counted by a wrapper."""
    starts = store.parent / "starts"
    starts.write_text("")
    wrapper = store.parent / "c++"
    if not wrapper.exists():  # a compiler that was touched would be asked for its version again
        wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{starts}"\nexec "{shutil.which("g++")}" "$@"\n')
        wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "JIT_KERNEL_CACHE_DIR": str(store),
        "JIT_KERNEL_LOG": "quiet",
        "PYTHONPATH": str(ROOT),
        "CXX": str(wrapper),
    }
    answer = subprocess.run(
        [sys.executable, "-c", CALL, dtype], capture_output=True, text=True, env=environment, check=True
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    found["compiler_starts"] = len(starts.read_text().splitlines())
    return found


def loader_costs(rounds: int, dtype: str) -> list[dict[str, Any]]:
    """Cold and loaded first calls."""
    cold, loaded = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            cold.append(process(store, dtype))
            loaded += [process(store, dtype) for _ in range(3)]
    return [_median("cold", dtype, cold), _median("loaded", dtype, loaded)]


def _median(case: str, dtype: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {"case": case, "dtype": dtype, "runs": len(runs)}
    line.update({key: statistics.median(run[key] for run in runs) for key in runs[0]})
    return line


def smallest_call(calls: int) -> dict[str, Any]:
    """Median time of the smallest call, from Python to return, beside torch's SDPA; microseconds."""
    import torch
    import torch.nn.functional as functional

    from jit_kernel import flash_attn_func

    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    out = torch.empty_like(q)
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    ours: list[int] = []
    theirs: list[int] = []
    with torch.no_grad():
        for index in range(calls + 1000):
            begin = time.perf_counter_ns()
            flash_attn_func(q, k, v, out=out)
            middle = time.perf_counter_ns()
            functional.scaled_dot_product_attention(*heads_first)
            end = time.perf_counter_ns()
            if index >= 1000:
                ours.append(middle - begin)
                theirs.append(end - middle)
    line = {"case": "smallest call", "calls": calls}
    line["ours_us"] = round(statistics.median(ours) / 1e3, 2)
    line["torch_sdpa_us"] = round(statistics.median(theirs) / 1e3, 2)
    return line


def main() -> None:
    """Measure, print a table and append it to results/loader.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10_000)
    options = parser.parse_args()
    lines = [*loader_costs(options.rounds, "bfloat16"), *loader_costs(options.rounds, "float32")]
    lines.append(smallest_call(options.calls))
    for line in lines:
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()
            )
        )
    print(f"written to {record.write('loader', lines)}")


if __name__ == "__main__":
    main()
