"""How the portable implementation remembers the plan of a call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from jit_kernel.device import Target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.portable import forward


class Recorded:
    """Stands for a GPU's kernels: a handle is the variant's key, a launch is kept."""

    target = Target("cuda", "sm_90a")
    multiprocessors = 132

    def __init__(self) -> None:
        self.plans: dict[object, Any] = {}
        self.launched: list[tuple[Any, ...]] = []

    def handle(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        return key

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(forward, "kernels_of", lambda device: recorded)
    return recorded


def call_of(q: torch.Tensor, **given: object) -> Call:
    k = torch.zeros(2, 64, 2, 64).bfloat16()
    arguments = {"q": q, "k_cache": k, "v_cache": k, "cache_seqlens": torch.tensor([9, 50]).int(), "softcap": 0.0,
                 "causal": True, "window_size": (-1, -1), "attention_chunk": 0, "num_splits": 1,
                 "return_softmax_lse": False, "sm_margin": 0, "rotary_interleaved": True}  # fmt: skip
    fields = dict(zip(calls.FIELDS, calls.DEFAULTS, strict=True))
    names = {calls.FIELD_OF[calls.KVCACHE].get(name, name): value for name, value in (arguments | given).items()}
    values = {name: None if isinstance(value, type(dataclasses.MISSING)) else value for name, value in fields.items()}
    return checked((calls.KVCACHE, *list((values | names).values())[1:]))


def test_a_call_like_an_earlier_one_takes_its_plan_by_one_number(kernels: Recorded) -> None:
    q = torch.zeros(2, 1, 4, 64).bfloat16()
    first, second, third = (call_of(q) for _ in range(3))
    assert first.layouts == 0  # the checks had not seen such a call
    assert second.layouts == third.layouts > 0
    for call in (first, second, third):
        forward.attend(call)
    assert all(launch[0] == kernels.launched[0][0] for launch in kernels.launched)
    assert len(kernels.plans) == 2  # by what it is made of, and by the number


@pytest.mark.parametrize(
    "given",
    [{"causal": False}, {"window_size": (3, -1)}, {"softcap": 2.0}, {"num_splits": 3}, {"attention_chunk": 7},
     {"return_softmax_lse": True}, {"pack_gqa": False}],
    ids=str,
)  # fmt: skip
def test_a_call_with_another_setting_has_a_plan_of_its_own(given: dict[str, object], kernels: Recorded) -> None:
    q = torch.zeros(2, 1, 4, 64).bfloat16()
    for _ in range(2):
        for each in ({}, given):
            forward.attend(call_of(q, **each))
    launches = [launch[:2] + launch[24:] for launch in kernels.launched if launch[0][0] == "forward"]
    assert len(launches) == 4
    assert launches[0] != launches[1]
    assert launches[:2] == launches[2:]


def test_another_layout_has_another_number(kernels: Recorded) -> None:
    q = torch.zeros(2, 1, 4, 64).bfloat16()
    wide = torch.zeros(2, 1, 4, 80).bfloat16()[..., :64]
    numbers = {call_of(x).layouts for x in (q, q, wide, wide)} - {0}
    assert len(numbers) == 2


def test_plans_do_not_grow_without_end(kernels: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MOST_PLANS", 10)
    q = torch.zeros(2, 1, 4, 64).bfloat16()
    for length in range(1, 40):
        for _ in range(2):
            forward.attend(call_of(q, max_seqlen_q=length))
        assert len(kernels.plans) <= 10
