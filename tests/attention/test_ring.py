"""Context parallelism on gloo with several processes, in every form, and the sharding that it rests on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import jit_kernel
from jit_kernel.attention import (
    AttentionLayer,
    Prefix,
    all_gather_attention,
    all_to_all_attention,
    backend_name,
    context_attention,
    plan_context,
    plan_ring,
    ring_attention,
)
from jit_kernel.attention.parallel import exchange, zigzag
from jit_kernel.attention.parallel.choice import FORMS, choose
from jit_kernel.commands import why
from tests.support import ring_worker
from tests.support.ring_worker import CASES, spawned


@pytest.mark.parametrize(("world_size", "cases"), [(2, 120), (3, 60), (4, 60), (8, 16)])
def test_processes_give_what_one_call_gives(world_size: int, cases: int, tmp_path: Path, say: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # compiled here, once, and not by every process
        x = torch.zeros(1, 1, 1, 64, dtype=dtype)
        jit_kernel.flash_attn_func(q=x, k=x, v=x, softmax_scale=1.0)
    cases = CASES or cases
    spawned(ring_worker.run, world_size, cases, folder=tmp_path)
    worst = json.loads((tmp_path / "worst.json").read_text())
    say.append(f"context parallelism, {world_size} processes, {cases} cases: worst shares {worst}")
    assert all(0.0 < share <= 1.0 for share in worst.values())


# Each takes four processes and, where a rank is late, the time to miss it: without JIT_KERNEL_TEST_CASES a part.
_LATE = FORMS if CASES else FORMS[:1]


@pytest.mark.parametrize(("form", "how"), [(f, "dies") for f in FORMS] + [(f, "is late") for f in _LATE])
def test_a_rank_that_does_not_come_is_named(form: str, how: str, tmp_path: Path) -> None:
    spawned(ring_worker.run_without, 4, form, how, folder=tmp_path)
    told = {rank: (tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 2, 3)}
    for rank, text in told.items():
        assert text.startswith(f"RankError 1: rank {rank} got nothing from rank 1 in context parallelism"), told
    # The rank that is late lives until the others have ended, so nobody was told by a connection that closed.
    assert how == "dies" or (tmp_path / "rank1.txt").read_text() == "was there", told


@pytest.fixture
def alone(tmp_path: Path):
    """A group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("form", ["ring", "all_to_all", "all_gather"])
def test_one_rank_alone(alone, form: str) -> None:
    for seed in range(20):
        lengths, layer, problem, whole, before = ring_worker.case(seed, form)
        heads = whole[0].shape[1], whole[1].shape[1]
        plan = plan_context(lengths, layer, heads, 64, whole[0].device, form=form)
        # A rank's share of [prev | next] is the whole sequence in order.
        out, lse = context_attention(*whole, plan, layer, prefix=before, return_softmax_lse=True)
        ring_worker.judged(out, lse, lengths, problem)


def test_what_cannot_be_split_is_refused(alone) -> None:
    q = torch.zeros(8, 2, 64)
    for layer in (AttentionLayer(window_size=(4, 0)), AttentionLayer(attention_chunk=4)):
        with pytest.raises(NotImplementedError, match="a rank's keys are not one run of the sequence"):
            ring_attention(q, q, q, [8], layer)
    with pytest.raises(NotImplementedError, match="and no causal mask"):
        all_gather_attention(q, q, q, [8], AttentionLayer(causal=False, window_size=(4, 2)))
    with pytest.raises(ValueError, match="plan was made for lengths"):
        ring_attention(q, q, q, [8], plan=plan_ring([4, 4], True, q.device))
    other = dataclasses.replace(plan_ring([8], True, q.device), rank=1, size=2)
    with pytest.raises(ValueError, match=r"rank 1 of 2 on cpu; the call has .* rank 0 of 1 on cpu"):
        ring_attention(q, q, q, [8], plan=other)
    before = Prefix(torch.zeros(1, 4, 2, 64), torch.zeros(1, 4, 2, 64), torch.tensor([4], dtype=torch.int32))
    for function in (all_gather_attention, all_to_all_attention):
        with pytest.raises(NotImplementedError, match=r"prefix with window_size \(4, 0\)"):
            function(q, q, q, [8], AttentionLayer(window_size=(4, 0)), prefix=before)
    two = Prefix(torch.zeros(2, 4, 2, 64), torch.zeros(2, 4, 2, 64), torch.tensor([4, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="cache_seqlens has 2 sequences; it must have 1, or 1 that all share"):
        ring_attention(q, q, q, [8], prefix=two)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"lengths": [9]}, ValueError, "q has 8 tokens; rank 0 of 1 holds 9"),
        ({"v": torch.zeros(9, 2, 64)}, ValueError, "v has 9 tokens; rank 0 of 1 holds 8"),
        ({"v": torch.zeros(8, 1, 64)}, ValueError, "v has 1 heads; it must have k's, 2"),
        ({"k": torch.zeros(8, 2, 32)}, ValueError, "k has a head size of 32; it must be q's, 64"),
        (
            {"k": torch.zeros(8, 3, 64), "v": torch.zeros(8, 3, 64)},
            ValueError,
            "k has 3 heads; their number must divide",
        ),
        ({"k": torch.zeros(8, 128)}, ValueError, "k has 2 dimensions; it must have 3"),
        ({"k": torch.zeros(8, 2, 64, dtype=torch.float16)}, TypeError, "k is torch.float16 on cpu; it must be"),
        (
            {name: torch.zeros(8, 2, 64).to(torch.float8_e4m3fn) for name in "qkv"},
            TypeError,
            "context parallelism serves",
        ),
        ({"layer": AttentionLayer(sinks=torch.zeros(3))}, ValueError, r"sinks has shape \(3,\); it must be \(2,\)"),
    ],
)
@pytest.mark.parametrize("function", [ring_attention, all_gather_attention, all_to_all_attention])
def test_a_bad_argument_is_named_before_anything_is_sent(
    alone, monkeypatch: pytest.MonkeyPatch, function, change: dict[str, object], error: type[Exception], text: str
) -> None:
    monkeypatch.setattr(exchange, "transport_of", lambda *_: pytest.fail("something was sent"))
    q = torch.zeros(8, 2, 64)
    given = {"q": q, "k": q, "v": q, "lengths": [8], "layer": AttentionLayer(), **change}
    with pytest.raises(error, match=text):
        function(**given)


