"""Scheduler metadata of the attention layer: used for the call that it was made for, and for no other."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.attention import AttentionLayer, FlashAttentionBackend, ForwardMetadata, GraphMetadata
from jit_kernel.attention import step as contexts
from jit_kernel.attention import step as scheduling
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.mate_double import VERSIONS, wrapper_signatures
from tests.support.mate_kernels import ForeignMetadataError
from tests.support.musa_calls import on_device
from tests.support.musa_device import RUNTIME, Machine, machine, to_cpu, to_musa

STEPS = 1000
PAGE = 4


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU) as found:
        yield found


class Engine:
    """A model's caches on musa:index, or on the CPU for None, and metadata for random batches."""

    def __init__(self, index: int | None, seed: int, heads: tuple[int, int]) -> None:
        self.index, self.random = index, torch.Generator().manual_seed(seed)
        self.hq, self.hk = heads
        pages = torch.randn(2, 64, PAGE, self.hk, 64, generator=self.random).bfloat16()
        self.k, self.v = self.place((pages[0], pages[1]))

    def place(self, tree: Any) -> Any:
        return tree if self.index is None else to_musa(tree, self.index)

    def roll(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.random))

    def batch(self, size: int, tag: str, rows: int = 1, ragged: bool = False) -> tuple[Tensor, ForwardMetadata]:
        """Queries and metadata of `size` sequences with random lengths."""
        lengths = torch.randint(rows, 6 * PAGE, (size,), generator=self.random, dtype=torch.int32)
        table = torch.randint(0, 64, (size, 6), generator=self.random, dtype=torch.int32)
        shape = (size * rows, self.hq, 64) if ragged else (size, rows, self.hq, 64)
        q = torch.randn(shape, generator=self.random).bfloat16()
        cu = torch.arange(0, size * rows + 1, rows, dtype=torch.int32) if ragged else None
        metadata = ForwardMetadata(cu, rows, lengths, self.roll(6, 12) * PAGE, table, tag=tag)
        return self.place(q), ForwardMetadata(**self.place(vars(metadata)))


def expected(q: Tensor, engine: Engine, metadata: ForwardMetadata, layer: AttentionLayer) -> Tensor:
    plain = {name: to_cpu(x) for name, x in vars(metadata).items()}
    out: Tensor = CPU["flash_attn_with_kvcache"](
        q=to_cpu(q),
        k_cache=to_cpu(engine.k),
        v_cache=to_cpu(engine.v),
        **{name: plain[name] for name in ("cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q")},
        causal=layer.causal,
        window_size=layer.window_size,
        softmax_scale=1 / 8,
    )
    return out


FULL, SWA = AttentionLayer(), AttentionLayer(window_size=(9, 0))


def run_steps(stack: Machine, steps: int) -> None:
    """Two devices, target and draft, two batch sizes, two windows, two ubatches, two layers each, in random turns."""
    random = torch.Generator().manual_seed(11)
    engines = {i: {"target": Engine(i, i, (4, 2)), "draft": Engine(i, 10 + i, (8, 2))} for i in (0, 1)}
    backends = {
        (i, name): FlashAttentionBackend(device=f"musa:{i}") for i, models in engines.items() for name in models
    }

    def pick(values: list[Any]) -> Any:
        return values[int(torch.randint(0, len(values), (), generator=random))]

    def layers(engine: Engine, backend: FlashAttentionBackend, batches: list[tuple[Tensor, ForwardMetadata]]) -> None:
        wanted = {x: [expected(q, engine, metadata, x) for q, metadata in batches] for x in (FULL, SWA)}
        for layer in (FULL, SWA, FULL, SWA):
            for (q, metadata), right in zip(batches, wanted[layer], strict=True):
                close(backend.forward_decode(q, engine.k, engine.v, metadata, layer), right)

    for _ in range(steps):
        index, name = pick([0, 1]), pick(["target", "target", "draft"])
        engine, backend = engines[index][name], backends[index, name]
        rows, ragged = pick([(1, False), (1, True), (3, False), (3, True)])
        size = pick([2, 4])
        with backend.step():
            batches = [engine.batch(size, "base", rows, ragged)]
            if pick([True, False]):  # a second ubatch under way in the same step, of another size or of the same
                batches.append(engine.batch(pick([2, 4]), pick(["ubatch1", "base"]), rows, ragged))
            if pick([True, False]):  # a draft inside of the target's step
                inner = engines[index]["draft"]
                with backends[index, "draft"].step():
                    layers(inner, backends[index, "draft"], [inner.batch(pick([2, 4]), "base")])
            layers(engine, backend, batches)


