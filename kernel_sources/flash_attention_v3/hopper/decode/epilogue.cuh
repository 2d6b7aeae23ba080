// The end of an item: results of a whole one, partial results of a shared one and their merge.
#pragma once

#include "flash_attention_v3/hopper/common/epilogue.cuh"
#include "flash_attention_v3/hopper/decode/params.h"
#include "flash_attention_v3/hopper/decode/softmax.cuh"

namespace jit_kernel::hopper {

// Where the result of a query goes.
__device__ __forceinline__ unsigned short* out_of(const DecodeParams& params,
                                                  const DecodeItem& item, const DecodeQuery& query) {
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

// The factor of a row's accumulated output, and its lse. `reference` as exponent of 2.
__device__ __forceinline__ RowResult finish_query(float sum, float reference, float sink_log2) {
  const float kLn2 = 0.69314718056f;
  const float top = fmaxf(reference, sink_log2);
  const bool none = top == minus_infinity();
  const float base = none ? 0.f : top;
  const float shift = reference == top ? 1.f : exp2_fast(reference - base);
  const float total = fmaf(sum, shift, sink_log2 == top ? 1.f : exp2_fast(sink_log2 - base));
  return {none ? 0.f : __fdividef(shift, total),
          none ? minus_infinity() : (base + __log2f(total)) * kLn2};
}

// The sums over all threads, and the references (as exponents of 2), to shared memory.
template <class C>
__device__ __forceinline__ void gather_statistics(const DecodeShared<C>& shared,
                                                  const DecodeSoftmax<C>& state, float scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int query = i / 2 * 8 + lane % 4 * 2 + i % 2;
    const float sum = over_keys_of_warp(state.sum[i], Sum());
    if (lane < 4) shared.statistics(warp)[query] = sum;
    if (warp == 0 && lane < 4) {
      const float reference = state.reference[i];
      shared.references()[query] =
          reference == minus_infinity() ? minus_infinity() : reference * scale;
    }
  }
  consumers_sync();
}

template <class C>
__device__ __forceinline__ float sum_of(const DecodeShared<C>& shared, int query) {
  return shared.statistics(0)[query] + shared.statistics(1)[query] +
         (shared.statistics(2)[query] + shared.statistics(3)[query]);
}

// The rows of a whole item, by way of the queries' shared memory, which are done with.
template <class C>
__device__ __forceinline__ void store_rows(const DecodeParams& params, const DecodeItem& item,
                                           const DecodeShared<C>& shared,
                                           float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
  if (thread < C::kRows) {
    const DecodeQuery query = *shared.query(thread);
    const bool exists = query.token >= 0;
    const float sink = sink_log2<typename C::Element>(params, exists ? query.head : 0);
    const RowResult result =
        finish_query(sum_of(shared, thread), shared.references()[thread], sink);
    shared.factors()[thread] = result.factor;
    if (exists) store_lse(params, item, query, result.lse);
  }
  consumers_sync();
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    u32 packed[C::kRows / 4];
#pragma unroll
    for (int j = 0; j < C::kRows / 8; ++j) {
      const float a = shared.factors()[8 * j + thread % 4 * 2];
      const float b = shared.factors()[8 * j + thread % 4 * 2 + 1];
      const float* const at = output[panel] + 4 * j;
      packed[2 * j] = pack<typename C::Element>(at[0] * a, at[1] * b);
      packed[2 * j + 1] = pack<typename C::Element>(at[2] * a, at[3] * b);
    }
    store_probabilities<C>(shared.q() + panel * C::kRows * 128, packed);
  }
  consumers_sync();
  constexpr int kPieces = C::kHeadDim / 8;
  const int piece = thread % kPieces;
#pragma unroll 1
  for (int index = thread / kPieces; index < C::kRows; index += 128 / kPieces) {
    const DecodeQuery query = *shared.query(index);
    u32 words[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared.q() + piece / 8 * C::kRows * 128 + index * 128 +
                       ((piece % 8) ^ (index % 8)) * 16)
                 : "memory");
    store_16_if(out_of(params, item, query) + 8 * piece, words,
                query.token >= 0 && piece * 8 < params.head_dim_v);
  }
}

