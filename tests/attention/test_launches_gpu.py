"""How many kernels a decode step of the backend launches on a GPU: nodes of the graph that captures it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from jit_kernel import device
from jit_kernel.attention import AttentionLayer, FlashAttentionBackend, ForwardMetadata

pytestmark = pytest.mark.gpu

LAYERS = [AttentionLayer(), AttentionLayer(window_size=(200, 0)), AttentionLayer(softcap=30.0), AttentionLayer()]


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if device.get_device_capability() != (9, 0):
        pytest.skip("other GPUs merge split keys by a kernel of its own")


def nodes_of(graph: torch.cuda.CUDAGraph) -> int:
    """How many nodes of any kind a captured graph has."""
    count = ctypes.c_size_t()
    get_nodes = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
    status = get_nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    assert status == 0
    return count.value


@pytest.mark.parametrize("batch", [1, 40], ids=["clusters", "parts"])
@pytest.mark.parametrize("page_size", [64, 1])
def test_a_decode_step_launches_one_kernel_a_layer(batch: int, page_size: int) -> None:
    torch.manual_seed(0)
    pages = 512 // page_size
    q = torch.randn(batch, 1, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch * pages, page_size, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
    lengths = torch.randint(1, 512, (batch,), device="cuda", dtype=torch.int32)
    metadata = ForwardMetadata(None, 1, lengths, 512, table)
    backend, outs = FlashAttentionBackend(device="cuda"), [torch.empty_like(q) for _ in LAYERS]

    def run() -> None:
        with backend.step():
            for layer, out in zip(LAYERS, outs, strict=True):
                backend.forward_decode(q, k, v, metadata, layer, out=out)

    run()
    expected = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        run()
    assert nodes_of(graph) == len(LAYERS)
    graph.instantiate()
    for out in outs:
        out.zero_()
    graph.replay()
    assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))
