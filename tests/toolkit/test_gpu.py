"""Kernels of a package from outside on a real GPU: right values, the caller's stream, graphs, clusters, no Triton."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jit_kernel import jit
from tests.support import outsider

pytestmark = pytest.mark.gpu

TEXT = """
template <class T>
__global__ void mix(const T* x, long long stride, T* out, float by, double plus, bool negate, unsigned char more,
                    const int* rows) {
  const int row = rows ? rows[blockIdx.y] : blockIdx.y;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = float(x[row * stride + i]) * by + float(plus) + more;
  out[blockIdx.y * gridDim.x * blockDim.x + i] = T(negate ? -value : value);
}

__global__ void shape(int* out) {
  extern __shared__ int room[];
  unsigned bytes, blocks = 1, rank = 0;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  room[bytes / 4 - 1] = rank;
  const int found[] = {int(gridDim.x), int(gridDim.y), int(gridDim.z), int(blockDim.x), int(blockDim.y),
                       int(blockDim.z), int(bytes), int(blocks)};
  if (threadIdx.x + threadIdx.y + threadIdx.z + blockIdx.x + blockIdx.y + blockIdx.z == 0) {
    for (int i = 0; i < 8; ++i) out[i] = found[i] + room[bytes / 4 - 1];
  }
}

__global__ void early(float* x, int n) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[i] * 2 + 1;
}
"""
SOURCES = jit.Sources(text={"mix.cuh": TEXT}, name="tests")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_argument(dtype):
    kernel = jit.cuda(SOURCES, "mix.cuh", entry=f"mix<{jit.ctype(dtype)}>")
    whole = torch.randn(7, 300, device="cuda").to(dtype)
    x = whole[:, 5:133]  # rows with a stride, from an address that is not aligned
    rows = torch.tensor([6, 0, 3], dtype=torch.int32, device="cuda")
    for picked, negate in ((rows, True), (None, False)):
        out = torch.full((3, 128), float("nan"), device="cuda", dtype=dtype)
        kernel[(4, 3), 32](x, x.stride(0), out, 0.5, 2.0, negate, 7, picked)
        value = x[rows.long() if picked is not None else slice(0, 3)].double() * 0.5 + 9
        wanted = -value if negate else value
        assert torch.allclose(out.double(), wanted, rtol=2e-2 if dtype.itemsize == 2 else 1e-6)


def test_shapes_shared_memory_and_clusters():
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    kernel = jit.cuda(SOURCES, "mix.cuh", entry="shape")
    clusters = torch.cuda.get_device_capability()[0] >= 9
    for grid, block, shared, cluster in (
        ((2, 3, 4), (8, 4, 2), 400, 1),
        (16, 64, 90_000, 2 if clusters else 1),
        (8, (4, 8), 4, 8 if clusters else 1),
    ):
        kernel.launch(grid, block, shared, cluster=cluster)(out)
        sizes = [(*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3] for size in (grid, block)]
        assert out.tolist() == [*sizes[0], *sizes[1], shared, cluster]


def test_the_callers_stream_and_a_graph():
    """Work on a side stream waits for what is before it there; a graph replays launches."""
    kernel = jit.cuda(SOURCES, "mix.cuh", entry="early", programmatic=torch.cuda.get_device_capability()[0] >= 9)
    x = torch.zeros(1 << 20, device="cuda")
    blocks = x.numel() // 256
    kernel[blocks, 256](x, x.numel())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.fill_(1)
        kernel[blocks, 256](x, x.numel())
        kernel[blocks, 256](x, x.numel())
    torch.cuda.synchronize()
    assert torch.equal(x, torch.full_like(x, 7))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            kernel[blocks, 256](x, x.numel())
    x.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x, torch.full_like(x, 7))


def test_a_cold_kernel_is_refused_inside_a_capture():
    fresh = jit.Sources(text={"fresh.cuh": f"// {torch.seed()}\n__global__ void fresh(float* x) {{ x[0] = 1; }}\n"})
    kernel = jit.cuda(fresh, "fresh.cuh", entry="fresh")
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="would have to be compiled while a CUDA graph is being captured"):
            kernel[1, 1](x)
        x.add_(1)
    jit.warm([kernel])
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        kernel[1, 1](x)
    graph.replay()
    assert x.item() == 1


def test_what_the_driver_refuses_names_the_kernel():
    kernel = jit.cuda(SOURCES, "mix.cuh", entry="shape")
    with pytest.raises(RuntimeError, match=r"shape, 1000000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"):
        kernel[1, 32, 1_000_000](torch.zeros(8, dtype=torch.int32, device="cuda"))


def test_an_outsiders_package_runs_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its CUDA and its Triton kernel; the second is compiled by Triton and launched without."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(outsider.written(tmp_path)))
    package = __import__(outsider.NAME)
    x = torch.randn(1000, device="cuda")
    out = torch.empty_like(x)
    package.scale[4, 256](x, out, 3.0, 1000, True)
    assert torch.equal(out, x * -3)
    package.fill[1, 256](out, 500, 9)
    assert torch.equal(out, torch.cat([torch.full_like(x[:500], 9), x[500:] * -3]))
    jit.warm([package.twice])
    monkeypatch.setitem(sys.modules, "triton", None)
    package.twice[8](x, out, 1000)
    assert torch.equal(out, x * 2)
