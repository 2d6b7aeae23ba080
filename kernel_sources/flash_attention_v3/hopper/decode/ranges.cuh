// Fixed ranges: a sequence's ranges, or chains of ranges that are joined in turn, are the leaves of
// a tree, and two neighbours of one level become one result wherever they are computed, so that its
// bits are its own. A part joins what it has as it goes; only the largest nodes that it has as a
// whole, the beginning of a chain and the single ranges of its end are partial results.
#pragma once

#include "flash_attention_v3/hopper/decode/epilogue.cuh"
#include "flash_attention_v3/hopper/decode/schedule.cuh"

namespace jit_kernel::hopper {

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

// As join_streams does.
__device__ __forceinline__ float join(float first, float second, const JoinFactors& by) {
  return fmaf(first, by.first, second * by.second);
}

// The slot of the ranges from `range` on, of a sequence whose ranges several parts share.
template <class C>
__device__ __forceinline__ float* range_of(const DecodeParams& params, const DecodeItem& item,
                                           int range, int head) {
  const long long slot =
      (static_cast<long long>(item.first_part) * params.range_slots + range) * params.heads_k;
  return params.partials + (slot + head) * C::kPartialFloats;
}

// Where a stream keeps a level's result: what shared memory has no room for lies in the launch's.
// It is written and read once, with as much as keys bring into the L2 cache in between: to have 64
// rows of two heads of 132 blocks pushed out to memory and back takes as long as 6 % of their keys.
template <class C>
struct KeptLevel {
  static constexpr unsigned long long kEvictLast = 0x14F0000000000000ull,
                                      kEvictFirst = 0x12F0000000000000ull;
  const DecodeShared<C>& shared;
  int stream, level, thread;
  float4* outside;  // this level's

  __device__ __forceinline__ KeptLevel(const DecodeParams& params, const DecodeShared<C>& shared,
                                       int stream, int level, int part, int head, int thread)
      : shared(shared), stream(stream), level(level), thread(thread) {
    const int of_part = params.halves ? 2 * part + stream : part;
    const long long slot = static_cast<long long>(params.first_kept + of_part * params.kept_levels +
                                                  level - C::kSharedLevels) *
                               params.heads_k +
                           head;
    outside = reinterpret_cast<float4*>(params.partials + slot * C::kPartialFloats);
  }

  __device__ __forceinline__ bool is_shared(int unit) const {
    return level * C::kUnits + unit < C::kSharedUnits;
  }
  __device__ __forceinline__ void store(int unit, const float4& value) const {
    if (is_shared(unit)) {
      shared.kept_unit(stream, level * C::kUnits + unit)[thread] = value;
    } else {
      asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(
                       outside + unit * 128 + thread),
                   "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "l"(kEvictLast)
                   : "memory");
    }
  }
  __device__ __forceinline__ float4 load(int unit) const {
    if (is_shared(unit)) return shared.kept_unit(stream, level * C::kUnits + unit)[thread];
    float4 value;
    asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(outside + unit * 128 + thread), "l"(kEvictFirst)
                 : "memory");
    return value;
  }
};

// The references and sums of a node: each thread has the references of its queries, and the first
// kRows a row's reference and sum.
template <class C>
struct NodeEnds {
  static constexpr int kQueries = DecodeSoftmax<C>::kQueries;
  float references[kQueries];
  float row_reference, row_sum;

  __device__ __forceinline__ NodeEnds(const DecodeShared<C>& shared, int stream, int thread) {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      references[i] = shared.references(stream)[i / 2 * 8 + thread % 4 * 2 + i % 2];
    }
    if (thread < C::kRows) {
      row_reference = shared.references(stream)[thread];
      row_sum = sum_of(shared, stream, thread);
    }
  }

  // As gather_statistics leaves them.
  __device__ __forceinline__ void store(const DecodeShared<C>& shared, int stream,
                                        int thread) const {
    if (thread >= C::kRows) return;
    shared.references(stream)[thread] = row_reference;
    shared.statistics(stream, 0)[thread] = row_sum;
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) shared.statistics(stream, warp)[thread] = 0.f;
  }
};

