"""A kernel of your own: RMS norm, compiled for the GPU or the CPU that is here at its first call, then kept on disk."""

import functools

import torch

from jit_kernel import jit

CUDA = r"""template <class T, int N> __global__ void rms_norm(const T* x, const T* weight, T* out, float eps) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  x += size_t(blockIdx.x) * N, out += size_t(blockIdx.x) * N;
  float mine = 0;
  for (int i = threadIdx.x; i < N; i += blockDim.x) mine += float(x[i]) * float(x[i]);
  atomicAdd(&sum, mine);
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += blockDim.x) out[i] = T(float(x[i]) * rsqrtf(sum / N + eps) * float(weight[i]));
}"""
CPU = r"""#include <cmath>
void rms_norm(tvm::ffi::TensorView x, tvm::ffi::TensorView weight, tvm::ffi::TensorView out, double eps) {
  const auto *in = (const float*)x.data_ptr(), *w = (const float*)weight.data_ptr();
  for (int64_t n = x.size(1), row = 0; row < x.size(0); ++row, in += n) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += in[i] * in[i];
    for (int64_t i = 0; i < n; ++i) ((float*)out.data_ptr())[row * n + i] = in[i] / std::sqrt(sum / n + eps) * w[i];
  }
}"""
SOURCES = jit.Sources(text={"rms_norm.cuh": CUDA, "rms_norm.h": CPU}, name="rms_norm")
on_cpu = jit.library(SOURCES, "rms_norm.h", exports=["rms_norm"])
on_cuda = functools.cache(lambda ctype, n: jit.cuda(SOURCES, "rms_norm.cuh", entry=f"rms_norm<{ctype}, {n}>"))

device = "cuda" if torch.cuda.is_available() else "cpu"
x, weight = torch.randn(128, 4096, device=device), torch.rand(4096, device=device)
out = torch.empty_like(x)
on_cuda(jit.ctype(x), 4096)[128, 256](x, weight, out, 1e-6) if x.is_cuda else on_cpu.rms_norm(x, weight, out, 1e-6)
error = (out - torch.nn.functional.rms_norm(x.double(), (4096,), weight.double(), 1e-6)).abs().max()
print(f"RMS norm on {device}: largest error {error:.1e}; {[(event.action, str(event.spec)) for event in jit.events()]}")
raise SystemExit(int(error > 1e-5))
