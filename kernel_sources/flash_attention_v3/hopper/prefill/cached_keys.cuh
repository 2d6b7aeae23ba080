// Coordinates: of packed query rows, of the cached rows that they see, and of pages. Without a
// cache they are the sequence's own rows and keys.
#pragma once

#include "flash_attention_v3/hopper/common/mask.cuh"
#include "flash_attention_v3/hopper/common/sequence.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"

namespace jit_kernel::hopper {

// Whether keys and values come by the copy engine.
template <class C>
__device__ __forceinline__ bool uses_boxes(const typename C::Params& params) {
  if constexpr (C::kCached) return params.box_rows > 0;
  return true;
}

// Whether this thread of a consumer gives a stage of values back: one of a warp; but each of them
// where rows are copied as ordinary stores, which may follow the zeros that any thread wrote there.
template <class C>
__device__ __forceinline__ bool gives_values_back(const typename C::Params& params) {
  return threadIdx.x % 32 == 0 || !uses_boxes<C>(params);
}

// Rows of tiles that hold the queries of one sequence and head, or group of heads.
template <class C>
__device__ __forceinline__ int tile_rows(const typename C::Params& params, int len_q) {
  if constexpr (C::kCached) return len_q << params.pack_shift;
  return len_q;
}

template <class C>
__device__ __forceinline__ int heads_of_tiles(const typename C::Params& params) {
  if constexpr (C::kCached) return params.heads_q >> params.pack_shift;
  return params.heads_q;
}

// The keys that a row of a tile sees, as rows of the cache. Both may lie before the first key.
template <class C>
__device__ __forceinline__ KeyInterval seen_keys(const typename C::Params& params,
                                                 const typename C::Info& tile, int row) {
  if constexpr (C::kCached) {
    const KeyInterval keys =
        visible_keys<C::kMasked>(params, row >> params.pack_shift, tile.len_q, tile.len_k);
    return {keys.low + tile.leftpad, keys.high + tile.leftpad};
  } else {
    return visible_keys<C::kMasked>(params, row, tile.len_q, tile.len_k);
  }
}

__device__ __forceinline__ int left_padding(const CachedParams& params, int batch) {
  return params.cache_leftpad != nullptr ? max(0, params.cache_leftpad[batch]) : 0;
}

// Keys of a sequence; a length past the cache's end does not lead out of it.
template <class C>
__device__ __forceinline__ int key_count(const typename C::Params& params, int batch) {
  if constexpr (C::kCached) {
    const int old = params.seqused_k != nullptr ? max(0, params.seqused_k[batch]) : params.capacity;
    const int fresh = params.cu_seqlens_k_new != nullptr
                          ? params.cu_seqlens_k_new[batch + 1] - params.cu_seqlens_k_new[batch]
                          : params.seqlen_k_new;
    return max(0, min(old + fresh, params.capacity) - left_padding(params, batch));
  } else {
    return sequence_length(batch, params.seqlen_k, params.cu_seqlens_k, params.seqused_k);
  }
}

// The page of a row of the cache, counted from its sequence's first.
__device__ __forceinline__ int page_of(const CachedParams& params, int row) {
  return __umulhi(2u * row, params.page_multiplier) >> params.page_shift;
}

}  // namespace jit_kernel::hopper
