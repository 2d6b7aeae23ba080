// The factors of q, k and v of a tile in e4m3.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"

namespace jit_kernel::hopper {

// Smaller factors of scores, 0, those below 0 and NaN are multiplied in before the maximum is
// taken: softmax needs one above 0, and -inf times 0, of a masked score, would be NaN.
constexpr float kLeastFp8Scale = 1e-20f;

__device__ __forceinline__ float descale_at(const Descale& descale, int batch, int head) {
  if (descale.data == nullptr) return 1.f;
  return descale.data[batch * descale.batch_stride + head * descale.head_stride];
}

// Products are kept finite, as 0 times infinity would be NaN; NaN stays NaN.
__device__ __forceinline__ float keep_finite(float x) {
  return fabsf(x) > kLargestFloat ? copysignf(kLargestFloat, x) : x;
}

__device__ __forceinline__ void write_factors(Fp8TileInfo& info, const Fp8Params& params) {
  const int head = info.head / params.group;
  const float factor = descale_at(params.q_descale, info.batch, head) *
                       descale_at(params.k_descale, info.batch, head);
  info.values = descale_at(params.v_descale, info.batch, head);
  info.before = 1.f;
  info.scale_log2 = params.scale_log2;
  if (params.softcap_scale > 0.f) {
    info.before = keep_finite(params.softcap_scale * factor);
    return;
  }
  const float scale = keep_finite(params.scale_log2 * factor);
  const bool fits = scale >= kLeastFp8Scale;  // not so of NaN
  info.before = fits ? 1.f : scale;
  info.scale_log2 = fits ? scale : 1.f;
}

}  // namespace jit_kernel::hopper
