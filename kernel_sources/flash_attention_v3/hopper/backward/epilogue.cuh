// The gradients of a tile's keys from accumulators to global memory.
#pragma once

#include "flash_attention_v3/hopper/backward/consumer.cuh"
#include "flash_attention_v3/hopper/backward/wide_consumer.cuh"
#include "flash_attention_v3/hopper/common/epilogue.cuh"

namespace jit_kernel::hopper {

template <class C, bool kIsWide = C::kIsWide>
struct ConsumerKind {
  using Type = BackwardConsumer<C>;
};
template <class C>
struct ConsumerKind<C, true> {
  using Type = WideConsumer<C>;
};
template <class C>
using ConsumerOf = typename ConsumerKind<C>::Type;

// 64 rows x kColumns, a wgmma's accumulators times `factor`; `place`: of the first row. Rows at or
// past `rows` and columns at or past `columns` are left alone.
template <class Element, int kColumns>
__device__ __forceinline__ void store_accumulators(const float (&from)[kColumns / 2], float factor,
                                                   unsigned short* place, long long row_stride,
                                                   int rows, int columns) {
  const int thread = threadIdx.x % 4;
  const int row = accumulator_row(0);
  unsigned short* const out = place + row * row_stride + 8 * thread;
#pragma unroll
  for (int i = 0; i < kColumns / 32; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * i + 4 * j + 2 * r;
        words[j] = pack<Element>(from[at] * factor, from[at + 1] * factor);
      }
      transpose_quad(words, thread);
      store_16_if(out + 8 * r * row_stride + 32 * i, words,
                  row + 8 * r < rows && 32 * i + 8 * thread < columns);
    }
  }
}

// Row `row` of a sequence that begins at `offset` rows of its tensor.
__device__ __forceinline__ unsigned short* gradient_row(const GradientRows& rows, int batch,
                                                        int offset, int row, int head) {
  return static_cast<unsigned short*>(rows.data) + batch * rows.batch_stride +
         (static_cast<long long>(offset) + row) * rows.row_stride + head * rows.head_stride;
}

__device__ __forceinline__ int sequence_offset(const int* cu_seqlens, int batch) {
  return cu_seqlens != nullptr ? cu_seqlens[batch] : 0;
}

// Of a warpgroup: all columns of its 64 keys, or its columns of the block's 64 keys.
template <class C>
__device__ __forceinline__ void store_gradients_of_keys(const ConsumerOf<C>& consumer) {
  const BackwardParams& params = consumer.params;
  const KeyTile& tile = consumer.tile;
  if (tile.first_key < 0) return;
  constexpr int kColumns = C::kIsWide ? C::kHeadDim / C::kWarpgroups : C::kHeadDim;
  const int first = tile.first_key + (C::kIsWide ? 0 : consumer.warpgroup * kRowsPerWarpgroup);
  const int column = C::kIsWide ? consumer.warpgroup * kColumns : 0;
  const int offset = sequence_offset(params.cu_seqlens_k, tile.batch);
  const int rows = tile.len_k - first;
  store_accumulators<typename C::Element, kColumns>(
      consumer.grad_v, 1.f,
      gradient_row(params.grad_v, tile.batch, offset, first, tile.head) + column,
      params.grad_v.row_stride, rows, params.head_dim_v - column);
  store_accumulators<typename C::Element, kColumns>(
      consumer.grad_k, params.softmax_scale,
      gradient_row(params.grad_k, tile.batch, offset, first, tile.head) + column,
      params.grad_k.row_stride, rows, params.head_dim - column);
}

}  // namespace jit_kernel::hopper
