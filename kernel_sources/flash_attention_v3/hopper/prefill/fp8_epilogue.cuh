// From accumulators of e4m3 products to global memory: as epilogue.cuh, in bf16, with the factor of
// v and the columns in their own order again.
#pragma once

#include "flash_attention_v3/hopper/prefill/epilogue.cuh"

namespace jit_kernel::hopper {

// 8 bytes, predicated as store_16_if.
__device__ __forceinline__ void store_8_if(void* destination, u32 a, u32 b, bool stores) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(
          destination),
      "r"(a), "r"(b), "r"(static_cast<u32>(stores))
      : "memory");
}

// As store_tile. Of 16 columns a thread holds four neighbours: two even ones in one group of 8
// accumulated columns and two odd ones in the next (fp8_transposer.cuh); four threads store a
// sector of 32 bytes.
template <class C>
__device__ __forceinline__ void store_fp8_tile(const Fp8Params& params, const Fp8TileInfo& tile,
                                               const float (&output)[C::kHeadDimV / 2],
                                               const Softmax& state, int warpgroup) {
  const int thread = threadIdx.x % 4;
  const int row = accumulator_row(tile.row + warpgroup * kRowsPerWarpgroup);
  const bool inside[2] = {row < tile.len_q, row + 8 < tile.len_q};
  const float sink = half_sink_log2<e4m3>(params, tile.head), to2 = tile.factors.scale_log2;
  const RowResult result[2] = {finish_row(state.sum[0], half_reference<e4m3>(state, 0, to2), sink),
                               finish_row(state.sum[1], half_reference<e4m3>(state, 1, to2), sink)};
  const long long place = static_cast<long long>(tile.offset_q) + row;
  if (params.lse != nullptr && thread == 0) {
    float* const lse = params.lse + tile.batch * params.lse_batch_stride +
                       tile.head * params.lse_head_stride + place;
    if (inside[0]) lse[0] = result[0].lse;
    if (inside[1]) lse[8] = result[1].lse;
  }
  unsigned short* const out = static_cast<unsigned short*>(params.out) +
                              tile.batch * params.out_batch_stride + place * params.out_row_stride +
                              tile.head * params.out_head_stride + 4 * thread;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // A row that sees no key is 0, whatever the factor.
    const float factor = result[r].factor == 0.f ? 0.f : result[r].factor * tile.factors.values;
#pragma unroll
    for (int i = 0; i < C::kHeadDimV / 16; ++i) {
      const int even = 8 * i + 2 * r, odd = even + 4;
      store_8_if(out + 8 * r * params.out_row_stride + 16 * i,
                 pack<bf16>(output[even] * factor, output[odd] * factor),
                 pack<bf16>(output[even + 1] * factor, output[odd + 1] * factor),
                 inside[r] && 16 * i < params.head_dim_v);
    }
  }
}

}  // namespace jit_kernel::hopper
