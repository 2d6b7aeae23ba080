"""Random backward passes on the CPU against float64, NaN in all memory that no query may see; the rule's own proof.

JIT_KERNEL_TEST_CASES=1500 makes so many.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from tests.support import backward, backward_cases, case_run
from tests.support.reference import Problem, Sequence

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "150"))
BATCHES = 6


@pytest.fixture(autouse=True)
def _one_thread():
    with case_run.one_thread():
        yield


@pytest.mark.parametrize("part", range(BATCHES))
def test_random_cases(part):
    worst = (0.0, "", "")
    for seed in range(part, CASES, BATCHES):
        case = backward_cases.draw(seed)
        share, where = backward.check(case.found(), case.problem, case.grad_outs, case.grad_lses)
        assert share <= 1, f"seed {seed}: {share:.2f} of the limit in {where}: {case.text}"
        worst = max(worst, (share, where, case.text))
    print(f"{worst[0]:.3f} of the limit in {worst[1]}: {worst[2]}")


@pytest.mark.parametrize("broken", backward.BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rule_refuses_mistakes(broken, dtype):
    """The formula in the dtype passes; with one mistake made it is far beyond the limit."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(70, heads, 64).to(dtype) for heads in (4, 2, 2, 4))
    grad_lse = torch.randn(4, 70)
    softcap = 5.0 if broken == "no softcap slope" else 0.0
    problem = Problem([Sequence(q, k, v)], causal=True, softcap=softcap, sinks=torch.randn(4))
    own, _ = backward.by_formula(problem.sequences[0], problem, g, grad_lse, dtype)
    wrong, _ = backward.by_formula(problem.sequences[0], problem, g, grad_lse, dtype, broken)
    assert backward.check([own], problem, [g], [grad_lse])[0] <= 1
    assert backward.check([wrong], problem, [g], [grad_lse])[0] > 2
    nothing = backward.Grads(own.q * math.nan, own.k, own.v, own.sinks)
    assert backward.check([nothing], problem, [g], [grad_lse])[0] == math.inf
