// Before and after the main kernel: D and lse by rows, and grad_q from its sums.
#pragma once

#include "flash_attention_v3/hopper/backward/epilogue.cuh"

namespace jit_kernel::hopper {

// A block's tile of queries.
struct QueryTile {
  int batch, row, len_q, offset;  // row: its first, within its sequence
};

__device__ __forceinline__ QueryTile find_query_tile(const BackwardParams& params, int rows) {
  const int tile = blockIdx.x;
  QueryTile found;
  found.batch = sequence_of_tile(params.cu_seqlens_q, tile, params.batch, rows, params.tiles_per_q);
  found.row =
      (tile - first_tile(params.cu_seqlens_q, found.batch, rows, params.tiles_per_q)) * rows;
  found.len_q =
      sequence_length(found.batch, params.seqlen_q, params.cu_seqlens_q, params.seqused_q);
  found.offset = sequence_offset(params.cu_seqlens_q, found.batch);
  return found;
}

// The sum of products of 8 elements.
template <class Element>
__device__ __forceinline__ float multiply_8(const unsigned short* a, const unsigned short* b) {
  const uint4 of_a = *reinterpret_cast<const uint4*>(a);
  const uint4 of_b = *reinterpret_cast<const uint4*>(b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum = fmaf(load_element<Element>(&of_a, i), load_element<Element>(&of_b, i), sum);
  }
  return sum;
}

// A block for each tile and head, 16 threads a row: D = rowsum(dO O) - grad_lse and lse as an
// exponent of 2; rows that are not there or have an lse of -inf get 0 and infinity, whatever their
// memory holds; of those that see no key and have a sink, only lse and its gradient count. The
// tile's sums become 0.
template <class C>
__device__ __forceinline__ void prepare_rows(const BackwardParams& params) {
  using Element = typename C::Element;
  const QueryTile tile = find_query_tile(params, C::kQueries);
  const int len_k =
      sequence_length(tile.batch, params.seqlen_k, params.cu_seqlens_k, params.seqused_k);
  const int seeing_row =
      len_k > 0 ? max(0, seeing_queries(params, 0, tile.len_q, len_k).low) : tile.len_q;
  const int head = blockIdx.y, lane = threadIdx.x % 16;
  const long long place = static_cast<long long>(head) * params.tiles_q + blockIdx.x;
  float* const sums = params.sums + place * (C::kParts * kPartFloats);
  for (int i = threadIdx.x * 4; i < C::kParts * kPartFloats; i += kPrepareThreads * 4) {
    *reinterpret_cast<float4*>(sums + i) = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  for (int i = threadIdx.x / 16; i < C::kQueries; i += kPrepareThreads / 16) {
    const int row = tile.row + i;
    const bool inside = row >= 0 && row < tile.len_q;
    const long long at = static_cast<long long>(tile.offset) + row;
    float lse = minus_infinity(), sum = 0.f;
    if (inside) {
      lse = params.lse[tile.batch * params.lse_batch_stride + head * params.lse_head_stride + at];
    }
    if (inside && row >= seeing_row) {
      const unsigned short* const out =
          gradient_row(params.rows_out, tile.batch, tile.offset, row, head);
      const unsigned short* const grad =
          gradient_row(params.rows_grad_out, tile.batch, tile.offset, row, head);
      for (int column = 8 * lane; column < params.head_dim_v; column += 128) {
        sum += multiply_8<Element>(out + column, grad + column);
      }
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane > 0) continue;
    if (inside && params.grad_lse != nullptr) {
      sum -= params.grad_lse[tile.batch * params.grad_lse_batch_stride +
                             head * params.grad_lse_head_stride + at * params.grad_lse_row_stride];
    }
    const bool seeing = lse != minus_infinity();
    const float kLog2E = 1.44269504089f;
    params.lse_log2[place * C::kQueries + i] = seeing ? lse * kLog2E : -minus_infinity();
    params.delta[place * C::kQueries + i] = seeing ? sum : 0.f;
  }
}

// A block for each tile, part and head: the part's sums times the scale, rounded.
template <class C>
__device__ __forceinline__ void finish_rows(const BackwardParams& params) {
  const QueryTile tile = find_query_tile(params, C::kQueries);
  const int head = blockIdx.y, part = blockIdx.z;
  const int row = tile.row + part / C::kPartColumns * kPartRows;
  const int column = part % C::kPartColumns * 64;
  if (tile.row < 0 || row >= tile.len_q) return;
  const long long place =
      (static_cast<long long>(head) * params.tiles_q + blockIdx.x) * C::kParts + part;
  const float* const sums = params.sums + place * kPartFloats + threadIdx.x * 4;
  float values[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(sums + i * 512);
    values[4 * i] = four.x;
    values[4 * i + 1] = four.y;
    values[4 * i + 2] = four.z;
    values[4 * i + 3] = four.w;
  }
  store_accumulators<typename C::Element, 64>(
      values, params.softmax_scale,
      gradient_row(params.grad_q, tile.batch, tile.offset, row, head) + column,
      params.grad_q.row_stride, tile.len_q - row, params.head_dim - column);
}

}  // namespace jit_kernel::hopper
