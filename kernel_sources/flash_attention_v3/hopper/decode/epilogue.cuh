// The end of an item: its statistics, two streams of one head made one, the rows of a whole one.
#pragma once

#include "flash_attention_v3/hopper/common/epilogue.cuh"
#include "flash_attention_v3/hopper/decode/params.h"
#include "flash_attention_v3/hopper/decode/softmax.cuh"

namespace jit_kernel::hopper {

// Where the result of a query goes.
__device__ __forceinline__ unsigned short* out_of(const DecodeParams& params,
                                                  const DecodeItem& item,
                                                  const DecodeQuery& query) {
  const long long place = static_cast<long long>(item.offset_q) + query.token;
  return static_cast<unsigned short*>(params.out) + item.batch * params.out_batch_stride +
         place * params.out_row_stride + query.head * params.out_head_stride;
}

__device__ __forceinline__ void store_lse(const DecodeParams& params, const DecodeItem& item,
                                          const DecodeQuery& query, float lse) {
  if (params.lse == nullptr) return;
  params.lse[item.batch * params.lse_batch_stride + query.head * params.lse_head_stride +
             item.offset_q + query.token] = lse;
}

// The factor of a row's accumulated output, and its lse. Halves, as in common/softmax.cuh:
// exponents of 2 that float32 does not hold.
__device__ __forceinline__ RowResult finish_query(float sum, float half_reference,
                                                  float half_sink) {
  const float kLn2 = 0.69314718056f;
  const float top = fmaxf(half_reference, half_sink);
  const bool none = top == minus_infinity();
  const float base = none ? 0.f : top;
  const float shift = exp2_fast(2.f * (half_reference - base));
  const float total = fmaf(sum, shift, exp2_fast(2.f * (half_sink - base)));
  return {none ? 0.f : __fdividef(shift, total),
          none ? minus_infinity() : fmaf(base, 2.f * kLn2, __log2f(total) * kLn2)};
}

// The sums over all threads, and half of the references as exponents of 2, to shared memory.
template <class C>
__device__ __forceinline__ void gather_statistics(const DecodeShared<C>& shared, int stream,
                                                  const DecodeSoftmax<C>& state, float scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int query = i / 2 * 8 + lane % 4 * 2 + i % 2;
    const float sum = over_keys_of_warp(state.sum[i], Sum());
    if (lane < 4) shared.statistics(stream, warp)[query] = sum;
    if (warp == 0 && lane < 4) {
      const float reference = state.reference[i];
      const float half = fmaxf(-kLargestFloat, fminf(0.5f * reference * scale, kLargestFloat));
      shared.references(stream)[query] = reference == minus_infinity() ? reference : half;
    }
  }
}

template <class C>
__device__ __forceinline__ float sum_of(const DecodeShared<C>& shared, int stream, int query) {
  const float* const of_warps = shared.statistics(stream, 0) + query;
  return of_warps[0] + of_warps[C::kRows] + (of_warps[2 * C::kRows] + of_warps[3 * C::kRows]);
}

// The first of the columns of the result that a thread has.
template <class C>
__device__ __forceinline__ int first_column() {
  return threadIdx.x % 128 / 32 * C::kWarpStep + threadIdx.x % 32 / 4 * C::kLaneStep;
}

// Where a thread's part of query `i` lies in kRows x kHeadDim numbers.
template <class C>
__device__ __forceinline__ int place_in_output(int i) {
  const int query = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
  return query * C::kHeadDim + first_column<C>();
}

// The numbers of query `i` that a thread has, to a place that place_in_output has found.
template <class C>
__device__ __forceinline__ void store_columns(float* at, int i,
                                              const float (&output)[C::kPanels][C::kRows / 2]) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    float* const of_panel = at + C::kPanelStep * panel;
    const float first = output[panel][i / 2 * 4 + i % 2];
    const float second = output[panel][i / 2 * 4 + 2 + i % 2];
    if constexpr (C::kHalfStep == 1) {
      *reinterpret_cast<float2*>(of_panel) = {first, second};
    } else {
      of_panel[0] = first;
      of_panel[C::kHalfStep] = second;
    }
  }
}

// Two streams of one head: the second one's result joins the first one's. All threads of both.
template <class C>
__device__ __forceinline__ void join_streams(const DecodeShared<C>& shared, int stream,
                                             float (&output)[C::kPanels][C::kRows / 2]) {
  constexpr int kQueries = DecodeSoftmax<C>::kQueries;
  named_barrier_sync(kStreamsBarrier, 256);  // the queries are done with, the statistics are there
  if (stream == 1) {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      store_columns<C>(shared.exchange() + place_in_output<C>(i), i, output);
    }
  }
  named_barrier_sync(kStreamsBarrier, 256);
  if (stream == 1) return;
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int query = i / 2 * 8 + thread % 4 * 2 + i % 2;
    const float first = shared.references(0)[query], second = shared.references(1)[query];
    const float higher = fmaxf(first, second);
    const float of_first = first == higher ? 1.f : exp2_fast(2.f * (first - higher));
    const float of_second = second == higher ? 1.f : exp2_fast(2.f * (second - higher));
    const float* const at = shared.exchange() + place_in_output<C>(i);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      float& a = output[panel][i / 2 * 4 + i % 2];
      float& b = output[panel][i / 2 * 4 + 2 + i % 2];
      const float* const of_panel = at + C::kPanelStep * panel;
      a = fmaf(a, of_first, of_panel[0] * of_second);
      b = fmaf(b, of_first, of_panel[C::kHalfStep] * of_second);
    }
  }
  stream_sync(0);  // every thread has read the references
  if (thread < C::kRows) {
    const float first = shared.references(0)[thread], second = shared.references(1)[thread];
    const float higher = fmaxf(first, second);
    const float of_first = first == higher ? 1.f : exp2_fast(2.f * (first - higher));
    const float of_second = second == higher ? 1.f : exp2_fast(2.f * (second - higher));
    shared.statistics(0, 0)[thread] =
        fmaf(sum_of(shared, 0, thread), of_first, sum_of(shared, 1, thread) * of_second);
    shared.references(0)[thread] = higher;
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) shared.statistics(0, warp)[thread] = 0.f;
  }
}

