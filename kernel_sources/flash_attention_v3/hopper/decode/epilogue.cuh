// The end of an item: results of a whole one, partial results of a shared one and their merge.
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

// Where a thread's part of query `i` lies in kRows x kHeadDim numbers.
template <class C>
__device__ __forceinline__ int place_in_output(int i) {
  const int thread = threadIdx.x % 128;
  const int query = i / 2 * 8 + thread % 4 * 2 + i % 2;
  return query * C::kHeadDim + thread / 32 * 16 + thread % 32 / 4;
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
      float* const at = shared.exchange() + place_in_output<C>(i);
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        at[64 * panel] = output[panel][i / 2 * 4 + i % 2];
        at[64 * panel + 8] = output[panel][i / 2 * 4 + 2 + i % 2];
      }
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
      a = fmaf(a, of_first, at[64 * panel] * of_second);
      b = fmaf(b, of_first, at[64 * panel + 8] * of_second);
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

// What two results over different keys are multiplied by to become one, of halves of references.
struct JoinFactors {
  float top, first, second;
};

__device__ __forceinline__ JoinFactors join_factors(float first, float second) {
  const float top = fmaxf(first, second);
  // -inf less -inf is no number.
  return {top, first == top ? 1.f : exp2_fast(2.f * (first - top)),
          second == top ? 1.f : exp2_fast(2.f * (second - top))};
}

// The one order in which ranges are summed: that of their indices, one after the other. So a
// sequence has the same bits wherever its ranges are computed and merged.
__device__ __forceinline__ float join(float first, float second, const JoinFactors& by) {
  return fmaf(second, by.second, first * by.first);
}

// A range's result joins what was kept of those before it. `kept`: a thread's numbers lie apart
// from each other, those of neighbouring threads side by side.
template <class C>
__device__ __forceinline__ void join_kept(const DecodeShared<C>& shared, int stream,
                                          const float* kept,
                                          float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int query = i / 2 * 8 + thread % 4 * 2 + i % 2;
    const JoinFactors by =
        join_factors(shared.kept_references(stream)[query], shared.references(stream)[query]);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& number = output[panel][i / 2 * 4 + 2 * half + i % 2];
        const int place = ((panel * DecodeSoftmax<C>::kQueries + i) * 2 + half) * 128 + thread;
        number = join(kept[place], number, by);
      }
    }
  }
  stream_sync(stream);  // every thread has read the references
  if (thread < C::kRows) {
    const JoinFactors by =
        join_factors(shared.kept_references(stream)[thread], shared.references(stream)[thread]);
    shared.statistics(stream, 0)[thread] =
        join(shared.kept_sums(stream)[thread], sum_of(shared, stream, thread), by);
    shared.references(stream)[thread] = by.top;
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) shared.statistics(stream, warp)[thread] = 0.f;
  }
}

template <class C>
__device__ __forceinline__ void keep(const DecodeShared<C>& shared, int stream, float* kept,
                                     const float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        kept[((panel * DecodeSoftmax<C>::kQueries + i) * 2 + half) * 128 + thread] =
            output[panel][i / 2 * 4 + 2 * half + i % 2];
      }
    }
  }
  if (thread < C::kRows) {
    shared.kept_references(stream)[thread] = shared.references(stream)[thread];
    shared.kept_sums(stream)[thread] = sum_of(shared, stream, thread);
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
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    u32 packed[C::kRows / 4];
#pragma unroll
    for (int j = 0; j < C::kRows / 8; ++j) {
      const float a = shared.factors(stream)[8 * j + thread % 4 * 2];
      const float b = shared.factors(stream)[8 * j + thread % 4 * 2 + 1];
      const float* const at = output[panel] + 4 * j;
      packed[2 * j] = pack<typename C::Element>(at[0] * a, at[1] * b);
      packed[2 * j + 1] = pack<typename C::Element>(at[2] * a, at[3] * b);
    }
    store_probabilities<C>(shared.q(stream) + panel * C::kRows * 128, packed);
  }
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

// A partial result: kRows x kHeadDim of output, then half a reference (as exponent of 2) and a sum
// a row.
template <class C>
__device__ __forceinline__ float* partial_of(const DecodeParams& params, int part, int head,
                                             bool is_first) {
  const long long slot = (static_cast<long long>(part) * params.heads_k + head) * 2 + is_first;
  return params.partials + slot * C::kPartialFloats;
}

// The slot of a range of a sequence whose ranges several parts share.
template <class C>
__device__ __forceinline__ float* range_of(const DecodeParams& params, const DecodeItem& item,
                                           int range, int head) {
  const long long slot =
      (static_cast<long long>(item.first_part) * params.range_slots + range) * params.heads_k;
  return params.partials + (slot + head) * C::kPartialFloats;
}