// A partial result: kRows x kHeadDim of output, then a reference (as exponent of 2) and a sum a row.
template <class C>
__device__ __forceinline__ float* partial_of(const DecodeParams& params, int part, int head,
                                             bool is_first) {
  const long long slot = (static_cast<long long>(part) * params.heads_k + head) * 2 + is_first;
  return params.partials + slot * C::kPartialFloats;
}

template <class C>
__device__ __forceinline__ void store_partial(const DecodeShared<C>& shared, float* partial,
                                              float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int query = i / 2 * 8 + thread % 4 * 2 + i % 2;
    float* const row = partial + query * C::kHeadDim + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      row[64 * panel] = output[panel][i / 2 * 4 + i % 2];
      row[64 * panel + 8] = output[panel][i / 2 * 4 + 2 + i % 2];
    }
  }
  if (thread < C::kRows) {
    float* const end = partial + C::kRows * C::kHeadDim + 2 * thread;
    end[0] = shared.references()[thread];
    end[1] = sum_of(shared, thread);
  }
}

// Whether this part is the last one of an item to arrive; its partial result is written. The counter
// is zero again after the last.
__device__ __forceinline__ bool arrive_last(const DecodeParams& params, const DecodeItem& item,
                                            int head, volatile int* answer) {
  __threadfence();
  consumers_sync();
  if (threadIdx.x % 128 == 0) {
    int* const counter = params.counters + item.first_part * params.heads_k + head;
    const bool last = atomicAdd(counter, 1) == item.parts - 1;
    if (last) *counter = 0;
    __threadfence();
    *answer = last;
  }
  consumers_sync();
  return *answer != 0;
}

__device__ __forceinline__ float4 load_other(const float* address) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float2 load_other_pair(const float* address) {
  float2 value;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "l"(address)
               : "memory");
  return value;
}

// Merges the parts of an item in their order, four numbers of a row a thread.
template <class C>
__device__ __forceinline__ void merge_parts(const DecodeParams& params, const DecodeItem& item,
                                            const DecodeShared<C>& shared, int head) {
  constexpr int kQuads = C::kHeadDim / 4;
  const int rows = min(C::kRows, item.len_q * params.group);
#pragma unroll 1
  for (int at = threadIdx.x % 128; at < rows * kQuads; at += 128) {
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    float top = minus_infinity(), sum = 0.f;
    float4 total = {0.f, 0.f, 0.f, 0.f};
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = 0; first < item.parts; first += kAtOnce) {
      float4 value[kAtOnce];
      float2 end[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = min(first + i, item.parts - 1);
        const float* const partial =
            partial_of<C>(params, item.first_part + part, head, part == 0);
        value[i] = load_other(partial + index * C::kHeadDim + 4 * quad);
        end[i] = load_other_pair(partial + C::kRows * C::kHeadDim + 2 * index);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= item.parts || end[i].x == minus_infinity()) continue;
        const float higher = fmaxf(top, end[i].x);
        const float old = top == higher ? 1.f : exp2_fast(top - higher);
        const float now = end[i].x == higher ? 1.f : exp2_fast(end[i].x - higher);
        top = higher;
        sum = fmaf(sum, old, end[i].y * now);
        total.x = fmaf(total.x, old, value[i].x * now);
        total.y = fmaf(total.y, old, value[i].y * now);
        total.z = fmaf(total.z, old, value[i].z * now);
        total.w = fmaf(total.w, old, value[i].w * now);
      }
    }
    const DecodeQuery query = *shared.query(index);
    const RowResult result =
        finish_query(sum, top, sink_log2<typename C::Element>(params, query.head));
    if (quad == 0) store_lse(params, item, query, result.lse);
    const u32 words[2] = {
        pack<typename C::Element>(total.x * result.factor, total.y * result.factor),
        pack<typename C::Element>(total.z * result.factor, total.w * result.factor)};
    *reinterpret_cast<uint2*>(out_of(params, item, query) + 4 * quad) = {words[0], words[1]};
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
#pragma unroll 1
  for (int batch = blockIdx.x; batch < params.batch; batch += gridDim.x) {
    const int used = params.seqused_q != nullptr ? max(0, params.seqused_q[batch]) : params.seqlen_q;
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
