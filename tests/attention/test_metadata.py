"""Scheduler metadata of the attention layer: used for the call that it was made for, and for no other."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.attention import FlashAttentionBackend, ForwardMetadata
from jit_kernel.attention import step as contexts
from jit_kernel.attention import step as scheduling
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.engine import FULL, PAGE, SWA, Engine, close, expected
from tests.support.mate_kernels import ForeignMetadataError
from tests.support.mate_signatures import VERSIONS, wrapper_signatures
from tests.support.musa_calls import on_device
from tests.support.musa_device import Machine, machine, to_cpu, to_musa

STEPS = 1000


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
