// Fixed ranges: what a part keeps of a sequence's ranges before, and how the next one joins it.
#pragma once

#include "flash_attention_v3/hopper/decode/epilogue.cuh"

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
      static_cast<long long>(min(params.all_tiles, params.parts)) * params.range_slots + part;
  return params.partials + (slots * params.heads_k + head) * C::kPartialFloats;
}

}  // namespace jit_kernel::hopper