// Where a part keeps the result of the ranges before.
template <class C>
__device__ __forceinline__ float* kept_of(const DecodeParams& params, const DecodeShared<C>& shared,
                                          int stream, int part, int head) {
  if constexpr (C::kKeepsInShared) return shared.kept(stream);
  const long long slots =
      static_cast<long long>(min(params.batch, params.parts)) * params.range_slots + part;
  return params.partials + (slots * params.heads_k + head) * C::kPartialFloats;
}

template <class C>
__device__ __forceinline__ void store_partial(const DecodeShared<C>& shared, int stream,
                                              float* partial,
                                              float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    float* const at = partial + place_in_output<C>(i);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      at[64 * panel] = output[panel][i / 2 * 4 + i % 2];
      at[64 * panel + 8] = output[panel][i / 2 * 4 + 2 + i % 2];
    }
  }
  if (thread < C::kRows) {
    float* const end = partial + C::kRows * C::kHeadDim + 2 * thread;
    end[0] = shared.references(stream)[thread];
    end[1] = sum_of(shared, stream, thread);
  }
}

// Whether this part, with `arrivals` of `all` partial results, is the last one of an item to arrive;
// its own are written. The counter is zero again after the last.
__device__ __forceinline__ bool arrive_last(const DecodeParams& params, const DecodeItem& item,
                                            int arrivals, int all, int head, int stream,
                                            volatile int* answer) {
  stream_sync(stream);
  if (threadIdx.x % 128 == 0) {
    int* const counter = params.counters + item.first_part * params.heads_k + head;
    int before;
    // Releases what the barrier has gathered from the stream's threads, acquires what the others
    // did.
    asm volatile("fence.acq_rel.gpu;\natom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(arrivals)
                 : "memory");
    const bool last = before + arrivals == all;
    if (last) *counter = 0;
    *answer = last;
  }
  stream_sync(stream);
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

// Four neighbouring numbers of a row, summed over parts with their weights.
struct MergedQuad {
  float top = minus_infinity(), sum = 0.f;
  float4 total = {0.f, 0.f, 0.f, 0.f};

  template <int kCount>
  __device__ __forceinline__ void add(const float4 (&value)[kCount], const float2 (&end)[kCount]) {
    float higher = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) higher = fmaxf(higher, end[i].x);
    // -inf less -inf is no number: parts without a key are skipped.
    const float old = top == higher ? 1.f : exp2_fast(2.f * (top - higher));
    top = higher;
    sum *= old;
    total = {total.x * old, total.y * old, total.z * old, total.w * old};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = end[i].x == minus_infinity() ? 0.f
                           : end[i].x == higher         ? 1.f
                                                        : exp2_fast(2.f * (end[i].x - higher));
      sum = fmaf(end[i].y, weight, sum);
      total.x = fmaf(value[i].x, weight, total.x);
      total.y = fmaf(value[i].y, weight, total.y);
      total.z = fmaf(value[i].z, weight, total.z);
      total.w = fmaf(value[i].w, weight, total.w);
    }
  }

  // The next of `count` ranges, of which the first one begins the sum where `begins` says so.
  template <int kCount>
  __device__ __forceinline__ void join_ranges(const float4 (&value)[kCount],
                                              const float2 (&end)[kCount], int count, bool begins) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) break;
      if (i == 0 && begins) {
        top = end[0].x;
        sum = end[0].y;
        total = value[0];
        continue;
      }
      const JoinFactors by = join_factors(top, end[i].x);
      top = by.top;
      sum = join(sum, end[i].y, by);
      total = {join(total.x, value[i].x, by), join(total.y, value[i].y, by),
               join(total.z, value[i].z, by), join(total.w, value[i].w, by)};
    }
  }

  template <class Element>
  __device__ __forceinline__ void store(const DecodeParams& params, const DecodeItem& item,
                                        const DecodeQuery& query, int quad) const {
    const RowResult result = finish_query(sum, top, half_sink_log2<Element>(params, query.head));
    if (quad == 0) store_lse(params, item, query, result.lse);
    const u32 words[2] = {pack<Element>(total.x * result.factor, total.y * result.factor),
                          pack<Element>(total.z * result.factor, total.w * result.factor)};
    *reinterpret_cast<uint2*>(out_of(params, item, query) + 4 * quad) = {words[0], words[1]};
  }
};

