"""Scheduler metadata of captured graphs: static memory that is refreshed, of one graph alone."""

from __future__ import annotations

import dataclasses

import pytest
from torch import Tensor

from jit_kernel.attention import FlashAttentionBackend, ForwardMetadata, GraphMetadata
from jit_kernel.attention import step as scheduling
from tests.support.engine import FULL, Engine, close, expected
from tests.support.mate_kernels import ForeignMetadataError
from tests.support.musa_device import RUNTIME, Machine


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
