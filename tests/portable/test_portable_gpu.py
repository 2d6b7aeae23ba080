"""The portable implementation on an NVIDIA GPU: random cases, captured and compiled calls, promises of the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config, device, jit
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_state
from tests.support import cases, drafts, hidden, large_scores, reference

pytestmark = pytest.mark.gpu
SUPPORT = Path(__file__).resolve().parents[1] / "support"
CASES = 2000


@pytest.fixture(autouse=True)
def portable_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call of these tests takes the portable implementation."""
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "portable")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def decode_arguments(batch: int = 3, keys: int = 300, page_size: int = 16) -> dict[str, Any]:
    pages = batch * -(-keys // page_size)
    return {
        "q": normal(batch, 1, 8, 128),
        "k_cache": normal(pages, page_size, 2, 128),
        "v_cache": normal(pages, page_size, 2, 128),
        "page_table": torch.randperm(pages, device="cuda").int().view(batch, -1),
        "cache_seqlens": torch.tensor([keys, 7, keys // 2][:batch], dtype=torch.int32, device="cuda"),
        "causal": True,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_what_no_query_sees_reaches_no_result(dtype: torch.dtype, say: list[str]) -> None:
    """750 random masks: the bits that zeros give, whatever hidden keys, values, scales and pages without them hold."""
    space = cases.Space(
        "hidden", device="cuda:0", dtypes=(dtype,), head_dims=((64, 64), (128, 128), (192, 128)), any_head_dim=0,
        qv_head_dims=((64, 512),), features=cases.FEATURES | cases.FP8_CACHES, lengths=(150, 500, 2500),
    )  # fmt: skip
    functions = {name: getattr(fa3, name) for name in space.functions}
    counts = [hidden.differ(hidden.draw(seed, space), functions) for seed in range(250)]
    with_some = sum(count > 0 for count in counts)
    assert with_some > 125
    say.append(f"portable: {len(counts)} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 7, 16, 70])
@pytest.mark.parametrize("splits", [0, 1, 5])
@pytest.mark.parametrize("mask", [{}, {"window_size": (90, -1)}, {"causal": True, "softcap": 9.0}], ids=str)
def test_trees_of_draft_tokens(dtype: torch.dtype, tokens: int, splits: int, mask: dict[str, Any]) -> None:
    """Over pages and dense caches: within the rule, which a mask of another bit fails; a chain is a causal mask."""
    lengths, words, random = [700, 64, 1999], 3, torch.Generator().manual_seed(tokens)
    q = normal(3, tokens, 8, 128, dtype=dtype)
    k, v = (normal(3, 2048, 2, 128, dtype=dtype) for _ in range(2))
    table = torch.randperm(3 * 128, device="cuda", dtype=torch.int32).view(3, 128)
    pages = [x.view(-1, 16, 2, 128)[table.flatten().argsort()].contiguous() for x in (k, v)]
    options = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"), "num_splits": splits, **mask}
    seen = torch.cat([make(tokens, words, random) for make in (drafts.tree, drafts.scattered, drafts.tree)])
    for bits, right in ((seen, True), (seen.roll(1, 1), False)):
        given = drafts.pack(bits.cuda())
        for caches, more in (((k, v), {}), (tuple(pages), {"page_table": table})):
            out, lse = flash_attn_with_kvcache(q, *caches, draft_mask=given, return_softmax_lse=True, **options, **more)
            rows = drafts.pack(seen.cuda()).view(3, tokens, words)
            sequences = [
                reference.Sequence(q[i], k[i, :n], v[i, :n], draft_mask=rows[i]) for i, n in enumerate(lengths)
            ]
            shares = reference.check(list(out), list(lse), reference.Problem(sequences, **mask))
            assert (shares.worst <= 1) is right, shares
    chain = drafts.pack(drafts.chain(tokens, words).cuda()).repeat(3, 1)
    out = flash_attn_with_kvcache(q, k, v, draft_mask=chain, **options)
    causal = flash_attn_with_kvcache(q, k, v, **options | {"causal": True})
    torch.testing.assert_close(out, causal, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "heads", "dim"), [(7, 3, 64), (3000, 8, 128), (1111, 5, 200), (2500, 4, 256)])
def test_merging_is_the_formula(rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs = [normal(rows, heads, dim, dtype=dtype) for _ in "ab"]
    lses = [normal(heads, rows, dtype=torch.float32) * 5 for _ in "ab"]
    lses[0][:, ::3] = lses[1][:, 1::6] = -torch.inf
    given = [x.masked_fill((lse == -torch.inf).T[..., None], torch.nan) for x, lse in zip(outs, lses, strict=True)]
    marked = lses[1].masked_fill(lses[1] == -torch.inf, torch.inf)  # as FlashAttention-2 marks a part over no key
    out, lse = merge_state(given[0], lses[0], given[1], marked)
    expected_lse = torch.logaddexp(lses[0].double(), lses[1].double())
    weights = [torch.exp(each.double() - expected_lse).nan_to_num().mT[..., None] for each in lses]
    expected = weights[0] * outs[0].double() + weights[1] * outs[1].double()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)


def test_random_cases(say: list[str]) -> None:
    processes = max(1, min(12, device.cpu_count() - 2))
    share = -(-CASES // processes)
    children = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "portable_on_gpu.py"), str(i * share), str(share)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    count, worst = 0, [0.0, 0.0, 0.0]
    for child in children:
        out, err = child.communicate(timeout=1500)
        assert child.returncode == 0, err[-6000:]
        for line in out.splitlines():
            if line.startswith("case "):
                count += 1
                worst = [max(a, float(b)) for a, b in zip(worst, line.split()[2:], strict=True)]
    assert count >= CASES
    assert max(worst) <= 1
    say.append(f"portable kernels on {torch.cuda.get_device_name()}: {count} cases, worst row, maximum, lse {worst}")


def absorbed_arguments() -> dict[str, Any]:
    """decode_arguments of absorbed MLA: one head of keys, whose first 512 are the values."""
    arguments = decode_arguments()
    rows = normal(*arguments["k_cache"].shape[:2], 1, 576)
    caches = {"k_cache": rows[..., 512:], "v_cache": rows[..., :512]}
    return arguments | caches | {"q": normal(3, 1, 16, 64), "qv": normal(3, 1, 16, 512)}


def mixed_arguments() -> dict[str, Any]:
    """decode_arguments over a cache in e4m3, with a scale of each token."""
    arguments = decode_arguments()
    caches = {name: arguments[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    shape = arguments["k_cache"].shape[:-1]
    scales = {name: 0.5 + torch.rand(shape, device="cuda") for name in ("k_scale", "v_scale")}
    return arguments | caches | scales


@pytest.mark.parametrize("make", [decode_arguments, absorbed_arguments, mixed_arguments])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_a_captured_call_replays_on_new_lengths(num_splits: int, make: Callable[[], dict[str, Any]]) -> None:
    arguments = make() | {"num_splits": num_splits}
    eager = flash_attn_with_kvcache(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attn_with_kvcache(**arguments)
    graph.replay()
    assert torch.equal(captured, eager)
    arguments["cache_seqlens"].copy_(torch.tensor([5, 200, 31], dtype=torch.int32))
    arguments["q"].normal_()
    graph.replay()
    assert torch.equal(captured, flash_attn_with_kvcache(**arguments))


def test_a_first_call_may_be_captured() -> None:
    q = normal(1, 40, 2, 72)  # a head size that no other test uses: its kernel is loaded inside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attn_func(q, q, q)
    graph.replay()
    assert torch.equal(captured, flash_attn_func(q, q, q))


def test_torch_compile_in_one_graph() -> None:
    q, k, v = normal(2, 100, 8, 64), normal(2, 100, 2, 64), normal(2, 100, 2, 64)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(block, fullgraph=True)
    assert torch.equal(compiled(q, k, v), block(q, k, v))


def test_no_call_waits_for_the_device() -> None:
    arguments = decode_arguments() | {"k": normal(3, 1, 2, 128), "v": normal(3, 1, 2, 128)}
    q, lengths = normal(60, 4, 64), starts([20, 40])

    def calls() -> None:
        for num_splits in (0, 1, 4):
            flash_attn_with_kvcache(**arguments, num_splits=num_splits)
        flash_attn_varlen_func(q, q, q, lengths, lengths, causal=True)

    calls()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_call_runs_on_the_current_stream() -> None:
    q = normal(1, 2000, 8, 128)
    expected = flash_attn_func(q, q, q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what follows on this stream waits for it, what does not is seen
        late = torch.empty_like(q)
        late.copy_(q)
        out = flash_attn_func(late, late, late)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("settings", [{"causal": True}, {"window_size": (100, 9)}, {"softcap": 9.0}], ids=str)
def test_a_sequence_has_the_same_bits_in_any_company(settings: dict[str, Any]) -> None:
    lengths_q, lengths_k = [1, 700, 33, 128, 5, 260], [900, 700, 50, 333, 77, 1000]
    q, k, v = normal(sum(lengths_q), 8, 128), normal(sum(lengths_k), 2, 128), normal(sum(lengths_k), 2, 128)
    together = flash_attn_varlen_func(q, k, v, starts(lengths_q), starts(lengths_k), 700, 1000, **settings)
    again = flash_attn_varlen_func(q, k, v, starts(lengths_q), starts(lengths_k), 4000, None, **settings)
    assert torch.equal(together, again)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), together.split(lengths_q), strict=True)
    for one_q, one_k, one_v, expected in parts:
        alone = flash_attn_varlen_func(
            one_q, one_k, one_v, starts([len(one_q)]), starts([len(one_k)]), len(one_q), len(one_k), **settings
        )
        assert torch.equal(alone, expected)


def test_offsets_past_two_to_the_31st() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    page_size, heads, d = 64, 8, 128
    pages = 2**31 // (page_size * heads * d) + 100  # more than 2^31 elements
    k_cache = torch.empty(pages, page_size, heads, d, device="cuda", dtype=torch.bfloat16)
    v_cache = torch.empty_like(k_cache)
    table = torch.tensor([[pages - 1, 3, pages - 2]], dtype=torch.int32, device="cuda")
    for page in table[0].tolist():
        k_cache[page].normal_()
        v_cache[page].normal_()
    q, lengths = normal(1, 1, 16, d), torch.tensor([150], dtype=torch.int32, device="cuda")
    far = flash_attn_with_kvcache(q, k_cache, v_cache, page_table=table, cache_seqlens=lengths)
    rows = table[0].long()
    near = flash_attn_with_kvcache(
        q, k_cache[rows], v_cache[rows], page_table=torch.arange(3, device="cuda").int()[None], cache_seqlens=lengths
    )
    assert torch.equal(far, near)


_WARM = """
import sys
from importlib.machinery import PathFinder

class WithoutTriton:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutTriton if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from jit_kernel import jit
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_with_kvcache
q = torch.randn(2, 64, 8, 64, device="cuda", dtype=torch.bfloat16)
flash_attn_func(q, q, q, causal=True)
flash_attn_with_kvcache(q[:, :1], q, q, cache_seqlens=30, num_splits=3)
torch.cuda.synchronize()
print([event.action for event in jit.events()])
"""


def test_a_warmed_machine_compiles_nothing_and_needs_no_triton(tmp_path: Path) -> None:
    environment = {**os.environ, "JIT_KERNEL_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    target = str(device.device_target("cuda:0"))
    selected = ["head_dim=64", "head_dim_v=64", "dtype=bf16", "local=False", "softcap=False", "paged=False"]
    command = [sys.executable, "-m", "jit_kernel.warmup", "--target", target, "--select", *selected]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    done = subprocess.run([sys.executable, "-c", _WARM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    actions = done.stdout.strip().splitlines()[-1]
    assert "loaded" in actions
    assert "compiled" not in actions


def test_what_it_does_not_serve_is_an_error_before_anything_is_written() -> None:
    q = normal(1, 8, 2, 64, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="bf16, fp16 and e4m3"):
        flash_attn_func(q, q, q)
    wide = normal(1, 8, 2, 520)
    with pytest.raises(NotImplementedError, match="up to 512"):
        flash_attn_func(wide, wide, wide)
    assert not any("520" in str(event.spec) for event in jit.events())


@pytest.mark.parametrize("case", large_scores.GPU_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores(case: large_scores.Case, dtype: torch.dtype) -> None:
    """A huge scale, or huge products q·k: one-hot or shared weights, and no NaN."""
    for sq, sk in ((1, 300), (3, 2500), (9, 70), (150, 150), (150, 600)):
        for d, paged in ((64, False), (128, True)):
            wrong = large_scores.faults(case, dtype, sq, sk, paged=paged, device="cuda", d=d, splits=1)
            assert not wrong, f"{sq} queries, {sk} keys, head size {d}, paged {paged}: {wrong}"