def test_a_thousand_interleaved_steps(stack: Machine, say: list[str]) -> None:
    """The double refuses metadata not its own, and misread metadata would give NaN."""
    run_steps(stack, STEPS)
    made, used = len(stack.kernels.issued), stack.kernels.reused
    say.append(f"{STEPS} steps: scheduler metadata made {made} times, used {used} times")
    assert used > 1.8 * made  # a step's layers do share it
    assert {issued["device"] for issued in stack.kernels.issued} == {0, 1}


@pytest.mark.parametrize(
    "field",
    ["tag", "batch_size", "max_seqlen_q", "num_heads_q", "window_size", "lengths"],
)
def test_a_key_without_one_parameter_is_caught(stack: Machine, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """The thousand steps would have met the fault: without this parameter in the key, they fail."""
    whole = scheduling.key_for

    def poorer(*args: Any) -> Any:
        key = whole(*args)
        return _Forgetful(key, field) if field != "tag" else dataclasses.replace(key, tag="")

    monkeypatch.setattr(scheduling, "key_for", poorer)
    if field == "tag":  # the tag is a second line behind the lengths, which differ by memory
        run_steps(stack, 60)
        return
    with pytest.raises((ForeignMetadataError, ValueError, AssertionError, RuntimeError)):
        run_steps(stack, 400)


class _Forgetful:
    """A key that is equal to one with another value of `field`, and to one with other lengths."""

    def __init__(self, key: Any, field: str) -> None:
        self.key = key
        parameters = key.parameters
        if field != "lengths":
            parameters = dataclasses.replace(parameters, **{field: None})
        self.seen = dataclasses.replace(key, parameters=parameters, lengths=())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.key, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Forgetful) and self.seen == other.seen

    def __hash__(self) -> int:
        return hash(self.seen)


def test_lengths_written_in_place_are_other_lengths(stack: Machine) -> None:
    engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
    with backend.step():
        q, metadata = engine.batch(3, "base")
        backend.forward_decode(q, engine.k, engine.v, metadata)
        metadata.cache_seqlens.add_(1)
        backend.forward_decode(q, engine.k, engine.v, metadata)
    assert len(stack.kernels.issued) == 2


def test_outside_of_a_step_nothing_is_shared(stack: Machine) -> None:
    engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
    q, metadata = engine.batch(3, "base")
    for _ in range(3):
        backend.forward_decode(q, engine.k, engine.v, metadata)
    assert len(stack.kernels.issued) == 3
    for _ in range(2):
        with backend.step():
            for _ in range(3):
                backend.forward_decode(q, engine.k, engine.v, metadata)
    assert len(stack.kernels.issued) == 5


