"""The Hopper kernels in e4m3 on the GPU that they are for: numbers, long contexts, factors, bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config, device
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.hopper import prefill
from tests.support import case_run, cases, hidden, large_scores, reference
from tests.support.hopper_inputs import starts

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
NAN = 0x7F  # e4m3's
# Sequences around the kernels' tiles of 128 queries and of 64 and 128 keys.
SPACE = cases.Space(
    "hopper e4m3",
    device="cuda",
    dtypes=(FP8,),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    any_head_dim=256,
    head_dim_step=16,
    qv_head_dims=(),
    functions=(cases.VARLEN, cases.DENSE),
    features=cases.FEATURES
    - {"paged", "append", "new_ragged", "rotary", "batch_idx", "leftpad", "qv", "only_qv", "splits", "odd_head_size"}
    - {"draft_mask"},
    lengths=(150, 500, 1500),
    stride_step=16,
)
CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
FUNCTIONS = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.DENSE)}


def transpose_inside(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """Every call's values are transposed by the attention kernel, or by one before it where there is a variant."""

    def prepares(call: Call) -> bool:
        size = hopper_kernels.padded_fp8(call.q.shape[-1], call.v.shape[-1])
        return not inside and size in hopper_kernels.PREPARED_HEAD_DIMS

    monkeypatch.setattr(prefill, "prepares", prepares)


