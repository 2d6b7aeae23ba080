// Which keys a tile of packed query rows sees; decode/schedule.cuh cuts all sequences' blocks of
// them into equal runs, one for each of the tile's thread blocks. Neighbouring thread blocks are
// the tiles of one run, so that they read the same keys at the same time.
#pragma once

#include "flash_attention_v3/hopper/decode/schedule.cuh"
#include "flash_attention_v3/hopper/mla/config.h"
#include "flash_attention_v3/hopper/mla/params.h"

namespace jit_kernel::hopper {

__device__ __forceinline__ int first_row_of_tile(const MlaParams& params) {
  return static_cast<int>(blockIdx.x) % params.row_tiles * kMlaTileRows;
}

// A tile is of rows here: a sequence's tokens are not cut.
__device__ __forceinline__ int sequence_of(const MlaParams&, int tile) { return tile; }
__device__ __forceinline__ TileTokens tokens_of(const MlaParams&, int, int len_q) {
  return {0, len_q};
}

__device__ __forceinline__ SeenRows seen_rows(const MlaParams& params, const DecodeLengths& of,
                                              const TileTokens&) {
  const int first = first_row_of_tile(params), rows = of.len_q * params.group;
  if (first >= rows) return {0, 0, 0};
  const int last = min(first + kMlaTileRows, rows) - 1;
  const int first_token = divide(first, params.group_multiplier, params.group_shift);
  const int last_token = divide(last, params.group_multiplier, params.group_shift);
  const int low = max(0, visible_keys<true>(params, first_token, of.len_q, of.len_k).low);
  const int high = visible_keys<true>(params, last_token, of.len_q, of.len_k).high;
  SeenRows seen;
  seen.low = of.leftpad + low;
  seen.high = of.leftpad + max(low, high);
  const int blocks = (seen.high + kMlaBlockKeys - 1) / kMlaBlockKeys - seen.low / kMlaBlockKeys;
  seen.cost = high > low ? blocks : 1;
  return seen;
}

// Where no sequence is cut, all blocks of one are one range.
__device__ __forceinline__ RangeCuts range_cuts(const MlaParams&, int, unsigned) {
  return {0, false};
}

using MlaSchedule = ScheduleOf<MlaParams, kMlaBlockKeys>;

// The end of the keys that an item covers: a block behind it is another part's.
__device__ __forceinline__ int end_of_keys(const DecodeItem& item) {
  return min(item.high, item.end[0] * kMlaBlockKeys);
}

// The first row of the cache with a bit in the draft mask, where there is one.
__device__ __forceinline__ int first_draft(const MlaParams& params, const DecodeItem& item) {
  return item.leftpad + item.len_k - 32 * params.draft_words;
}

}  // namespace jit_kernel::hopper
