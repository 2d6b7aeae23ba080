"""The recorded calls of sglang and vLLM on a GPU: right, captured in a graph, and replayed with other lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel.integrations import sglang, vllm
from tests.support import engine_calls
from tests.support.engine_calls import OTHER_KEYS, SGLANG, VLLM, Made

pytestmark = pytest.mark.gpu

MODULES: dict[str, Any] = {SGLANG: sglang, VLLM: vllm}
CALLS = [record for engine in (SGLANG, VLLM) for record in engine_calls.calls(engine)]
SERVED = [record for record in CALLS if not engine_calls.asks_for_more(record)]
CACHED = [record for record in SERVED if record["kind"] in ("decode", "extend")]


def ids(records: list[Any]) -> list[str]:
    return [f"{number}: {record['engine'].split()[0]}, {record['where']}" for number, record in enumerate(records)]


def made(record: Any, **options: Any) -> Made:
    return engine_calls.made(record, MODULES[record["engine"]].get_scheduler_metadata, "cuda", **options)


def attend(record: Any, call: Made) -> Any:
    return getattr(MODULES[record["engine"]], record["function"])(**call.arguments)


@pytest.mark.parametrize("record", SERVED, ids=ids(SERVED))
def test_calls(record):
    call = made(record)
    assert engine_calls.judged(attend(record, call), call) <= 1


@pytest.mark.parametrize("record", CACHED, ids=ids(CACHED))
def test_replays_with_other_lengths(record):
    """New lengths, pages, numbers and plan in the memory that was captured."""
    call, other = made(record), made(record, keys=OTHER_KEYS, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(record, call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(record, call)
    for wanted in (call, other, made(record)):
        refill(call, wanted)
        spoil(result)
        graph.replay()
        torch.cuda.synchronize()
        assert engine_calls.judged(result, wanted) <= 1


def spoil(result: Any) -> None:
    for tensor in result if isinstance(result, tuple) else (result,):
        tensor.fill_(torch.nan)


def refill(call: Made, other: Made) -> None:
    """The numbers of another call in the memory of this one."""
    for name, tensor in call.arguments.items():
        if isinstance(tensor, Tensor) and name != "out" and not name.endswith("descale"):
            assert tensor.shape == other.arguments[name].shape, name
            tensor.copy_(other.arguments[name])
