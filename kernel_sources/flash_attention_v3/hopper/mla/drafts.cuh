// Draft masks of a buffer of 64 keys: which of them a query token sees, a bit each.
#pragma once

#include "flash_attention_v3/hopper/mla/mixed_queries.cuh"

namespace jit_kernel::hopper {

// Whether a buffer whose first key is `row` of the cache has one with a bit in the draft mask:
// asked where not all rows see all keys, so that other buffers do not pay for it.
__device__ __forceinline__ bool has_mla_drafts(const MlaParams& params, const DecodeItem& item,
                                               int row) {
  return params.draft_mask != nullptr && row + kMlaKeys > first_draft(params, item);
}

// By the draft mask alone; older keys are seen. A row without a query has nobody to hide from.
__device__ __forceinline__ u64 drafts_of(const MlaParams& params, const DecodeItem& item, int token,
                                         int row) {
  if (token < 0) return ~0ull;
  const long long index = params.cu_seqlens_q != nullptr
                              ? item.offset_q + token
                              : static_cast<long long>(item.batch) * params.seqlen_q + token;
  const int* const words = params.draft_mask + index * params.draft_mask_stride;
  const int bit = row - item.leftpad - item.len_k + 32 * params.draft_words;
  u32 three[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int at = (bit >> 5) + i;
    three[i] = at < 0 ? ~0u : at < params.draft_words ? static_cast<u32>(words[at]) : 0u;
  }
  return static_cast<u64>(__funnelshift_r(three[1], three[2], bit)) << 32 |
         __funnelshift_r(three[0], three[1], bit);
}

// Those of the 64 keys from `row` on that lie in [low, high).
__device__ __forceinline__ u64 keys_between(int low, int high, int row) {
  const int begin = min(max(low - row, 0), kMlaKeys), end = min(max(high - row, 0), kMlaKeys);
  const u64 below = begin < kMlaKeys ? (1ull << begin) - 1 : ~0ull;
  const u64 up_to = end < kMlaKeys ? (1ull << end) - 1 : ~0ull;
  return up_to & ~below;
}

// Those that some query of the tile sees.
template <class C>
__device__ __forceinline__ u64 seen_keys(const MlaParams& params, const MlaShared<C>& shared,
                                         const DecodeItem& item, int row) {
  const u64 between = keys_between(item.low, end_of_keys(item), row);
  if (!has_mla_drafts(params, item, row)) return between;
  u64 seen = 0;
  int before = -1;
#pragma unroll 1
  for (int i = 0; i < C::kRows; ++i) {  // a token's rows lie side by side
    const DecodeQuery query = *shared.query(i);
    if (query.token < 0) break;
    if (query.token == before) continue;
    before = query.token;
    seen |= drafts_of(params, item, before, row) & keys_between(query.low, query.high, row);
  }
  return seen & between;
}

}  // namespace jit_kernel::hopper