// A node joins the one of the same level before it, which was kept.
template <class C>
__device__ __forceinline__ void join_kept(const KeptLevel<C>& kept, NodeEnds<C>& ends,
                                          float (&output)[C::kPanels][C::kRows / 2]) {
  // Pairs of queries whose numbers are on their way at once: as many as registers allow.
  constexpr int kPairs = C::kRows / 8, kAtOnce = kPairs > 4 ? 4 : kPairs;
  const int thread = kept.thread;
  const float2* const kept_ends = kept.shared.kept_ends(kept.stream, kept.level);
#pragma unroll
  for (int begin = 0; begin < kPairs; begin += kAtOnce) {
    float4 before[kAtOnce][C::kPanels];
#pragma unroll
    for (int i = 0; i < kAtOnce * C::kPanels; ++i) {
      const int pair = i / C::kPanels, panel = i % C::kPanels;
      before[pair][panel] = kept.load(panel * kPairs + begin + pair);
    }
#pragma unroll
    for (int pair = 0; pair < kAtOnce; ++pair) {
      JoinFactors by[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& reference = ends.references[2 * (begin + pair) + c];
        by[c] = join_factors(kept_ends[(begin + pair) * 8 + thread % 4 * 2 + c].x, reference);
        reference = by[c].top;
      }
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        float* const at = output[panel] + 4 * (begin + pair);
        const float4& first = before[pair][panel];
        at[0] = join(first.x, at[0], by[0]);
        at[1] = join(first.y, at[1], by[1]);
        at[2] = join(first.z, at[2], by[0]);
        at[3] = join(first.w, at[3], by[1]);
      }
    }
  }
  if (thread < C::kRows) {
    const float2 first = kept_ends[thread];
    const JoinFactors by = join_factors(first.x, ends.row_reference);
    ends.row_sum = join(first.y, ends.row_sum, by);
    ends.row_reference = by.top;
  }
}

template <class C>
__device__ __forceinline__ void keep(const KeptLevel<C>& kept, const NodeEnds<C>& ends,
                                     const float (&output)[C::kPanels][C::kRows / 2]) {
  constexpr int kPairs = C::kRows / 8;
#pragma unroll
  for (int unit = 0; unit < C::kUnits; ++unit) {
    const float* const at = output[unit / kPairs] + 4 * (unit % kPairs);
    kept.store(unit, {at[0], at[1], at[2], at[3]});
  }
  if (kept.thread < C::kRows) {
    kept.shared.kept_ends(kept.stream, kept.level)[kept.thread] = {ends.row_reference,
                                                                   ends.row_sum};
  }
}

// Where a result goes next: joined to the one that a level keeps, kept there itself, or neither.
struct ClimbStep {
  bool joins, keeps;
  int count;  // ranges of the joined result
  int level;  // where results are kept
};

// Of a result of the `count` ranges that end with the item's, of which 2^level are a node.
__device__ __forceinline__ ClimbStep next_step(const DecodeItem& item, int chain, int count,
                                               int level) {
  const int range = item.range;
  ClimbStep step;
  if (count < 1 << chain) {
    const int begin = range >> chain << chain;
    const bool is_second = range + 1 - count > begin;
    step.joins = item.from <= begin && is_second;
    step.keeps = item.from <= begin && !is_second && range + 1 < item.to;
    step.count = range + 1 - begin;
    step.level = 0;
    return step;
  }
  const int parent = range >> level + 1 << level + 1;
  const bool is_here = parent >= item.from && parent + (2 << level) <= item.to;
  step.joins = is_here && (range >> level & 1) == 1;
  step.keeps = is_here && (range >> level & 1) == 0;
  step.count = 2 * count;
  step.level = level - chain + (chain > 0);
  return step;
}

// A range's result, with its statistics gathered, is joined to those before it as far as this part
// has them and their order says. How many ranges it is then of, with its statistics where the
// range's were; 0: it is kept for what comes behind it.
template <class C>
__device__ __forceinline__ int climb(const DecodeParams& params, const DecodeItem& item,
                                     const DecodeShared<C>& shared, int stream, int part, int head,
                                     float (&output)[C::kPanels][C::kRows / 2]) {
  stream_sync(stream);  // the statistics are there
  int thread = threadIdx.x % 128;
  // As in merge_in_cluster: nothing of this is worked out in front of the loop over items.
  asm volatile("" : "+r"(thread));
  NodeEnds<C> ends(shared, stream, thread);
  const int chain = chain_log2<C::kRows>(params, item);
  int count = 1, level = chain;
#pragma unroll 1
  while (true) {
    const ClimbStep step = next_step(item, chain, count, level);
    if (!step.joins && !step.keeps) break;
    const KeptLevel<C> kept(params, shared, stream, step.level, part, head, thread);
    if (step.keeps) {
      keep<C>(kept, ends, output);
      return 0;
    }
    join_kept<C>(kept, ends, output);
    if (step.count > 1 << level) ++level;
    count = step.count;
  }
  if (count > 1) {
    stream_sync(stream);  // every thread has read the range's
    ends.store(shared, stream, thread);
  }
  return count;
}

}  // namespace jit_kernel::hopper
