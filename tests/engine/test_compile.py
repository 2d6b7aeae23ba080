"""torch.compile(fullgraph=True) over the public functions: the same numbers as eager, and what is written is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import jit_kernel

pytestmark = pytest.mark.skipif(not jit_kernel._is_fa3_supported("cpu"), reason="no implementation serves the CPU here")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def varlen(q, k, v, offsets_q, offsets_k, used):
    out, lse = jit_kernel.flash_attn_varlen_func(
        q * 2, k, v, offsets_q, offsets_k, seqused_k=used, causal=True, softcap=20.0, return_softmax_lse=True
    )
    alone = jit_kernel.flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, window_size=(2, 0))
    return out + 1, lse, alone


def varlen_inputs(rows: int = 9):
    q, k, v = torch.randn(rows, 4, 32), torch.randn(12, 2, 32), torch.randn(12, 2, 16)
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), ints(0, 4, rows), ints(0, 5, 12), ints(3, 7)


def dense(q, k, v, sinks, out):
    result = jit_kernel.flash_attn_func(q, k, v, causal=True, sinks=sinks, out=out)
    assert result is out
    also, lse = jit_kernel.flash_attn_func(q, k, v, softmax_scale=0.2, return_softmax_lse=True)
    return result * 2, also, lse


def dense_inputs():
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 7, 2, 32), torch.randn(2, 7, 2, 16)
    return q, k, v, torch.randn(4), torch.full((2, 5, 4, 16), torch.nan)


def append(q, k_cache, v_cache, k, v, lengths, out):
    jit_kernel.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths + 1, causal=True, out=out)
    return out + 1, k_cache.clone()


def append_inputs():
    q, caches = torch.randn(2, 3, 4, 32), [torch.randn(2, 16, 2, 32) for _ in range(2)]
    return q, *caches, torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 32), ints(4, 11), torch.full_like(q, torch.nan)


def planned(q, k_cache, v_cache, lengths):
    plan = jit_kernel.get_scheduler_metadata(2, 3, 16, 4, 2, 32, lengths, qkv_dtype=torch.float32, num_splits=2)
    out = jit_kernel.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, scheduler_metadata=plan, num_splits=2
    )
    return out, jit_kernel.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)


def planned_inputs():
    return (*append_inputs()[:3], ints(4, 16))


def results(out_a, lse_a, out_b, lse_b, into):
    merged = jit_kernel.merge_state(out_a, lse_a, out_b, lse_b)
    parts, sums = torch.stack([out_a, out_b]), torch.stack([lse_a.T, lse_b.T])
    jit_kernel.flash_attn_combine(parts, sums, out=into)
    return (*merged, into + 1, *jit_kernel.flash_attn_combine(parts, sums, out_dtype=torch.bfloat16))


def results_inputs():
    return torch.randn(6, 4, 16), torch.randn(4, 6), torch.randn(6, 4, 16), torch.randn(4, 6), torch.empty(6, 4, 16)


PROGRAMS = {
    varlen: varlen_inputs,
    dense: dense_inputs,
    append: append_inputs,
    planned: planned_inputs,
    results: results_inputs,
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_compiled_is_eager(program):
    """Results are bitwise the same, and so is everything that was passed in, caches and out included."""
    eager_inputs = PROGRAMS[program]()
    inputs = [tensor.clone() for tensor in eager_inputs]
    expected = program(*eager_inputs)
    same(compiled(program)(*inputs), expected)
    same(inputs, eager_inputs)


def test_inductor_knows_what_an_append_writes():
    """The default backend reorders and reuses memory: the caches and out that it returns must be the new ones."""
    eager_inputs = append_inputs()
    inputs = [tensor.clone() for tensor in eager_inputs]
    expected = append(*eager_inputs)
    same(compiled(append, backend="inductor")(*inputs), expected)
    same(inputs, eager_inputs)
    assert not torch.equal(inputs[1], append_inputs()[1])


def test_one_graph_serves_every_length():
    counter = CompileCounterWithBackend("aot_eager")
    program = compiled(varlen, backend=counter, dynamic=True)
    counts = []
    for rows in (9, 12, 17):
        inputs = varlen_inputs(rows)
        same(program(*inputs), varlen(*inputs))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3, "a new length was compiled anew"


def test_only_an_append_declares_the_caches_written():
    schemas = {name: str(getattr(torch.ops.jit_kernel, name).default._schema) for name in ("kvcache", "kvcache_append")}
    assert "Tensor k_cache" in schemas["kvcache"]
    assert "Tensor(a!) k_cache" in schemas["kvcache_append"]
    assert all("!)? out" in schema for schema in schemas.values())


@pytest.mark.parametrize("name", ["dense", "varlen", "kvcache", "kvcache_append"])
def test_operators_match_their_schema_and_fake(name):
    """Schema and fake implementation against the real one."""
    operator = getattr(torch.ops.jit_kernel, name).default
    if name == "dense":
        q, k, v, sinks, out = dense_inputs()
        arguments = {"q": q, "k": k, "v": v, "sinks": sinks, "return_softmax_lse": True}
        writing = arguments | {"out": out}
    elif name == "varlen":
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
        arguments = dict(zip(names, varlen_inputs(), strict=True)) | {"return_softmax_lse": True}
        writing = arguments | {"out": torch.zeros(9, 4, 16, dtype=torch.bfloat16)}
    else:
        names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "out")
        writing = dict(zip(names, append_inputs(), strict=True))
        if name == "kvcache":
            writing |= {"k": None, "v": None}
        arguments = {key: value for key, value in writing.items() if key != "out"}
    for case in (arguments, writing):
        torch.library.opcheck(operator, (), case, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_raise_from_the_compiled_program():
    """Shapes, numbers and index tensors are checked when it runs, as without torch.compile."""
    program = compiled(varlen)
    q, k, v, offsets_q, offsets_k, used = varlen_inputs()
    with pytest.raises(ValueError, match="cu_seqlens_k decreases"):
        program(q, k, v, offsets_q, ints(0, 13, 12), used)
    with pytest.raises(ValueError, match="cu_seqlens_q has dtype int16"):
        program(q, k, v, offsets_q.short(), offsets_k, used)


def test_inputs_that_require_grad_are_refused_while_tracing():
    """Here those of a call with out, which is written without them."""
    q, *rest = dense_inputs()
    with pytest.raises(Exception, match="NotImplementedError") as caught:
        compiled(dense)(q.float().requires_grad_().bfloat16(), *rest)
    assert "requires grad" in str(caught.value)
    with torch.no_grad():
        compiled(dense)(q, *rest)


def test_a_traced_program_has_eagers_gradients():
    q, *rest = varlen_inputs()
    found = []
    for program in (varlen, compiled(varlen)):
        leaf = q.detach().clone().requires_grad_()
        out, lse, alone = program(leaf, *rest)
        found.append(torch.autograd.grad(out.float().sum() + lse.sum() + alone.float().sum(), leaf)[0])
    same([found[1]], [found[0]])


def test_eager_calls_never_reach_the_operators(monkeypatch):
    from jit_kernel.fa3 import torch_operators as operators

    def reached(call):
        raise AssertionError(f"an eager call became an operator: {call}")

    for name in ("attend", "plan", "combine", "merge"):
        monkeypatch.setattr(operators, name, reached)
    for program, inputs in PROGRAMS.items():
        program(*inputs())
