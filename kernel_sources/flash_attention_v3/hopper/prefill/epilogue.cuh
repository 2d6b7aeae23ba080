// From accumulators to global memory: normalise, add the sink's term, store rows and lse.
#pragma once

#include "flash_attention_v3/hopper/common/epilogue.cuh"
#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

// Writes this warpgroup's 64 rows; rows past the sequence's end and columns past head_dim_v are
// left alone. No branch stands between the rows' shuffles, so that they overlap.
template <class C>
__device__ __forceinline__ void store_tile(const ForwardParams& params, const TileInfo& tile,
                                           float (&output)[C::kHeadDimV / 2], const Softmax& state,
                                           int warpgroup) {
  using Element = typename C::Element;
  const int thread = threadIdx.x % 4;
  const int row = accumulator_row(tile.row + warpgroup * kRowsPerWarpgroup);
  const bool inside[2] = {row < tile.len_q, row + 8 < tile.len_q};
  const float sink = half_sink_log2<Element>(params, tile.head), to2 = params.scale_log2;
  const RowResult result[2] = {
      finish_row(state.sum[0], half_reference<Element>(state, 0, to2), sink),
      finish_row(state.sum[1], half_reference<Element>(state, 1, to2), sink)};
  const long long place = static_cast<long long>(tile.offset_q) + row;
  if (params.lse != nullptr && thread == 0) {
    float* const lse = params.lse + tile.batch * params.lse_batch_stride +
                       tile.head * params.lse_head_stride + place;
    if (inside[0]) lse[0] = result[0].lse;
    if (inside[1]) lse[8] = result[1].lse;
  }
  unsigned short* const out = static_cast<unsigned short*>(params.out) +
                              tile.batch * params.out_batch_stride + place * params.out_row_stride +
                              tile.head * params.out_head_stride + 8 * thread;
#pragma unroll
  for (int i = 0; i < C::kHeadDimV / 32; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * i + 4 * j + 2 * r;
        words[j] = pack<Element>(output[at] * result[r].factor, output[at + 1] * result[r].factor);
      }
      transpose_quad(words, thread);
      store_16_if(out + 8 * r * params.out_row_stride + 32 * i, words,
                  inside[r] && 32 * i + 8 * thread < params.head_dim_v);
    }
  }
}

// One warp of each block: rows of out that belong to no query.
__device__ __forceinline__ void clear_rows(const ForwardParams& params, int batch, int begin,
                                           int end) {
  const int lane = threadIdx.x % 32;
  const int rows = end - begin;
  for (int i = 0; i < rows * params.heads_q; ++i) {
    const int head = i / rows;
    const long long place = begin + i % rows;
    unsigned short* out = static_cast<unsigned short*>(params.out) +
                          batch * params.out_batch_stride + place * params.out_row_stride +
                          head * params.out_head_stride;
    for (int column = lane; column < params.head_dim_v; column += 32) out[column] = 0;
    if (params.lse != nullptr && lane == 0) {
      params.lse[batch * params.lse_batch_stride + head * params.lse_head_stride + place] =
          minus_infinity();
    }
  }
}

__device__ __forceinline__ void clear_rest(const ForwardParams& params) {
  for (int batch = blockIdx.x; batch < params.batch; batch += gridDim.x) {
    const int used = params.seqused_q != nullptr ? max(0, params.seqused_q[batch]) : 0;
    if (params.cu_seqlens_q == nullptr) {
      clear_rows(params, batch, params.seqused_q != nullptr ? used : params.seqlen_q,
                 params.seqlen_q);
      continue;
    }
    const int begin = params.cu_seqlens_q[batch];
    const int end = params.cu_seqlens_q[batch + 1];
    if (params.seqused_q != nullptr) clear_rows(params, batch, begin + used, end);
    if (batch == 0) clear_rows(params, batch, 0, begin);
    if (batch == params.batch - 1) clear_rows(params, batch, max(begin, end), params.seqlen_q);
  }
}

}  // namespace jit_kernel::hopper