// Merges the parts of an item, or the ranges of its sequence, in their order, four numbers of a row
// a thread.
template <class C>
__device__ __forceinline__ void merge_parts(const DecodeParams& params, const DecodeItem& item,
                                            const DecodeShared<C>& shared, int stream, int head) {
  constexpr int kQuads = C::kHeadDim / 4;
  constexpr int kAtOnce = C::kRows <= 16 ? 8 : 4;  // loads on their way
  const int rows = min(C::kRows, item.len_q * params.group);
  const bool of_ranges = item.ranges > 0;
  const float* const first = of_ranges ? range_of<C>(params, item, item.merge_from, head)
                                       : partial_of<C>(params, item.first_part, head, false);
  const int step = (of_ranges ? 1 : 2) * params.heads_k * C::kPartialFloats;
  const int count = of_ranges ? item.ranges - item.merge_from : item.parts;
  // The first part wrote the end of its run, the others the beginning of theirs.
  const int more_of_first = of_ranges ? 0 : C::kPartialFloats;
#pragma unroll 1
  for (int at = threadIdx.x % 128; at < rows * kQuads; at += 128) {
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    const float* const of_thread = first + index * C::kHeadDim + 4 * quad;
    const float* const of_row = first + C::kRows * C::kHeadDim + 2 * index;
    MergedQuad merged;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kAtOnce) {
      float4 value[kAtOnce];
      float2 end[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = min(begin + i, count - 1);
        const int offset = part * step + (part == 0 ? more_of_first : 0);
        value[i] = load_other(of_thread + offset);
        end[i] = load_other_pair(of_row + offset);
        if (begin + i >= count) end[i].x = minus_infinity();
      }
      if (of_ranges) {
        merged.join_ranges(value, end, count - begin, begin == 0);
      } else {
        merged.add(value, end);
      }
    }
    merged.store<typename C::Element>(params, item, *shared.query(stream, index), quad);
  }
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address of the same place in another block's shared memory.
__device__ __forceinline__ u32 in_block(const void* pointer, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// The results of a cluster's streams, each in its own shared memory, become one: each of its
// threads has some of the numbers. All consumer threads; both streams of a block have the same
// head.
template <class C>
__device__ __forceinline__ void merge_in_cluster(const DecodeParams& params, const DecodeItem& item,
                                                 const DecodeShared<C>& shared, int stream,
                                                 int part,
                                                 float (&output)[C::kPanels][C::kRows / 2]) {
  constexpr int kQuads = C::kHeadDim / 4, kResults = C::kRows * C::kHeadDim;
  // The tiles' memory is done with once both streams are through.
  named_barrier_sync(kStreamsBarrier, 128 * C::kStreams);
  float* const results = reinterpret_cast<float*>(shared.base + C::kOffsetTiles);
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    float* const at = results + stream * kResults + place_in_output<C>(i);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      at[64 * panel] = output[panel][i / 2 * 4 + i % 2];
      at[64 * panel + 8] = output[panel][i / 2 * 4 + 2 + i % 2];
    }
  }
  const int thread = threadIdx.x % 128;
  // References and sums where the queries lay.
  float2* const ends = reinterpret_cast<float2*>(shared.base);
  if (thread < C::kRows) {
    ends[stream * C::kRows + thread] = {shared.references(stream)[thread],
                                        sum_of(shared, stream, thread)};
  }
  cluster_sync();
  const int rows = min(C::kRows, item.len_q * params.group);
  const bool of_ranges = item.ranges > 0;
  constexpr int kThreads = 128 * C::kStreams * kClusterParts;
#pragma unroll 1
  for (int at = (threadIdx.x - 128) * kClusterParts + part; at < rows * kQuads; at += kThreads) {
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    MergedQuad merged;
#pragma unroll 1
    for (int of = 0; of < C::kStreams; ++of) {
      float4 value[kClusterParts];
      float2 end[kClusterParts];
#pragma unroll
      for (int i = 0; i < kClusterParts; ++i) {
        // Ranges in their order: a block's streams have two neighbouring ones.
        const int from = of_ranges ? i % 2 : of;
        const int block = of_ranges ? (of * kClusterParts + i) / 2 : i;
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(value[i].x), "=f"(value[i].y), "=f"(value[i].z), "=f"(value[i].w)
                     : "r"(in_block(results + from * kResults + index * C::kHeadDim + 4 * quad,
                                    block))
                     : "memory");
        asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                     : "=f"(end[i].x), "=f"(end[i].y)
                     : "r"(in_block(ends + from * C::kRows + index, block))
                     : "memory");
      }
      if (of_ranges) {
        merged.join_ranges(value, end, item.ranges - of * kClusterParts, of == 0);
      } else {
        merged.add(value, end);
      }
    }
    merged.store<typename C::Element>(params, item, *shared.query(stream, index), quad);
  }
  cluster_sync();  // no block leaves while another one reads its memory
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
