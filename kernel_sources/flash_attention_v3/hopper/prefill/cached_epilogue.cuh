// The end of a tile on cached keys, whose rows may be the query heads of a group for each token.
#pragma once

#include "flash_attention_v3/hopper/prefill/epilogue.cuh"

namespace jit_kernel::hopper {

// Writes this warpgroup's 64 rows, as store_tile does.
template <class C>
__device__ __forceinline__ void store_cached_tile(const CachedParams& params,
                                                  const CachedTileInfo& tile,
                                                  float (&output)[C::kHeadDimV / 2],
                                                  const Softmax& state, int warpgroup) {
  const int thread = threadIdx.x % 4;
  bool inside[2];
  RowResult result[2];
  unsigned short* out[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = accumulator_row(tile.row + warpgroup * kRowsPerWarpgroup) + 8 * r;
    const int token = row >> params.pack_shift;
    const int head = tile.head + (row & ((1 << params.pack_shift) - 1));
    inside[r] = token < tile.len_q;
    result[r] =
        finish_row(state.sum[r], state.reference[r], sink_log2<typename C::Element>(params, head));
    const long long place = static_cast<long long>(tile.offset_q) + token;
    out[r] = static_cast<unsigned short*>(params.out) + tile.batch * params.out_batch_stride +
             place * params.out_row_stride + head * params.out_head_stride + 8 * thread;
    if (params.lse != nullptr && thread == 0 && inside[r]) {
      params.lse[tile.batch * params.lse_batch_stride + head * params.lse_head_stride + place] =
          result[r].lse;
    }
  }
#pragma unroll
  for (int i = 0; i < C::kHeadDimV / 32; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * i + 4 * j + 2 * r;
        words[j] = pack<typename C::Element>(output[at] * result[r].factor,
                                             output[at + 1] * result[r].factor);
      }
      transpose_quad(words, thread);
      store_16_if(out[r] + 32 * i, words, inside[r] && 32 * i + 8 * thread < params.head_dim_v);
    }
  }
}

}  // namespace jit_kernel::hopper
