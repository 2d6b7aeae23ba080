"""How hopper_serving.py times: implementations side by side, plain and in a CUDA graph, with a cold L2 cache."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jit_kernel import config

GRAPH_CALLS = 20
VARIABLE = "JIT_KERNEL_IMPLEMENTATION"


@dataclass(frozen=True)
class Competitor:
    """What is timed; `calls` of it lie in one run; `implementation` of ours must serve it, None where it is no call."""

    run: Callable[[], object]
    calls: int = 1
    implementation: str | None = None


def force(implementation: str | None) -> None:
    """Every call of ours goes to one implementation, or is refused; None leaves the setting as it is."""
    if implementation is not None and os.environ.get(VARIABLE) != implementation:
        os.environ[VARIABLE] = implementation
        config.reload()


def in_graph(call: Callable[[], torch.Tensor], calls: int = GRAPH_CALLS) -> Callable[[], torch.Tensor]:
    """So many calls captured in a CUDA graph; its replay answers with the last one's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def compete(competitors: dict[str, Competitor], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call of each competitor in each round; they follow each other in random order."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in competitors}
    dice = random.Random(0)
    for _ in range(rounds):
        order = list(competitors)
        dice.shuffle(order)
        for name in order:
            competitor = competitors[name]
            force(competitor.implementation)
            ms = do_bench(competitor.run, warmup=10, rep=60, return_mode="median")
            times[name].append(ms / competitor.calls)
    return times


def copy_rate() -> float:
    """GB/s that a copy of 2 GiB reads and writes: by it, figures of other runs are carried over."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = compete({"copy": Competitor(lambda: target.copy_(source))}, 3)["copy"]
    return 4 * source.numel() / statistics.median(times) / 1e6


def host_us(competitors: dict[str, Competitor], turns: int = 30) -> dict[str, float]:
    """Median microseconds from Python call to return; in turns, because a core's clock changes."""
    taken: dict[str, list[int]] = {name: [] for name in competitors}
    for turn in range(turns + 2):  # the first two warm up
        for name, competitor in competitors.items():
            force(competitor.implementation)
            competitor.run()
            torch.cuda.synchronize()
            for _ in range(100):
                begin = time.perf_counter_ns()
                competitor.run()
                took = time.perf_counter_ns() - begin
                if turn >= 2:
                    taken[name].append(took)
    return {name: statistics.median(each) / 1e3 for name, each in taken.items()}
