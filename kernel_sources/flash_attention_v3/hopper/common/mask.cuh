// Which keys a query sees: causal, window and chunk as one interval [low, high) for each row.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"
#include "jit_kernel/cuda/math.cuh"

namespace jit_kernel::hopper {

// The interval of visible keys of query `row`; both ends never decrease from row to row.
struct KeyInterval {
  int low, high;
};

// floor(position / chunk) for 0 <= position < 2^31: a division takes registers that the widest
// tiles lack.
template <class Params>
__device__ __forceinline__ int chunk_of(const Params& params, int position) {
  return __umulhi(2u * position, params.chunk_multiplier) >> params.chunk_shift;
}

template <bool kMasked, class Params>
__device__ __forceinline__ KeyInterval visible_keys(const Params& params, int row, int len_q,
                                                    int len_k) {
  if constexpr (!kMasked) return {0, len_k};
  const int position = row + len_k - len_q;
  int low = max(0, position - params.window_left);
  int high = min(len_k, position + params.window_right + 1);
  if (params.chunk > 0) {
    // Rounds towards minus infinity: a query before the first key sees none.
    const int sign = position >> 31;
    const int begin = ((chunk_of(params, position ^ sign)) ^ sign) * params.chunk;
    low = max(low, begin);
    high = min(high, begin + params.chunk);
  }
  return {low, high};
}

// Sets the scores of keys from `high` on, or of those before `low`, to -inf, row by row. `column`
// is the key of scores[0]; the fragment holds columns 8 j + {0, 1} of the thread's two rows.
template <bool kHigh, int kCount>
__device__ __forceinline__ void mask_scores(float (&scores)[kCount], const KeyInterval (&rows)[2],
                                            int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int edge = (kHigh ? rows[r].high : rows[r].low) - column;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const bool visible = kHigh ? 8 * i + c < edge : 8 * i + c >= edge;
        float& score = scores[4 * i + 2 * r + c];
        score = visible ? score : minus_infinity();
      }
    }
  }
}

}  // namespace jit_kernel::hopper
