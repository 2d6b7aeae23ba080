// The draft mask on cached keys: a bit of each query token for each of its sequence's last keys.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"

namespace jit_kernel::hopper {

// The row of the cache whose key has a draft mask's first bit; it may lie before the first key.
__device__ __forceinline__ int first_drafted(const CachedParams& params,
                                             const CachedTileInfo& tile) {
  return tile.leftpad + tile.len_k - 32 * params.draft_words;
}

// The words of a tile's row; a row behind the last query has those of the last.
__device__ __forceinline__ const int* draft_row(const CachedParams& params,
                                                const CachedTileInfo& tile, int row) {
  const int token = min(row >> params.pack_shift, tile.len_q - 1);
  const long long first = params.cu_seqlens_q != nullptr
                              ? tile.offset_q
                              : static_cast<long long>(tile.batch) * params.seqlen_q;
  return params.draft_mask + (first + token) * params.draft_mask_stride;
}

// Word `at` of a row: keys before the first one's are seen, those behind the last one's are no
// keys.
__device__ __forceinline__ u32 draft_word(const CachedParams& params, const int* row, int at) {
  const u32 word = row[max(0, min(at, params.draft_words - 1))];
  return at < 0 ? 0xffffffffu : word;
}

// Sets the scores that the draft mask hides to -inf. `row`: the tile's, of scores[0]; `column`: its
// row of the cache. The fragment is that of mask_scores. 32 keys a time, of two words, the second
// of which is kept: with both loaded for each 32 keys the narrowest heads' kernel spills.
template <int kCount>
__device__ __forceinline__ void mask_drafts(float (&scores)[kCount], const CachedParams& params,
                                            const CachedTileInfo& tile, int row, int column) {
  const int first = column - first_drafted(params, tile);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int* const words = draft_row(params, tile, row + 8 * r);
    u32 low = draft_word(params, words, first >> 5);
#pragma unroll
    for (int i = 0; i < kCount / 4; i += 4) {
      const u32 high = draft_word(params, words, (first >> 5) + i / 4 + 1);
      const u32 bits = __funnelshift_r(low, high, first);  // of the lower 5 bits of `first`
      low = high;
#pragma unroll
      for (int j = 0; j < 8 && i + j / 2 < kCount / 4; ++j) {
        float& score = scores[4 * (i + j / 2) + 2 * r + j % 2];
        score = bits >> (j / 2 * 8 + j % 2) & 1 ? score : minus_infinity();
      }
    }
  }
}

// Whether some query of a tile sees the key of a row of the cache. Of most keys the last one does.
template <class C>
__device__ __forceinline__ bool is_seen(const CachedParams& params, const CachedTileInfo& tile,
                                        int key) {
  const int rows = min(tile.row + C::kRows, tile_rows<C>(params, tile.len_q));
  const int bit = key - first_drafted(params, tile);
#pragma unroll 1
  for (int row = rows - 1; row >= tile.row; row -= 1 << params.pack_shift) {
    const KeyInterval keys = seen_keys<C>(params, tile, row);
    const u32 word = draft_word(params, draft_row(params, tile, row), bit >> 5);
    if (key >= keys.low && key < keys.high && word >> (bit & 31) & 1) return true;
  }
  return false;
}

}  // namespace jit_kernel::hopper