def test_forced_updates(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JIT_KERNEL_FORCE_METADATA_UPDATE", "1")
    config.reload()
    try:
        engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
        with backend.step():
            q, metadata = engine.batch(3, "base")
            for _ in range(3):
                backend.forward_decode(q, engine.k, engine.v, metadata)
        assert len(stack.kernels.issued) == 3
    finally:
        monkeypatch.undo()
        config.reload()


def test_the_bound_is_what_the_table_holds(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata for more keys than the table holds would have more splits than the call, and lose the last keys."""
    engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
    q, metadata = engine.batch(3, "base")
    loose = dataclasses.replace(metadata, max_seqlen_k=131072)
    backend.forward_decode(q, engine.k, engine.v, loose)
    assert stack.kernels.issued[-1]["max_seqlen_k"] == 6 * PAGE
    stack.kernels.strict = False
    monkeypatch.setattr(scheduling, "capacity", lambda *_: 1 << 30)
    out = backend.forward_decode(q, engine.k, engine.v, loose)
    assert to_cpu(out).isnan().any()


def test_deterministic_never_splits(stack: Machine) -> None:
    engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa", deterministic=True)
    q, metadata = engine.batch(3, "base")
    backend.forward_decode(q, engine.k, engine.v, metadata)
    assert stack.kernels.issued[-1]["num_splits"] == 1
    assert stack.mate.calls[-1].arguments["num_splits"] == 1


# Steps


def fail_inside_of_a_step(outer: contexts.ForwardContext) -> None:
    with contexts.entered(1, outer.device, None) as inner:
        assert contexts.current(1) is inner
        assert inner.step != outer.step
        raise RuntimeError("inside")


def test_leaving_a_step_restores_the_outer_one() -> None:
    device = torch.device("cpu")
    assert contexts.current(1) is None
    with contexts.entered(1, device, None) as outer:
        with pytest.raises(RuntimeError, match="inside"):
            fail_inside_of_a_step(outer)
        with contexts.entered(2, device, None):
            assert contexts.current(1) is outer
        assert contexts.current(1) is outer
        with pytest.raises(dataclasses.FrozenInstanceError):
            outer.step = 3  # type: ignore[misc]
    assert contexts.current(1) is None


def test_threads_and_tasks_have_steps_of_their_own() -> None:
    device, barrier, seen = torch.device("cpu"), threading.Barrier(4), []

    def work() -> None:
        assert contexts.current(1) is None
        with contexts.entered(1, device, None) as mine:
            barrier.wait(600)
            seen.append(contexts.current(1) is mine)
            barrier.wait(600)

    with contexts.entered(1, device, None):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [True] * 4

    async def task(turns: int) -> bool:
        with contexts.entered(1, device, None) as mine:
            for _ in range(turns):
                await asyncio.sleep(0)
                if contexts.current(1) is not mine:
                    return False
        return True

    async def both() -> list[bool]:
        return list(await asyncio.gather(task(3), task(5), task(2)))

    assert asyncio.run(both()) == [True] * 3


# Graphs


def captured(backend: FlashAttentionBackend, engine: Engine, q: Tensor, m: ForwardMetadata, g: GraphMetadata) -> Tensor:
    """What a captured graph runs: the same call on the same memory, while capturing."""
    RUNTIME.capturing = True
    try:
        with backend.step(graph=g):
            return backend.forward_decode(q, engine.k, engine.v, m)
    finally:
        RUNTIME.capturing = False


def test_a_graph_reads_static_metadata_that_is_refreshed(stack: Machine) -> None:
    engine, backend, graph = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa"), GraphMetadata("decode, 3")
    q, metadata = engine.batch(3, "base")
    with pytest.raises(RuntimeError, match="no scheduler metadata was made for this graph before its capture"):
        captured(backend, engine, q, metadata, graph)
    with backend.step():  # metadata of a step outside of the graph is no help
        backend.forward_decode(q, engine.k, engine.v, metadata)
        with pytest.raises(RuntimeError, match="before its capture"):
            captured(backend, engine, q, metadata, graph)
    with backend.step(graph=graph):
        backend.forward_decode(q, engine.k, engine.v, metadata)
    captured(backend, engine, q, metadata, graph)
    read = stack.mate.calls[-1].arguments["scheduler_metadata"].data_ptr()
    for _ in range(5):  # replays: new lengths in the same memory
        fresh = engine.batch(3, "base")[1]
        metadata.cache_seqlens.copy_(fresh.cache_seqlens)
        graph.refresh({"base": metadata})
        out = captured(backend, engine, q, metadata, graph)  # refuses metadata that is not for these lengths
        assert stack.mate.calls[-1].arguments["scheduler_metadata"].data_ptr() == read
        close(out, expected(q, engine, metadata, FULL))
    metadata.cache_seqlens.add_(1)
    with pytest.raises(ForeignMetadataError):  # a replay without refresh
        captured(backend, engine, q, metadata, graph)


def test_a_graph_is_refreshed_with_what_it_was_captured_for(stack: Machine) -> None:
    engine, backend, graph = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa"), GraphMetadata("decode, 3")
    q, metadata = engine.batch(3, "base")
    with backend.step(graph=graph):
        backend.forward_decode(q, engine.k, engine.v, metadata)
    with pytest.raises(KeyError, match="captured with tag 'base'"):
        graph.refresh({"swa": metadata})
    with pytest.raises(ValueError, match="batch size is 4; captured with 3"):
        graph.refresh({"base": engine.batch(4, "base")[1]})
    with pytest.raises(ValueError, match="max_seqlen_q is 2; captured with 1"):
        graph.refresh({"base": engine.batch(3, "base", rows=2)[1]})


def test_running_a_graphs_step_again_fills_the_same_memory(stack: Machine) -> None:
    engine, backend, graph = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa"), GraphMetadata("decode, 3")
    q, metadata = engine.batch(3, "base")
    used = []
    for _ in range(2):
        with backend.step(graph=graph):
            close(backend.forward_decode(q, engine.k, engine.v, metadata), expected(q, engine, metadata, FULL))
        used.append(stack.mate.calls[-1].arguments["scheduler_metadata"].data_ptr())
        metadata.cache_seqlens.sub_(1).clamp_(min=1)
    metadata.cache_seqlens.add_(1)
    graph.refresh({"base": metadata})
    captured(backend, engine, q, metadata, graph)
    assert {*used, stack.mate.calls[-1].arguments["scheduler_metadata"].data_ptr()} == {used[0]}


def test_a_key_names_its_step_and_its_graph() -> None:
    engine, backend = Engine(None, 1, (4, 2)), FlashAttentionBackend(device="cpu", plan_ahead=True)
    q, metadata = engine.batch(3, "base")
    keys = []
    for graph in (None, None, GraphMetadata("a"), GraphMetadata("b")):
        with backend.step(graph=graph) as step:
            keys.append(scheduling.key_for(step, metadata, FULL, q, engine.k, engine.v, 0))
    assert len(set(keys)) == 4


def test_two_batches_in_a_graph_need_two_tags(stack: Machine) -> None:
    """Two ubatches of one size under one tag would read one of the two's metadata after a refresh."""
    engine, backend, graph = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa"), GraphMetadata("two ubatches")
    (q, first), (_, second) = engine.batch(3, "base"), engine.batch(3, "base")
    with backend.step(graph=graph):
        backend.forward_decode(q, engine.k, engine.v, first)
        with pytest.raises(ValueError, match="tag 'base' has two batches"):
            backend.forward_decode(q, engine.k, engine.v, second)
        second = dataclasses.replace(second, tag="ubatch1")
        backend.forward_decode(q, engine.k, engine.v, second)
    for metadata in (first, second):
        metadata.cache_seqlens.sub_(1).clamp_(min=1)
    graph.refresh({"base": first, "ubatch1": second})
    for metadata in (first, second):
        close(captured(backend, engine, q, metadata, graph), expected(q, engine, metadata, FULL))


def test_two_graphs_do_not_share(stack: Machine) -> None:
    engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
    q, metadata = engine.batch(3, "base")
    graphs = [GraphMetadata("a"), GraphMetadata("b")]
    for graph in graphs:
        with backend.step(graph=graph):
            backend.forward_decode(q, engine.k, engine.v, metadata)
    read = []
    for graph in graphs:
        captured(backend, engine, q, metadata, graph)
        read.append(stack.mate.calls[-1].arguments["scheduler_metadata"].data_ptr())
    assert read[0] != read[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_forward_binds_to_its_version(tmp_path: Path, version: str) -> None:
    """Extend with and without a cache, decode, a window and a cascade; calls of the oldest version bind to all."""
    with machine(tmp_path / "site", CPU, version) as stack:
        engine, backend = Engine(0, 1, (4, 2)), FlashAttentionBackend(device="musa")
        with backend.step():
            for layer in (FULL, SWA):
                for rows, ragged in ((1, False), (3, True)):
                    q, metadata = engine.batch(3, "base", rows, ragged)
                    out = backend.forward_decode(q, engine.k, engine.v, metadata, layer)
                    close(out, expected(q, engine, metadata, layer))
            caches = {"k_cache": engine.k, "v_cache": engine.v}
            close(backend.forward_extend(q, None, None, metadata, **caches), expected(q, engine, metadata, FULL))
            raw = to_musa(torch.randn(9, 2, 64).bfloat16())
            backend.forward_extend(q, raw, raw, ForwardMetadata(metadata.cu_seqlens_q, 3))
            group = on_device(ForwardMetadata(torch.tensor([0, 9], dtype=torch.int32), 9), 0)
            none = to_musa(torch.zeros(1, dtype=torch.int32))
            shared = dataclasses.replace(group, cache_seqlens=none, max_seqlen_k=1, page_table=metadata.page_table[:1])
            out = backend.forward_cascade(q, engine.k, engine.v, shared, metadata)
            close(out, expected(q, engine, metadata, FULL))
        bind_to = VERSIONS if version == "0.1.3" else (version,)
        for name, arguments in stack.given:
            for other in bind_to:
                wrapper_signatures(other)[name].bind(**arguments)
        assert {name for name, _ in stack.given} >= {"flash_attn_with_kvcache", "flash_attn_varlen_func"}


def close(found: Tensor, wanted: Tensor) -> None:
    assert torch.allclose(to_cpu(found).float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_inference_tensors_have_no_version() -> None:
    engine = Engine(None, 1, (4, 2))
    backend = FlashAttentionBackend(device="cpu", plan_ahead=True)
    with torch.inference_mode():
        q, metadata = engine.batch(3, "base")
        assert metadata.cache_seqlens is not None
        assert metadata.cache_seqlens.is_inference()
        with backend.step() as step:
            first, second = (backend.forward_decode(q, engine.k, engine.v, metadata) for _ in range(2))
            assert len(step.made) == 1
        assert torch.equal(first, second)


def test_planning_works_on_the_cpu_too() -> None:
    """There the header is compared at every call."""
    engine = Engine(None, 1, (4, 2))
    k, v = engine.k, engine.v
    backend = FlashAttentionBackend(device="cpu", plan_ahead=True)
    plain = FlashAttentionBackend(device="cpu")
    for rows, ragged in ((1, False), (3, True)):
        q, metadata = engine.batch(3, "base", rows, ragged)
        for layer in (FULL, SWA):
            with backend.step():
                assert torch.equal(
                    backend.forward_decode(q, k, v, metadata, layer), plain.forward_decode(q, k, v, metadata, layer)
                )
