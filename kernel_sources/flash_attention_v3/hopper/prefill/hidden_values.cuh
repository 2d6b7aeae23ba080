// Zeros for values that no row of a tile sees, in shared memory; a warpgroup writes them.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_drafts.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_values.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

// Where a tile's last query sees no more: what no row of a tile sees may hold anything, and a
// probability of 0 times NaN is NaN.
template <class C>
__device__ __forceinline__ int end_of_values(const ForwardParams& params, const TileInfo& tile) {
  if constexpr (!C::kMasked) return tile.len_k;
  const int last_row = min(tile.row + C::kRows, tile.len_q) - 1;
  return max(0, visible_keys<C::kMasked>(params, last_row, tile.len_q, tile.len_k).high);
}

// The first key that a row of a tile sees.
template <class C>
__device__ __forceinline__ int first_seen(const typename C::Params& params,
                                          const typename C::Info& tile) {
  if constexpr (C::kCached) return tile.low;
  return visible_keys<C::kMasked>(params, tile.row, tile.len_q, tile.len_k).low;
}

// Where in a block the keys end that some row of a tile sees; the block's end where the copy engine
// filled what follows with zeros.
template <class C>
__device__ __forceinline__ int end_in_block(const typename C::Params& params,
                                            const typename C::Info& tile, int block) {
  if constexpr (C::kCached) {
    return uniform(max(0, min(tile.high - block * C::kKeys, C::kKeys)));
  } else if constexpr (C::kPrepared) {
    return uniform(min(end_of_values<C>(params, tile) - block * C::kKeys, C::kKeys));
  } else {
    return C::kKeys;
  }
}

// Rows of a block of values at `v`.
template <class C>
__device__ __forceinline__ void clear_values(u32 v, int begin, int end) {
  constexpr int kRowBytes = C::kPanelV * 2, kPanelBytes = C::kKeys * kRowBytes, kPiece = 16;
  for (int at = begin * kRowBytes + threadIdx.x % 128 * kPiece; at < end * kRowBytes;
       at += 128 * kPiece) {
#pragma unroll
    for (int panel = 0; panel < C::kHeadDimV / C::kPanelV; ++panel) {
      store_zeros(v + panel * kPanelBytes + at);
    }
  }
}

// The keys that no row of the tile sees by the draft mask, a thread each.
template <class C>
__device__ __forceinline__ void clear_unseen_values(u32 v, const CachedParams& params,
                                                    const CachedTileInfo& tile, int block) {
  static_assert(C::kKeys <= 128, "a thread each");
  constexpr int kRowBytes = C::kPanelV * 2, kPiece = 16;
  const int key = threadIdx.x % 128;
  if (key >= C::kKeys) return;
  if (is_seen<C>(params, tile, block * C::kKeys + key)) return;
  const u32 row = v + key * kRowBytes;
#pragma unroll 1
  for (int panel = 0; panel < C::kHeadDimV / C::kPanelV; ++panel) {
#pragma unroll
    for (int at = 0; at < kRowBytes; at += kPiece) {
      store_zeros(row + panel * C::kKeys * kRowBytes + at);
    }
  }
}

}  // namespace jit_kernel::hopper
