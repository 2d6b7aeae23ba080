"""transformers models under torch.compile(fullgraph=True) and torch.export, through jit_kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import counters  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import FAMILIES, NEAR, greedy, llama, mistral, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """One thread, and nothing that torch compiled before."""
    torch._dynamo.reset()
    with case_run.one_thread(), torch.no_grad():
        yield


PADDED, POSITIONS = tokens(9, 24, 15), torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24)
BATCHES: dict[str, dict[str, Any]] = {
    "plain": {"input_ids": tokens(24, 24)["input_ids"], "use_cache": False},
    "cache": {"input_ids": tokens(24, 24)["input_ids"], "use_cache": True},
    "padded": {**PADDED, "use_cache": False},
    "packed": {"input_ids": tokens(24, 24)["input_ids"], "position_ids": POSITIONS, "use_cache": False},
}


def judged(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """The rows of tokens, without those of padding."""
    mask = batch.get("attention_mask")
    return logits if mask is None else logits[mask.bool()]


class Backend:
    """One of torch.compile's backends, which remembers the operators of the graphs."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.name = name
        self.graphs: list[list[str]] = []

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend(self.name)(module, inputs)

    def attention(self) -> list[str]:
        return [name for graph in self.graphs for name in graph if name.startswith("jit_kernel.")]


# One of each in make test, the others in make test-hosts.
FEW = {("mistral", "padded"), ("gpt_oss", "packed")}
EVERY = [
    pytest.param(family, batch, marks=() if (family, batch) in FEW else pytest.mark.hosts)
    for family in FAMILIES
    for batch in BATCHES
]


@pytest.mark.parametrize(("family", "batch"), EVERY)
def test_one_graph(family: str, batch: str) -> None:
    """The whole model is one graph, with our operator for each layer's attention."""
    eager, ours = FAMILIES[family]()
    backend = Backend()
    found = torch.compile(ours, fullgraph=True, backend=backend)(**BATCHES[batch]).logits
    expected = eager(**BATCHES[batch]).logits
    torch.testing.assert_close(judged(found, BATCHES[batch]), judged(expected, BATCHES[batch]), **NEAR)
    assert len(backend.graphs) == 1 and len(backend.attention()) == 2


# A program whose answer is a cache cannot be exported.
@pytest.mark.parametrize(("family", "batch"), [case for case in EVERY if case.values[1] != "cache"])
def test_an_exported_program(family: str, batch: str) -> None:
    eager, ours = FAMILIES[family]()
    program = torch.export.export(ours, (), BATCHES[batch])
    names = [str(node.target) for node in program.graph.nodes]
    assert len([name for name in names if name.startswith("jit_kernel.")]) == 2
    other = {**BATCHES[batch], "input_ids": BATCHES[batch]["input_ids"].flip(1)}
    if "attention_mask" in other:  # other padding than that of the example
        other["attention_mask"] = tokens(20, 24, 3)["attention_mask"]
    found, expected = program.module()(**other).logits, eager(**other).logits
    torch.testing.assert_close(judged(found, other), judged(expected, other), **NEAR)


STEPS = [
    pytest.param(
        build, padded, static, marks=() if (build, padded, static) == (llama, True, True) else pytest.mark.hosts
    )
    for build in (llama, mistral)
    for padded in (False, True)
    for static in (False, True)
]


@pytest.mark.parametrize(("build", "padded", "static"), STEPS)
def test_generation_with_a_compiled_forward(build: Any, padded: bool, static: bool) -> None:
    """A static cache takes one graph for the prompt and one for every step behind it.

    And one more where padding leaves a window, or where the cache grows.
    """
    eager, ours = build()
    options = greedy(12, cache_implementation="static") if static else greedy(12)
    batch = tokens(4, 11) if padded else tokens(9, 9)
    expected = eager.generate(**batch, **options)
    backend = Backend("eager")
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend=backend)
    assert torch.equal(ours.generate(**batch, **options), expected)
    assert len(backend.graphs) <= (2 if static and not (padded and build is mistral) else 3)
    assert len(backend.attention()) == 2 * len(backend.graphs)


@pytest.mark.hosts
def test_any_length_of_an_exported_program() -> None:
    eager, ours = llama()
    length = torch.export.Dim("length", min=2, max=200)
    program = torch.export.export(
        ours, (), {"input_ids": tokens(24, 24)["input_ids"], "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )  # fmt: skip
    for n in (5, 33):
        batch = {"input_ids": tokens(n, n)["input_ids"], "use_cache": False}
        torch.testing.assert_close(program.module()(**batch).logits, eager(**batch).logits, **NEAR)


def test_a_traced_call_is_counted_once() -> None:
    _, ours = llama()
    counters.clear()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for _ in range(3):
        compiled(**BATCHES["padded"])
    assert counters.read()["transformers"] == {"served": 2, "passed_on": {}}  # the layers, when they were traced
