"""jit_kernel.ops beside a copy, torch's own operators, torch.compile and flashinfer, on a CPU or a GPU.

    python benchmarks/ops.py --device cpu|cuda [--folder results] [--rounds 30]

Each op at 8,192 x 4,096 numbers of bfloat16 (`value`: the share of the copy's bandwidth, by the bytes that the op must
read and write; `asked`: 0.9 on a GPU, 0.8 on a CPU) and, on a GPU, at one row (`value`: its time over that of a plain
launch of an empty kernel; `asked`: 1.1; `over_overlapping`: over one that starts early, as ours do), replayed from a
graph and as a program makes the calls. `over_torch`, `over_compile`, `over_flashinfer`: theirs over ours, at least 1.

The copy, the op and its peers take turns, so that a busy neighbour hits all of them: the median of rounds on a GPU,
whose L2 cache has been read full of other things before each, the least of them on a CPU, to which others only add.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ops_cases  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
from ops_cases import BF16, ROWS, SIZE, Case  # noqa: E402

from jit_kernel import jit  # noqa: E402

ASKED = {"cuda": 0.9, "cpu": 0.8}
EMPTY = """
#include "jit_kernel/cuda/rows.cuh"
__global__ void empty(const float* x) { jit_kernel::meet_neighbours(); }
"""
FLUSHED = 512 << 20  # bytes: ten times an H200's L2 cache, and 120 us in which a program gets ahead of the GPU
Line = dict[str, Any]
Calls = dict[str, Callable[[], object]]


def flashinfer() -> Any:
    """The package, or None where it is not installed."""
    try:
        for name in ("norm", "activation", "rope"):
            importlib.import_module(f"flashinfer.{name}")
    except ImportError:
        return None
    return importlib.import_module("flashinfer")


def calls_of(case: Case, peer: Any) -> Calls:
    """Ours and its peers, each called once: what has to be compiled is."""
    compiled = torch.compile(case.torch, dynamic=False)
    calls: Calls = {
        "ours": case.ours,
        "torch": lambda: case.torch(*case.inputs),
        "compile": lambda: compiled(*case.inputs),
    }
    if peer is not None and case.flashinfer is not None:
        theirs = case.flashinfer
        calls["flashinfer"] = lambda: theirs(peer)
    for call in calls.values():
        call()
    return calls


def on_cpu(calls: Calls, rounds: int) -> dict[str, float]:
    """Seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: min(each) for name, each in times.items()}


def on_gpu(calls: Calls, rounds: int) -> dict[str, float]:
    """Seconds of each call, with an L2 cache that holds other things, none of which has to be written back."""
    spare = torch.zeros(FLUSHED // 4, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            spare.sum()
            events[name].append(timed(call))
    torch.cuda.synchronize()
    return {name: seconds(pairs) for name, pairs in events.items()}


def timed(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """A call between two events."""
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    call()
    ended.record()
    return started, ended


def seconds(pairs: Iterable[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """The median of what events measured."""
    return statistics.median(started.elapsed_time(ended) for started, ended in pairs) / 1e3


def in_graph(call: Callable[[], object], calls: int = 50) -> float:
    """Seconds of a call of 50 in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    for _ in range(3):
        graph.replay()
    pairs = [timed(graph.replay) for _ in range(20)]
    torch.cuda.synchronize()
    return seconds(pairs) / calls


def called(call: Callable[[], object], calls: int = 200) -> float:
    """Seconds of a call of 200 that a program makes one behind the other."""
    pairs = []
    for _ in range(5):
        torch.cuda.synchronize()
        pairs.append(timed(lambda: [call() for _ in range(calls)]))
    torch.cuda.synchronize()
    return seconds(pairs) / calls


def over(times: dict[str, float]) -> Line:
    """The peers' times over ours."""
    return {f"over_{name}": each / times["ours"] for name, each in times.items() if name not in ("ours", "copy")}


def large(device: str, rounds: int, prepared: Sequence[tuple[Case, Calls]]) -> Iterator[Line]:
    """8,192 rows, beside a copy of as many bytes as an op of two bytes in and two out."""
    source = torch.randn(ROWS, SIZE, device=device).to(BF16)
    target = torch.empty_like(source)
    for case, calls in prepared:
        times = (on_cpu if device == "cpu" else on_gpu)({"copy": lambda: target.copy_(source), **calls}, rounds)
        bandwidth, ours = 4 * ROWS * SIZE / times["copy"], times["ours"]
        line = {"case": case.name, "rows": ROWS, "ms": ours * 1e3, "gb_per_s": case.bytes / ours / 1e9}
        line |= {"copy_gb_per_s": bandwidth / 1e9, "goal": f"{case.name}: share of the copy's bandwidth"}
        yield line | {"asked": ASKED[device], "value": case.bytes / ours / bandwidth} | over(times)


def one_row(prepared: Sequence[tuple[Case, Calls]]) -> Iterator[Line]:
    """One row on a GPU, replayed from a graph, and as a program calls it."""
    sources, x = jit.Sources(text={"empty.cuh": EMPTY}, name="empty"), torch.zeros(4, device="cuda")
    kernel = jit.cuda(sources, "empty.cuh", entry="empty")
    overlaps = torch.cuda.get_device_capability() >= (9, 0)
    plain, overlapped = kernel[1, 32], kernel.launch(1, 32, programmatic=overlaps)
    least, early = in_graph(lambda: plain(x)), in_graph(lambda: overlapped(x))
    least_called = called(lambda: plain(x))
    yield {"case": "an empty kernel", "rows": 1, "us": least * 1e6, "us_called": least_called * 1e6}
    yield {"case": "an empty kernel, overlapping", "rows": 1, "us": early * 1e6}
    for case, calls in prepared:
        times = {name: in_graph(call) for name, call in calls.items()}
        line = {"case": case.name, "rows": 1, "us": times["ours"] * 1e6, "value": times["ours"] / least, "asked": 1.1}
        line |= {"goal": f"{case.name}: one row over an empty kernel", "over_overlapping": times["ours"] / early}
        line |= {"us_called": called(case.ours) * 1e6, "us_called_torch": called(calls["torch"]) * 1e6}
        yield line | over(times)


def prepare(rows: int, device: str) -> list[tuple[Case, Calls]]:
    """Each case with its calls, compiled."""
    peer = flashinfer() if device == "cuda" else None
    return [(case, calls_of(case, peer)) for case in ops_cases.every(rows, device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()

    def lines() -> Iterator[Line]:
        with torch.no_grad():
            made = [large(options.device, options.rounds, prepare(ROWS, options.device))]
            made += [one_row(prepare(1, "cuda"))] if options.device == "cuda" else []
            for line in (line for each in made for line in each):
                print({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()})
                yield line

    record.write("ops", lines(), "cpu" if options.device == "cpu" else "cuda:0", options.folder)


if __name__ == "__main__":
    main()