@pytest.fixture(autouse=True)
def _hopper_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call goes to the Hopper kernels, or fails; values are prepared however few query rows there are."""
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "hopper")
    config.reload()
    transpose_inside(monkeypatch, False)
    yield
    monkeypatch.undo()
    config.reload()


def rand8(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") + mean).to(FP8)


@pytest.mark.parametrize(("free", "inside"), [(0, False), (120, True), (131, False)])
def test_random_cases(free: int, inside: bool, monkeypatch: pytest.MonkeyPatch, say: list[str]) -> None:
    """With multiprocessors left free, few blocks take many tiles each, one after the other."""
    transpose_inside(monkeypatch, inside)
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    seeds = range(free * CASES, free * CASES + CASES)
    worst = max(case_run.judge(cases.draw(seed, SPACE), functions).worst for seed in seeds)
    say.append(f"hopper e4m3: {CASES} random cases, {free} multiprocessors left free, worst share {worst:.3f}")


@pytest.mark.parametrize(("free", "inside"), [(0, False), (131, True)])
def test_what_no_query_sees_reaches_no_result(
    free: int, inside: bool, monkeypatch: pytest.MonkeyPatch, say: list[str]
) -> None:
    transpose_inside(monkeypatch, inside)
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    counts = [hidden.differ(hidden.draw(seed, SPACE), functions) for seed in range(free * 300, free * 300 + 300)]
    with_some = sum(count > 0 for count in counts)
    assert with_some > 150
    say.append(f"hopper e4m3: {len(counts)} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("keys", [4096, 131072])
@pytest.mark.parametrize("d", hopper_kernels.FP8_HEAD_DIMS)
def test_long_contexts_keep_their_accuracy(d: int, keys: int, mean: float, say: list[str]) -> None:
    """Error at most 1.2 times that of sums in float32, by norm: tensor cores alone keep some 14 bits of a sum.

    Values whose mean is not 0 make sums that grow with every key.
    """
    torch.manual_seed(1)
    q, k, v = rand8(1, 128, 1, d), rand8(1, keys, 1, d), rand8(1, keys, 1, d, mean=mean)
    sequence, problem = reference.Sequence(q[0], k[0], v[0]), reference.Problem([])
    ref = reference.attend(reference.Sequence(*(x[0].double() for x in (q, k, v))), problem, torch.float64)[0]
    ours = float((fa3.flash_attn_func(q, k, v)[0].double() - ref).norm())
    emulated = float((reference.emulate_fp8(sequence, problem).double() - ref).norm())
    assert ours <= 1.2 * emulated
    say.append(f"hopper e4m3, d {d}, {keys} keys, values around {mean}: {ours / emulated:.3f} of the emulation's error")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "dv"), [(256, 256), (208, 48), (16, 240)])
def test_values_transposed_before_or_inside_give_the_same_bits(
    d: int, dv: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    lengths_q, lengths_k = [1, 0, 130, 300, 64, 5], [700, 90, 0, 129, 128, 1000]
    q, k, v = rand8(sum(lengths_q), 4, d), rand8(sum(lengths_k), 2, d), rand8(sum(lengths_k), 2, dv)
    results = []
    for inside in (False, True):
        transpose_inside(monkeypatch, inside)
        results += fa3.flash_attn_varlen_func(
            q, k, v, starts(lengths_q), starts(lengths_k), causal=causal, return_softmax_lse=True
        )
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", hopper_kernels.FP8_HEAD_DIMS)
def test_a_sequence_alone_is_bitwise_the_one_in_a_batch(d: int, causal: bool) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(1, 700, (64,)).tolist()
    total = sum(lengths)
    q, k, v = rand8(total, 4, d), rand8(total, 2, d), rand8(total, 2, d)
    cu = starts(lengths)
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=causal, return_softmax_lse=True)
    for i in range(0, 64, 7):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        alone, alone_lse = fa3.flash_attn_func(
            q[None, rows], k[None, rows], v[None, rows], causal=causal, return_softmax_lse=True
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone_lse[0], lse[:, rows])


def test_the_same_call_a_thousand_times_gives_the_same_bits() -> None:
    torch.manual_seed(2)
    lengths = [1, 900, 64, 300, 0, 129]
    q, k, v = (rand8(sum(lengths), heads, 128) for heads in (8, 2, 2))
    cu = starts(lengths)
    first = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
    for _ in range(1000):
        assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True), first)


@pytest.mark.parametrize("d", hopper_kernels.FP8_HEAD_DIMS)
def test_a_query_that_is_nan_gives_nan_in_its_row_alone(d: int) -> None:
    q, k, v = (rand8(1, 300, 2, d) for _ in "qkv")
    clean, clean_lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    q.view(torch.uint8)[0, 200, 1, 7] = NAN
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert out[0, 200, 1].isnan().all()
    assert lse[0, 1, 200].isnan()
    clean[0, 200, 1], clean_lse[0, 1, 200] = out[0, 200, 1], lse[0, 1, 200]
    assert torch.equal(out.nan_to_num(9.0), clean.nan_to_num(9.0))
    assert torch.equal(lse.nan_to_num(9.0), clean_lse.nan_to_num(9.0))


@pytest.mark.parametrize("d", hopper_kernels.FP8_HEAD_DIMS)
def test_a_value_that_is_nan_reaches_every_row_that_sees_it(d: int) -> None:
    q, k, v = (rand8(1, 300, 2, d) for _ in "qkv")
    clean = fa3.flash_attn_func(q, k, v, causal=True)
    v.view(torch.uint8)[0, 256, 1, 3] = NAN
    out = fa3.flash_attn_func(q, k, v, causal=True)
    assert out[0, 256:, 1, 3].isnan().all()
    # Rows of the same tile may have it too: a probability of 0 times NaN. A tile has 128 queries.
    assert torch.equal(out[0, :256], clean[0, :256])
    assert torch.equal(out[0, :, 0], clean[0, :, 0])


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_factors_of_each_sequence_and_head(d: int, softcap: float) -> None:
    """Factors of 0, below 0, tiny and huge: as the formula has them, one for each sequence and key head."""
    torch.manual_seed(4)
    q, k, v = rand8(5, 200, 4, d), rand8(5, 300, 2, d), rand8(5, 300, 2, d)
    q_factors = torch.tensor([[1.5, 0.0], [-1.0, 0.5], [1e-30, 1.0], [2.0, 1e30], [0.25, 4.0]], device="cuda")
    k_factors = torch.tensor([[0.5, 3.0], [1.0, -2.0], [1e-12, -0.0], [0.3, 1e-30], [1.0, 0.1]], device="cuda")
    v_factors = torch.tensor([[2.0, -1.0], [0.0, 1e-3], [1e3, 0.7], [1.0, 1.0], [-0.5, 0.1]], device="cuda")
    factors = {"q_descale": q_factors, "k_descale": k_factors, "v_descale": v_factors}
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, softcap=softcap, return_softmax_lse=True, **factors)
    made = [
        reference.Sequence(q[i], k[i], v[i], q_descale=q_factors[i], k_descale=k_factors[i], v_descale=v_factors[i])
        for i in range(5)
    ]
    for i, sequence in enumerate(made):
        problem = reference.Problem([sequence], causal=True, softcap=softcap)
        assert reference.check([out[i]], [lse[i]], problem).worst <= 1


def test_a_row_that_sees_no_key_is_zero_whatever_the_factors() -> None:
    q, k, v = rand8(1, 200, 2, 128), rand8(1, 100, 2, 128), rand8(1, 100, 2, 128)
    bad = torch.full((1, 2), math.nan, device="cuda")
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True, v_descale=bad)
    assert not bool(out[0, :100].count_nonzero())
    assert bool((lse[0, :, :100] == -math.inf).all())
    assert out[0, 100:].isnan().all()
    assert lse[0, :, 100:].isfinite().all()


@pytest.mark.parametrize("case", large_scores.GPU_CASES, ids=str)
def test_large_scores(case: large_scores.Case) -> None:
    """A huge scale, or huge products q·k: one-hot or shared weights, and no NaN."""
    for sq, sk in ((1, 300), (9, 70), (150, 150), (150, 600), (400, 1000)):
        for d in (64, 128, 256):
            wrong = large_scores.faults(case, FP8, sq, sk, paged=False, device="cuda", d=d, splits=1)
            assert not wrong, f"{sq} queries, {sk} keys, head size {d}: {wrong}"


@pytest.mark.parametrize("d", [128, 256])
def test_a_captured_call_replays_on_new_inputs(d: int) -> None:
    torch.manual_seed(6)
    q, k, v = (rand8(2, 500, 4, d) for _ in range(3))
    factor = torch.full((2, 4), 0.5, device="cuda")
    out = torch.empty(q.shape, dtype=torch.bfloat16, device="cuda")
    call = partial(fa3.flash_attn_func, q, k, v, causal=True, q_descale=factor)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for i in range(5):
        for x in (q, k, v):
            x.copy_(rand8(*x.shape))
        factor.fill_(0.5 + i)
        expected = call()
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected)