def test_a_choice_says_how_it_was_made() -> None:
    causal = AttentionLayer()

    def chosen(lengths: list[int], layer: AttentionLayer, heads: tuple[int, int], **options: object) -> str:
        return choose(lengths, layer, heads, 128, 4, **options).form

    assert chosen([131072], causal, (32, 8)) == "ring"  # a step's call hides its exchange
    assert chosen([2048], causal, (32, 8)) == "all_to_all"  # nothing to hide behind
    windowed = AttentionLayer(window_size=(4096, 0))
    assert chosen([131072], windowed, (32, 32)) == "all_to_all"
    assert chosen([131072], windowed, (32, 8)) == "all_gather"  # few key heads: their keys are less than all queries
    found = choose([2048], causal, (30, 10), 128, 4)
    assert found.reasons["all_to_all"] == "q has 30 heads, which 4 does not divide"
    assert "all_to_all: q has 30 heads, which 4 does not divide" in found.explain()
    with pytest.raises(NotImplementedError, match="form 'all_to_all': q has 30 heads, which 4 does not divide"):
        choose([2048], causal, (30, 10), 128, 4, form="all_to_all")
    with pytest.raises(NotImplementedError, match="no form serves the layer: ring: a rank's keys"):
        choose([2048], AttentionLayer(causal=False, window_size=(9, 9)), (30, 10), 128, 4)
    with pytest.raises(ValueError, match="form is 'star'; it must be None or one of ring"):
        choose([2048], causal, (32, 8), 128, 4, form="star")
    with pytest.raises(ValueError, match="inner is 3; it must divide the 4 ranks"):
        choose([2048], causal, (32, 8), 128, 4, inner=3)


def test_a_plan_says_which_way_tensors_take(alone) -> None:
    plan = plan_context([2048], AttentionLayer(), (4, 2), 64, torch.device("cpu"))
    assert "exchange: gloo, because a rank alone has nobody to exchange with" in plan.explain()


def test_the_pages_example_runs(alone) -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text().split("## Context parallelism", 1)[1]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    q, k, v = (torch.randn(300, heads, 128) for heads in (32, 8, 8))
    scope = {"q": q, "k": k, "v": v, "device": q.device, "group": None}
    exec(code[1].replace("24000, 8768", "200, 100"), scope)
    alone = torch.tensor([0, 200, 300], dtype=torch.int32)
    expected = jit_kernel.flash_attn_varlen_func(q, k, v, alone, alone, 200, 200, causal=True)
    assert torch.equal(scope["out"], expected)


def test_why_explains_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--ranks", "4", "--lengths", "2048,100", "--heads", "30,10", "--head-dim", "128"]
    assert why.main([*of, "--causal"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("all_gather (ranks that share heads: 1)\n")
    assert "all_to_all: q has 30 heads, which 4 does not divide" in said
    assert "tokens of a rank: 537 to 537" in said
    assert why.main([*of, "--window-size", "9,9"]) == 1
    assert "no form serves the layer: ring: a rank's keys" in capsys.readouterr().err
    for wrong in (["--inner", "3"], ["--ranks=0"], ["--heads", "32,0"], ["--heads", "30,8"]):
        assert why.main([*of, *wrong]) == 2
        assert "must" in capsys.readouterr().err
    assert why.main([*of, "--inner", "3"]) == 2
    assert "inner is 3; it must divide the 4 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(("world_size", "inner"), [(1, 1), (2, 1), (3, 1), (8, 1), (4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize("lengths", [[0], [1], [7], [64], [5, 0, 33], [128, 1], [9] * 40, [3, 17, 1] * 9])
def test_shares_are_a_partition_of_equal_work(world_size: int, inner: int, lengths: list[int]) -> None:
    whole = torch.arange(sum(lengths))
    parts = [zigzag.shard(whole, lengths, rank, world_size, inner) for rank in range(world_size)]
    assert torch.equal(zigzag.unshard(parts, lengths, inner), whole)
    assert zigzag.rows_of(lengths, world_size, inner) == [len(part) for part in parts]
    rings = world_size // inner
    shares = [zigzag.share_of(lengths, rank, rings) for rank in range(rings)]
    totals = [share.total for share in shares]
    assert max(totals) - min(totals) <= 1, "a batch of many sequences is as even as one"
    work = [sum(sum(range(a + 1, b + 1)) for half in (s.prev, s.next) for a, b in half) for s in shares]
    # Chunks differ by one token at most, so a rank's causal work differs by less than two rows a sequence.
    assert max(work) - min(work) <= 2 * len(lengths) * max([*lengths, 1])


def test_backends_by_name() -> None:
    assert [backend_name(kind) for kind in ("cpu", "cuda:1", "musa:0")] == ["gloo", "nccl", "mccl"]
    assert backend_name(torch.device("cuda", 0)) == "nccl"
    with pytest.raises(ValueError, match="it must be one of cpu, cuda, musa"):
        backend_name("xpu")
