"""The Hopper backward kernels without a GPU: the compiler's report, what is served, and the rule that judges them."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from jit_kernel.device import Target
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.gradients.call import Backward, Gradients
from jit_kernel.fa3.hopper import backward, kernels
from tests.support import hopper_backward
from tests.support.hopper_variants import TARGET, compile_spec

NAMED = [("bf16", 64, False), ("bf16", 128, False), ("bf16", 256, False), ("fp16", 64, True), ("fp16", 256, True)]


@pytest.mark.parametrize("fields", NAMED, ids=str)
def test_a_variant_compiles_without_spills_or_serialised_products(fields: tuple[str, int, bool]) -> None:
    image, log = compile_spec(kernels.backward_spec(*fields))
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"\bC75\d\d\b.*", log) == []
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")] * 3


def test_warm_up_compiles_every_variant_that_a_call_can_take() -> None:
    specs = set(backward.variants(TARGET))
    assert specs <= set(hopper.all_variants(TARGET))
    assert backward.variants(Target("cuda", "sm_100")) == []
    taken = set()
    for dtype in (torch.bfloat16, torch.float16):
        for size in range(8, 257, 8):
            for softcap in (0.0, 5.0):
                call = dataclasses.replace(plain(dtype, size, 64), softcap=softcap)
                assert backward.decide_unplaced(call) == Accepted()
                taken.add(backward.spec_of(call))
    assert taken == specs


def plain(dtype: torch.dtype = torch.bfloat16, d: int = 64, dv: int = 64, device: str = "meta") -> Backward:
    q, k, v, out = (torch.empty(1, 8, 2, size, dtype=dtype, device=device) for size in (d, d, dv, dv))
    return Backward(out, q, k, v, out, torch.empty(1, 2, 8, device=device), 0.1, -1, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (plain(torch.float32), "q has dtype torch.float32: its backward kernels compute in bf16 and fp16"),
        (plain(d=264), "q and v have head sizes 264/64: its backward kernels have head sizes up to 256"),
        (plain(dv=60), "q and v have head sizes 64/60: the copy engine moves multiples of 8"),
        (
            dataclasses.replace(plain(), cu_seqlens_q=torch.empty(2, dtype=torch.int32, device="meta")),
            "cu_seqlens_q and cu_seqlens_k: its backward kernels take both or none",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: Backward, reason: str) -> None:
    decision = backward.decide_unplaced(change)
    assert isinstance(decision, Rejected)
    assert decision.reason == reason


def test_another_device_is_refused_by_name() -> None:
    decision = backward.decide(plain(device="cpu"))
    assert isinstance(decision, Rejected)
    assert decision.reason == "q is on cpu: its backward kernels are for cuda:sm_90a"


def test_rows_that_the_copy_engine_cannot_reach_are_copied() -> None:
    x = torch.arange(4 * 2 * 24, dtype=torch.bfloat16).view(4, 2, 24)
    assert backward._aligned(x) is x
    for wrong in (x[..., 1:17], x.expand(3, 4, 2, 24), x.mT, x[:, :, :8].as_strided((4, 2, 8), (12, 4, 1))):
        copied = backward._aligned(wrong)
        assert copied is not wrong
        assert copied.is_contiguous()
        assert torch.equal(copied, wrong)


def test_without_a_query_gradients_are_zeros() -> None:
    made = hopper_backward.make(hopper_backward.draw(3), "cpu")
    empty = dataclasses.replace(made.call, q=made.call.q[..., :0, :], sinks=torch.ones(3))
    found = backward.gradients(empty)
    assert found.sinks is not None
    assert not found.k.any()
    assert not found.v.any()
    assert not found.sinks.any()


PLAN = hopper_backward.Plan(
    5, torch.bfloat16, 64, 64, 2, 2, (40, 90), (60, 90), (40, 90), (60, 90), True, False, right=0, sinks=True
)


def own(made: hopper_backward.Made, sinks: float = 1.0) -> Gradients:
    """The gradients by the formula in the dtype."""
    assert made.sinks is not None
    q, k, v = (x.to(torch.bfloat16) for x in made.own)
    return Gradients(q, k, v, made.sinks.float() * sinks)


def test_the_rule_passes_the_formula_in_the_dtype() -> None:
    made = hopper_backward.make(PLAN, "cpu")
    assert hopper_backward.worst_share(made, own(made)) < 0.5


@pytest.mark.parametrize(
    "fault", ["a skipped tile", "dP without its row sum", "a head's dK lost", "sinks doubled", "NaN"]
)
def test_the_rule_fails_a_faulty_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hopper_backward.make(PLAN, "cpu")
    found = own(made)
    if fault == "a skipped tile":
        found.v[32:64] = 0
    elif fault == "dP without its row sum":
        plain_formula = hopper_backward.formula
        with monkeypatch.context() as patch:
            patch.setattr(
                hopper_backward, "formula", lambda plan, one, delta, of: plain_formula(plan, one, 0 * delta, of)
            )
            found = own(hopper_backward.make(PLAN, "cpu"))
    elif fault == "a head's dK lost":
        found.k[:, 1] /= 2
    elif fault == "sinks doubled":
        found = own(made, 2.0)
    else:
        found.q[3, 1, 7] = torch.nan
    assert hopper_backward.worst_share(made, found) > 1
