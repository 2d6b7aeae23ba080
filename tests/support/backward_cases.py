"""Random backward passes on the CPU: the call, its hidden memory full of NaN, and what it stands for, by sequence."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attn_func, flash_attn_varlen_func
from tests.support.backward import Grads
from tests.support.reference import Problem, Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("dense", "dense", "ragged", "ragged", "used", "ragged used", "dense queries", "dense keys")


@dataclass
class Case:
    """A call of a public function, the inputs that require grad, and the rows of each sequence in them."""

    text: str
    function: Any
    arguments: dict[str, Any]
    problem: Problem
    rows: list[tuple[Any, Any]]  # by sequence, where its queries and its keys lie
    grad_outs: list[Tensor]
    grad_lses: list[Tensor | None]
    grads: tuple[Tensor, Tensor | None]  # of out and of lse

    def found(self) -> list[Grads]:
        """The gradients by the function under test, by sequence; raises AssertionError where hidden rows have some."""
        inputs = [self.arguments[name] for name in ("q", "k", "v", "sinks") if self.arguments[name] is not None]
        result = self.function(**self.arguments)
        out, lse = result if isinstance(result, tuple) else (result, None)
        outputs, wanted = [out], [self.grads[0]]
        if lse is not None and self.grads[1] is not None:
            outputs, wanted = [out, lse], [self.grads[0], self.grads[1]]
        dq, dk, dv, *rest = torch.autograd.grad(outputs, inputs, wanted)
        split = [
            Grads(dq[of_q], dk[of_k], dv[of_k], rest[0] if rest and at == 0 else None)
            for at, (of_q, of_k) in enumerate(self.rows)
        ]
        for whole, side in ((dq, 0), (dk, 1), (dv, 1)):
            left = whole.clone()
            for where in self.rows:
                left[where[side]] = 0
            assert not left.any(), "rows of no sequence have a gradient"
        return split


def draw(seed: int) -> Case:
    """One case; the same for one seed."""
    dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = dice.choice(DTYPES)
    d = dice.choice((8, 16, 32, 40, 64, 64, 96, 128, 128, 192, 256, dice.randint(1, 130)))
    dv = d if dice.random() < 0.6 else dice.choice((8, 24, 64, 128, dice.randint(1, 130)))
    hk, group = dice.choice((1, 2, 3)), dice.choice((1, 1, 2, 4))
    batch, longest = dice.choice((1, 2, 3)), dice.choice((5, 40, 120, 230))
    form = dice.choice(FORMS)
    lengths = [(dice.randint(0, longest), dice.randint(0, longest)) for _ in range(batch)]
    if dice.random() < 0.3:  # as in self-attention
        lengths = [(sq, sq) for sq, _ in lengths]
    if form == "dense":
        lengths = [(max(1, lengths[0][0]), max(1, lengths[0][1]))] * batch
    options: dict[str, Any] = {
        "causal": dice.random() < 0.5,
        "window_size": (dice.choice((-1, 0, 7, 60)), dice.choice((-1, 0, 5, 40))) if dice.random() < 0.4 else (-1, -1),
        "attention_chunk": dice.choice((3, 32, 100)) if dice.random() < 0.2 else 0,
        "softcap": dice.choice((1.0, 5.0, 30.0)) if dice.random() < 0.25 else 0.0,
    }
    scale = dice.choice((None, None, 0.05, 0.5))
    sinks = torch.randn(hk * group, generator=numbers) * 2 if dice.random() < 0.3 else None
    if sinks is not None and dice.random() < 0.5:
        sinks = sinks.to(dtype)
    with_lse = dice.random() < 0.4
    text = f"{form} {str(dtype)[6:]} d {d}/{dv} heads {hk * group}/{hk} {lengths} {options} sinks {sinks is not None}"
    made = _Layout(dice, numbers, dtype, form, lengths)
    side_q, side_k = ("q", 0), ("k", 1)
    q, of_q = made.rows(side_q, hk * group, d)
    k, of_k = made.rows(side_k, hk, d)
    v, _ = made.rows(side_k, hk, dv)
    grad, _ = made.rows(side_q, hk * group, dv)
    heads_first = (*q.shape[:-3], hk * group, q.shape[-3])
    grad_lse = torch.full(heads_first, float("nan")) if with_lse else None
    grad_lses: list[Tensor | None] = []
    for where in of_q:
        if grad_lse is None:
            grad_lses.append(None)
            continue
        lead, rows = (where[0], where[1]) if isinstance(where, tuple) else (..., where)
        part = grad_lse[lead, :, rows] if lead is not ... else grad_lse[:, rows]
        part.copy_(torch.randn(part.shape, generator=numbers))
        grad_lses.append(part)
    problem = Problem(
        [Sequence(q[a], k[b], v[b]) for a, b in zip(of_q, of_k, strict=True)], scale, sinks=sinks, **options
    )
    grad_outs = [grad[where] for where in of_q]
    arguments = {
        "q": q, "k": k, "v": v, "softmax_scale": scale, "return_softmax_lse": with_lse, "sinks": sinks, **options,
    }  # fmt: skip
    for name in ("q", "k", "v", "sinks"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().clone().requires_grad_()
    if form != "dense":
        arguments |= made.indices()
    function = flash_attn_func if form == "dense" else flash_attn_varlen_func
    return Case(
        text, function, arguments, problem, list(zip(of_q, of_k, strict=True)), grad_outs, grad_lses, (grad, grad_lse)
    )


class _Layout:
    """Where the rows of sequences lie: each side dense or ragged, with room that holds NaN."""

    def __init__(
        self,
        dice: random.Random,
        numbers: torch.Generator,
        dtype: torch.dtype,
        form: str,
        lengths: list[tuple[int, int]],
    ) -> None:
        self.numbers, self.dtype, self.lengths = numbers, dtype, lengths
        self.is_ragged = {
            "q": form not in ("dense", "used", "dense queries"),
            "k": form not in ("dense", "used", "dense keys"),
        }
        self.is_used = {
            side: form in ("used", "ragged used") or (not self.is_ragged[side] and form != "dense") for side in "qk"
        }
        self.room = {
            side: [each[at] + (dice.randint(0, 9) if self.is_used[side] else 0) for each in lengths]
            for at, side in enumerate("qk")
        }
        self.behind = {side: dice.choice((0, 3)) for side in "qk"}

    def rows(self, side: tuple[str, int], heads: int, d: int) -> tuple[Tensor, list[Any]]:
        """A tensor of one side, and where each sequence's rows lie in it."""
        name, at = side
        room = self.room[name]
        if self.is_ragged[name]:
            starts = [0, *itertools.accumulate(room)]
            shape: tuple[int, ...] = (starts[-1] + self.behind[name], heads, d)
            where: list[Any] = [slice(a, a + each[at]) for a, each in zip(starts, self.lengths, strict=False)]
        else:
            shape = (len(room), max(room), heads, d)
            where = [(b, slice(0, each[at])) for b, each in enumerate(self.lengths)]
        made = torch.full(shape, float("nan"), dtype=self.dtype)
        for each in where:
            made[each] = torch.randn(made[each].shape, generator=self.numbers).to(self.dtype)
        return made, where

    def indices(self) -> dict[str, Any]:
        """The index tensors of flash_attn_varlen_func."""
        given: dict[str, Any] = {"cu_seqlens_q": None, "cu_seqlens_k": None}
        for at, side in enumerate("qk"):
            if self.is_ragged[side]:
                starts = [0, *itertools.accumulate(self.room[side])]
                given[f"cu_seqlens_{side}"] = torch.tensor(starts, dtype=torch.int32)
            if self.is_used[side]:
                given[f"seqused_{side}"] = torch.tensor([each[at] for each in self.lengths], dtype=torch.int32)
        return given
