// The factors of q, k and v of a tile that are in e4m3, or were.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"

namespace jit_kernel::hopper {

// Smaller factors of scores, 0, those below 0 and NaN are multiplied in before the maximum is
// taken: softmax needs one above 0, and -inf times 0, of a masked score, would be NaN.
constexpr float kLeastFp8Scale = 1e-20f;

// The largest scale of a row that is not far from its first key.
template <class C>
__device__ __forceinline__ float largest_scale(float softcap_scale) {
  if constexpr (C::kTileFactors) {
    if (softcap_scale == 0.f) return kLargestScale<false>;
  }
  return kLargestScale<C::kSoftcap>;
}

__device__ __forceinline__ float descale_at(const Descale& descale, int batch, int head) {
  if (descale.data == nullptr) return 1.f;
  return descale.data[batch * descale.batch_stride + head * descale.head_stride];
}

// Products are kept finite, as 0 times infinity would be NaN; NaN stays NaN.
__device__ __forceinline__ float keep_finite(float x) {
  return fabsf(x) > kLargestFloat ? copysignf(kLargestFloat, x) : x;
}

// Of a sequence and key head.
template <class Params>
__device__ __forceinline__ TileFactors factors_of(const Params& params, int batch, int head) {
  const float factor =
      descale_at(params.q_descale, batch, head) * descale_at(params.k_descale, batch, head);
  const float values = descale_at(params.v_descale, batch, head);
  if (params.softcap_scale > 0.f) {
    return {params.scale_log2, keep_finite(params.softcap_scale * factor), values};
  }
  const float scale = keep_finite(params.scale_log2 * factor);
  const bool fits = scale >= kLeastFp8Scale;  // not so of NaN
  return {fits ? scale : 1.f, fits ? 1.f : scale, values};
}

// Of a tile: by its scheduler, or on cached keys by a table where they were in e4m3.
__device__ __forceinline__ TileFactors tile_factors(const Fp8Params&, const Fp8TileInfo& tile) {
  return tile.factors;
}
__device__ __forceinline__ TileFactors tile_factors(const CachedParams& params,
                                                    const CachedTileInfo& tile) {
  if (params.factors != nullptr) {
    return params.factors[(tile.batch * params.heads_q + tile.head) / params.group];
  }
  return {params.scale_log2, params.softcap_scale > 0.f ? params.softcap_scale : 1.f, 1.f};
}

}  // namespace jit_kernel::hopper
