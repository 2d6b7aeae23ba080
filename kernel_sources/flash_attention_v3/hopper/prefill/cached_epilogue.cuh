// The end of a tile on cached keys, whose rows may be the query heads of a group for each token.
#pragma once

#include "flash_attention_v3/hopper/prefill/epilogue.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_factors.cuh"

namespace jit_kernel::hopper {

// Where a thread's two rows go, and what its output is multiplied by.
struct CachedRows {
  unsigned short* out[2];
  float factor[2];
  bool inside[2];
};

// Ends a thread's two rows, of this warpgroup's 64, and stores their lse.
template <class C>
__device__ __forceinline__ CachedRows finish_rows(const CachedParams& params,
                                                  const CachedTileInfo& tile, const Softmax& state,
                                                  int warpgroup) {
  const int thread = threadIdx.x % 4;
  const TileFactors factors = tile_factors(params, tile);
  CachedRows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = accumulator_row(tile.row + warpgroup * kRowsPerWarpgroup) + 8 * r;
    const int token = row >> params.pack_shift;
    const int head = tile.head + (row & ((1 << params.pack_shift) - 1));
    rows.inside[r] = token < tile.len_q;
    const RowResult result =
        finish_row(state.sum[r], half_reference<typename C::Element>(state, r, factors.scale_log2),
                   half_sink_log2<typename C::Element>(params, head));
    // A row that sees no key is 0, whatever the factor.
    rows.factor[r] = result.factor == 0.f ? 0.f : result.factor * factors.values;
    const long long place = static_cast<long long>(tile.offset_q) + token;
    rows.out[r] = static_cast<unsigned short*>(params.out) + tile.batch * params.out_batch_stride +
                  place * params.out_row_stride + head * params.out_head_stride + 8 * thread;
    if (params.lse != nullptr && thread == 0 && rows.inside[r]) {
      params.lse[tile.batch * params.lse_batch_stride + head * params.lse_head_stride + place] =
          result.lse;
    }
  }
  return rows;
}

// Stores the i-th 32 columns, of which a thread holds `values`.
template <class C>
__device__ __forceinline__ void store_columns(const CachedParams& params, const CachedRows& rows,
                                              const float (&values)[16], int i) {
  const int thread = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * j + 2 * r;
      words[j] =
          pack<typename C::Element>(values[at] * rows.factor[r], values[at + 1] * rows.factor[r]);
    }
    transpose_quad(words, thread);
    store_16_if(rows.out[r] + 32 * i, words,
                rows.inside[r] && 32 * i + 8 * thread < params.head_dim_v);
  }
}

// Writes this warpgroup's 64 rows, as store_tile does.
template <class C>
__device__ __forceinline__ void store_cached_tile(const CachedParams& params,
                                                  const CachedTileInfo& tile,
                                                  const float (&output)[C::kHeadDimV / 2],
                                                  const Softmax& state, int warpgroup) {
  const CachedRows rows = finish_rows<C>(params, tile, state, warpgroup);
#pragma unroll
  for (int i = 0; i < C::kHeadDimV / 32; ++i) {
    float values[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) values[j] = output[16 * i + j];
    store_columns<C>(params, rows, values, i);
  }
}

}  // namespace jit_kernel::hopper
