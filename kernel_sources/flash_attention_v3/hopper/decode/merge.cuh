// Partial results of an item that several parts share, or of a cluster, and their merge.
#pragma once

#include "flash_attention_v3/hopper/decode/ranges.cuh"

namespace jit_kernel::hopper {

// A partial result: kRows x kHeadDim of output, then half a reference (as exponent of 2) and a sum
// a row.
template <class C>
__device__ __forceinline__ float* partial_of(const DecodeParams& params, int part, int head,
                                             bool is_first) {
  const long long slot = (static_cast<long long>(part) * params.heads_k + head) * 2 + is_first;
  return params.partials + slot * C::kPartialFloats;
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

// Whether this part, with `arrivals` of `all` partial results, is the last one of an item to
// arrive; its own are written. The counter is zero again after the last.
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
        asm volatile(
            "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
            : "=f"(value[i].x), "=f"(value[i].y), "=f"(value[i].z), "=f"(value[i].w)
            : "r"(in_block(results + from * kResults + index * C::kHeadDim + 4 * quad, block))
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

}  // namespace jit_kernel::hopper
