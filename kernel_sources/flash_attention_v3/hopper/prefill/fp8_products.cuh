// Products of e4m3 in a consumer warpgroup, and scores between them.
#pragma once

#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

// Probabilities times as many columns of transposed values as `part` holds; `v`: their descriptor's
// low half.
template <class C, int kCount, int kPacked>
__device__ __forceinline__ void multiply_part(float (&part)[kCount],
                                              const u32 (&probabilities)[kPacked], u32 v) {
  pin_registers(part);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::kKeys / 32; ++i) {
    wgmma_rs_e4m3(part, probabilities[4 * i], probabilities[4 * i + 1], probabilities[4 * i + 2],
                  probabilities[4 * i + 3], wgmma_descriptor<C::kKeys>(v + (i * 32 >> 4)), i != 0);
  }
  wgmma_commit();
}

// Before scores are masked.
template <int kCount>
__device__ __forceinline__ void change_scores(float (&scores)[kCount], float factor, bool capped) {
  if (capped) {
#pragma unroll
    for (float& score : scores) score = tanh_fast(score * factor);
  } else {
#pragma unroll
    for (float& score : scores) score *= factor;
  }
}

}  // namespace jit_kernel::hopper
