// Types that are settled at run time: of queries beside an e4m3 cache, and of their result.
#pragma once

#include "flash_attention_v3/hopper/decode/e4m3.cuh"
#include "flash_attention_v3/hopper/decode/merge.cuh"
#include "flash_attention_v3/hopper/mla/params.h"

namespace jit_kernel::hopper {

// Two elements as float32.
__device__ __forceinline__ float2 floats_of(u32 word, bool is_bf16) {
  float2 halves;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
      : "=f"(halves.x), "=f"(halves.y)
      : "r"(word));
  if (!is_bf16) return halves;
  return {__int_as_float(word << 16), __int_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ float descale_at(const float* factors, long long batch_stride,
                                            long long head_stride, int batch, int head) {
  return factors == nullptr ? 1.f : factors[batch * batch_stride + head * head_stride];
}
__device__ __forceinline__ float descale_of_rows(const DecodeRows& rows, int batch, int head) {
  return descale_at(rows.descale, rows.descale_batch_stride, rows.descale_head_stride, batch, head);
}

template <class C>
__device__ __forceinline__ bool is_bf16_out(const MlaParams& params) {
  if constexpr (C::kMixed) return params.bf16_out;
  return kIsBf16<typename C::Element>;
}

template <class C>
__device__ __forceinline__ u32 pack_result(const MlaParams& params, float low, float high) {
  return is_bf16_out<C>(params) ? pack<bf16>(low, high) : pack<fp16>(low, high);
}

template <class C>
__device__ __forceinline__ float mla_half_sink(const MlaParams& params, int head) {
  return is_bf16_out<C>(params) ? half_sink_log2<bf16>(params, head)
                                : half_sink_log2<fp16>(params, head);
}

template <class C>
__device__ __forceinline__ void store_merged(const MlaParams& params, const DecodeItem& item,
                                             const MergedQuad& merged, const DecodeQuery& query,
                                             int quad) {
  if (is_bf16_out<C>(params)) {
    merged.store<bf16>(params, item, query, quad);
  } else {
    merged.store<fp16>(params, item, query, quad);
  }
}

}  // namespace jit_kernel::hopper
