"""SDPA on jit_kernel inside of what torch does to programs: torch.compile, autocast, tracing, transforms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as attend

from jit_kernel.integrations import counters, sdpa
from tests.support import case_run

NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with case_run.one_thread():
        yield
    torch._dynamo.reset()
    counters.clear()


def served() -> int:
    return counters.read().get("sdpa", {"served": 0})["served"]


def made(**options: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, 16, 32, **options) for heads in (4, 2, 2))
    return q, k, v


def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q * 2, k, v, is_causal=True, enable_gqa=True).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_programs_are_served_forwards_and_backwards(backend):
    inputs = made(requires_grad=True)
    expected = program(*inputs)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    with sdpa.active():
        compiled = torch.compile(program, fullgraph=True, backend=backend)
        found = compiled(*inputs)
        assert served() == 1
        for ours, own in zip(torch.autograd.grad(found.sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, **NEAR)


def test_a_program_compiled_before_is_served_and_is_torchs_again_after():
    inputs = made()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    own = compiled(*inputs)
    with sdpa.active():
        ours = compiled(*inputs)
        assert served() == 1
    torch.testing.assert_close(ours, own, **NEAR)
    assert torch.equal(compiled(*inputs), own)
    assert served() == 1


def test_lengths_that_change_are_one_program():
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
    with sdpa.active():
        for tokens in (5, 9, 14):
            q, k, v = (each[:, :, :tokens] for each in made())
            torch.testing.assert_close(compiled(q, k, v), program(q, k, v), **NEAR)
    assert served() == 6


def test_exported_programs_are_served():
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return program(q, k, v)

    inputs = made()
    with sdpa.active():
        exported = torch.export.export(Module(), inputs)
        assert served() == 0
        found = exported.module()(*inputs)
        assert served() == 1
    torch.testing.assert_close(found, program(*inputs), **NEAR)


def test_autocast_is_served_in_its_dtype():
    inputs = made()
    with torch.autocast("cpu", torch.bfloat16):
        own = attend(*inputs, enable_gqa=True)
        with sdpa.active():
            ours = attend(*inputs, enable_gqa=True)
    assert served() == 1 and ours.dtype == own.dtype == torch.bfloat16
    torch.testing.assert_close(ours, own, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode):
    inputs = made(requires_grad=True)
    with mode(), sdpa.active():
        ours = attend(*inputs, enable_gqa=True)
        assert served() == 1 and not ours.requires_grad
        torch.testing.assert_close(ours, attend(*(each.detach() for each in inputs), enable_gqa=True), **NEAR)


def test_traces_hold_torchs_operator():
    inputs = made()
    with sdpa.active():
        traced = torch.jit.trace(program, inputs, check_trace=False)
        assert served() == 1
        ours = traced(*inputs)
        assert served() == 2
    assert "scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(*inputs), program(*inputs))
    torch.testing.assert_close(ours, program(*inputs), **NEAR)


def test_fake_tensors_reach_no_kernel():
    with sdpa.active(), FakeTensorMode():
        found = attend(*made(), enable_gqa=True)
    assert found.shape == (2, 4, 16, 32) and served() == 0


def test_transforms_answer_as_before():
    q, k, v = made()

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, enable_gqa=True).square().sum()

    batch = torch.stack([q, q * 2])
    with torch.no_grad():
        expected = torch.vmap(lambda each: attend(each, k, v, enable_gqa=True))(batch)
        with sdpa.active():
            found = torch.vmap(lambda each: attend(each, k, v, enable_gqa=True))(batch)
    torch.testing.assert_close(found, expected, **NEAR)
    own = torch.func.grad(loss)(q)
    with sdpa.active():
        torch.testing.assert_close(torch.func.grad(loss)(q), own, rtol=1e-4, atol=1e-5)
    assert served() > 0


def test_checkpointed_layers():
    q, k, v = made(requires_grad=True)
    own = torch.autograd.grad(program(q, k, v).sum(), (q, k, v))
    with sdpa.active():
        out = torch.utils.checkpoint.checkpoint(program, q, k, v, use_reentrant=False)
        found = torch.autograd.grad(out.sum(), (q, k, v))
        assert served() == 2
    for ours, torchs in zip(found, own, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