// A stream's result in elements, where its queries lay and laid out as they were.
template <class C>
__device__ __forceinline__ void pack_rows(const DecodeShared<C>& shared, int stream,
                                          const float (&output)[C::kPanels][C::kRows / 2]) {
  if constexpr (C::kMixed) {
    const int column = first_column<C>();
#pragma unroll
    for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
      const int query = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const float factor = shared.factors(stream)[query];
      const u32 address = shared.q(stream) + column / 64 * C::kRows * 128 + query * 128 +
                          ((column % 64 / 8) ^ (query % 8)) * 16 + column % 8 * 2;
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {  // two columns each
        const float* const at = output[panel] + i / 2 * 4 + i % 2;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + 4 * panel),
                     "r"(pack<typename C::Element>(at[0] * factor, at[2] * factor))
                     : "memory");
      }
    }
  } else {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      u32 packed[C::kRows / 4];
#pragma unroll
      for (int j = 0; j < C::kRows / 8; ++j) {
        const float a = shared.factors(stream)[8 * j + threadIdx.x % 4 * 2];
        const float b = shared.factors(stream)[8 * j + threadIdx.x % 4 * 2 + 1];
        const float* const at = output[panel] + 4 * j;
        packed[2 * j] = pack<typename C::Element>(at[0] * a, at[1] * b);
        packed[2 * j + 1] = pack<typename C::Element>(at[2] * a, at[3] * b);
      }
      store_probabilities<C>(shared.q(stream) + panel * C::kRows * 128, packed);
    }
  }
}

// The rows of a whole item, by way of the queries' shared memory, which are done with.
template <class C>
__device__ __forceinline__ void store_rows(const DecodeParams& params, const DecodeItem& item,
                                           const DecodeShared<C>& shared, int stream,
                                           float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
  if (thread < C::kRows) {
    const DecodeQuery query = *shared.query(stream, thread);
    const bool exists = query.token >= 0;
    const float sink = half_sink_log2<typename C::Element>(params, exists ? query.head : 0);
    const RowResult result =
        finish_query(sum_of(shared, stream, thread), shared.references(stream)[thread], sink);
    shared.factors(stream)[thread] = result.factor;
    if (exists) store_lse(params, item, query, result.lse);
  }
  stream_sync(stream);
  pack_rows<C>(shared, stream, output);
  stream_sync(stream);
  constexpr int kPieces = C::kHeadDim / 8;
  const int piece = thread % kPieces;
#pragma unroll 1
  for (int index = thread / kPieces; index < C::kRows; index += 128 / kPieces) {
    const DecodeQuery query = *shared.query(stream, index);
    u32 words[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared.q(stream) + piece / 8 * C::kRows * 128 + index * 128 +
                       ((piece % 8) ^ (index % 8)) * 16)
                 : "memory");
    store_16_if(out_of(params, item, query) + 8 * piece, words,
                query.token >= 0 && piece * 8 < params.head_dim_v);
  }
}

// Rows of out that belong to no query become 0, their lse -inf: one warp of each block.
__device__ __forceinline__ void clear_tokens(const DecodeParams& params, int batch, int begin,
                                             int end) {
  const int lane = threadIdx.x % 32, heads = params.heads_k * params.group;
#pragma unroll 1
  for (int i = 0; i < max(0, end - begin) * heads; ++i) {
    const int head = i % heads;
    const long long place = begin + i / heads;
    unsigned short* const out = static_cast<unsigned short*>(params.out) +
                                batch * params.out_batch_stride + place * params.out_row_stride +
                                head * params.out_head_stride;
#pragma unroll 1
    for (int column = lane; column < params.head_dim_v; column += 32) out[column] = 0;
    if (params.lse != nullptr && lane == 0) {
      params.lse[batch * params.lse_batch_stride + head * params.lse_head_stride + place] =
          minus_infinity();
    }
  }
}

__device__ __forceinline__ void clear_other_rows(const DecodeParams& params) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (int batch = block; batch < params.batch; batch += gridDim.x * gridDim.y * gridDim.z) {
    const int used =
        params.seqused_q != nullptr ? max(0, params.seqused_q[batch]) : params.seqlen_q;
    if (params.cu_seqlens_q == nullptr) {
      clear_tokens(params, batch, used, params.seqlen_q);
      continue;
    }
    const int begin = params.cu_seqlens_q[batch], end = params.cu_seqlens_q[batch + 1];
    if (params.seqused_q != nullptr) clear_tokens(params, batch, begin + used, end);
    if (batch == 0) clear_tokens(params, batch, 0, begin);
    if (batch == params.batch - 1) clear_tokens(params, batch, max(begin, end), params.seqlen_q);
  }
}

}  // namespace jit_kernel::hopper
