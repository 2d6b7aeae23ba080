"""What holds for every op: its files, torch.compile, no rows, more than 2^31 numbers, devices without kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from jit_kernel import config, ops
from tests.support.ops import DEVICES

ROOT = config.package_dir().parent


@pytest.mark.parametrize("op", ops.__all__)
def test_an_op_is_three_files_and_a_line(op):
    python = ROOT / "jit_kernel" / "ops" / f"{op}.py"
    assert len(python.read_text(encoding="utf-8").splitlines()) <= 80
    assert (config.kernel_sources_dir() / "ops" / f"{op}.h").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    page = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert len([line for line in page.splitlines() if line.startswith(f"| `{op}(")]) == 1


def everything(x: Tensor, weight: Tensor, cos: Tensor, positions: Tensor, slots: Tensor, table: Tensor) -> list[Tensor]:
    """All ops, one behind the other, with something of torch's between them."""
    residual = x * 0.5
    normed = ops.rms_norm(x + 1.0, weight, residual=residual)
    gated = ops.silu_and_mul(normed)
    heads = gated.view(len(x), 2, -1)
    q, k = ops.apply_rope(heads, heads * 2.0, cos, cos, positions, q_weight=weight[: heads.shape[2]])
    cache = torch.zeros(4, 2, *heads.shape[1:], dtype=x.dtype, device=x.device)
    ops.store_kv(k, q, cache, cache_v := cache.clone(), slots)
    found, _ = ops.gather_kv(cache, cache_v, table, table.new_tensor([0, 6]), total=6)
    small, scales = ops.quantize_fp8(found.flatten(1) + 1.0, 32)
    merged, lse = ops.merge_states(torch.stack((q, k)), torch.zeros(2, *q.shape[:2], device=x.device))
    return [residual, normed, gated, q, k, cache, found, small.float(), scales, merged, lse]


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_keeps_them_in_one_graph(device):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 256, device=device).bfloat16(), torch.randn(256, device=device).bfloat16()
    cos = torch.randn(9, 32, device=device)
    ids = torch.arange(6, device=device)
    arguments = (x, weight, cos, ids, ids, torch.arange(3, device=device, dtype=torch.int32).view(1, 3))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep)
    found = torch.compile(everything, fullgraph=True, backend=backend)(*arguments)
    for one, other in zip(found, everything(*arguments), strict=True):
        assert torch.equal(one, other)
    (graph,) = graphs
    called = " ".join(str(node.target) + str(node.args) for node in graph.graph.nodes)
    assert all(f"op='jit_kernel.{op}'" in called for op in ops.__all__)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_columns(device):
    """Nothing is launched; results have their shapes, and a tensor of no numbers a scale of its own."""
    none, ids = torch.ones(0, 2, 64, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    cache, cos = torch.ones(1, 4, 2, 64, device=device), torch.ones(3, 32, device=device)
    assert ops.rms_norm(none, torch.ones(64, device=device)).shape == none.shape
    assert ops.rms_norm(none[..., :0], torch.ones(0, device=device)).shape == (0, 2, 0)
    assert ops.silu_and_mul(none).shape == (0, 2, 32)
    assert ops.apply_rope(none, none, cos, cos, ids)[1].shape == none.shape
    ops.store_kv(none, none, cache, cache.clone(), ids)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    assert ops.gather_kv(cache, cache, ids.view(0, 1), starts)[0].shape == (0, 2, 64)
    assert (
        ops.merge_states(torch.ones(0, 3, 64, device=device), torch.ones(0, 3, device=device))[0].tolist()
        == [[0.0] * 64] * 3
    )
    assert ops.quantize_fp8(none, 32)[1].shape == (0, 2, 2)
    assert ops.quantize_fp8(none, "tensor")[1].item() == pytest.approx(1e-12 / 448)
    assert (ops.quantize_fp8(torch.ones(3, 0, device=device))[1] == torch.tensor(1e-12 / 448, device=device)).all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    """Offsets are of 64 bits: the last rows of a tensor of 2^31 + 2^24 numbers, by each op that goes over rows."""
    rows, size = (1 << 31) // 4096 + 4096, 4096
    x = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(8, size, device="cuda").bfloat16()
    x[-8:] = last
    weight = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight)[-8:], ops.rms_norm(last, weight))
    assert torch.equal(ops.silu_and_mul(x)[-8:], ops.silu_and_mul(last))
    for group in ("token", 128):
        (small, scales), (few, those) = ops.quantize_fp8(x, group), ops.quantize_fp8(last, group)
        assert torch.equal(small[-8:].view(torch.uint8), few.view(torch.uint8)) and torch.equal(scales[-8:], those)
    assert torch.equal(
        ops.quantize_fp8(x.view(-1), "tensor")[0][-8 * size :].view(8, size).float(),
        ops.quantize_fp8(last, "tensor")[0].float(),
    )
    heads = x.view(1, rows, 32, 128)
    merged, _ = ops.merge_states(heads, torch.zeros(1, rows, 32, device="cuda"))
    assert torch.equal(merged[-8:].view(8, size), last)
    slots = torch.arange(rows, device="cuda")
    cache = torch.zeros(rows // 16, 16, 32, 128, dtype=torch.bfloat16, device="cuda")
    ops.store_kv(heads[0], heads[0], cache, cache, slots)
    table = torch.arange(rows // 16, dtype=torch.int32, device="cuda").view(1, -1)
    starts = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    assert torch.equal(ops.gather_kv(cache, cache, table, starts, total=rows)[0][-8:].view(8, size), last)
    cos, sin = torch.ones(2, 64, device="cuda"), torch.zeros(2, 64, device="cuda")
    turned, _ = ops.apply_rope(heads[0], None, cos, sin, torch.zeros(rows, dtype=torch.int32, device="cuda"))
    assert torch.equal(turned[-8:].view(8, size), last)


def test_another_vendors_tensor_is_told_what_is_lacking():
    """As a tensor on musa is: here on meta, which every torch has."""
    with pytest.raises(NotImplementedError, match=r"x is on meta; .* none in a language that meta compiles"):
        ops.quantize_fp8(torch.ones(2, 8, device="meta"))


def test_tensors_without_their_numbers_in_memory_are_refused():
    """Also where the same call of plain tensors went before: a plan is not found by shapes alone."""
    x, weight = torch.ones(2, 8), torch.ones(8)
    ops.rms_norm(x, weight)
    with pytest.raises(TypeError, match="weight is a lazily negated view; it must be plain memory"):
        ops.rms_norm(x, torch._neg_view(weight))
    with pytest.raises(TypeError, match=r"out_partial has layout torch\.sparse_coo"):
        ops.merge_states(x.to_sparse(), x[:, 0])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(weight)
    with pytest.raises(TypeError, match="x is a FakeTensor, which has no memory"):
        ops.rms_norm(*fake, out=x)
