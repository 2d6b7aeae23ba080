// Which tile of keys a block has, and which queries see it.
#pragma once

#include "flash_attention_v3/hopper/backward/config.h"
#include "flash_attention_v3/hopper/common/mask.cuh"
#include "flash_attention_v3/hopper/common/sequence.cuh"

namespace jit_kernel::hopper {

// Where a sequence's tiles begin, as params.h says.
__device__ __forceinline__ int first_tile(const int* cu_seqlens, int batch, int rows,
                                          int tiles_per_sequence) {
  return cu_seqlens != nullptr ? max(0, cu_seqlens[batch]) / rows + batch
                               : batch * tiles_per_sequence;
}

// The sequence that a tile belongs to: the last one that does not begin behind it.
__device__ __forceinline__ int sequence_of_tile(const int* cu_seqlens, int tile, int batch,
                                                int rows, int tiles_per_sequence) {
  if (cu_seqlens == nullptr) return tile / max(1, tiles_per_sequence);
  int low = 0, high = batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_tile(cu_seqlens, middle, rows, 0) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The queries that see a key: [low, high), both ends never decrease from key to key.
struct QueryInterval {
  int low, high;
};

// Of a key that is there; not cut to the sequence's queries.
__device__ __forceinline__ QueryInterval seeing_queries(const BackwardParams& params, int key,
                                                        int len_q, int len_k) {
  int low = key - params.window_right;
  int high = key + params.window_left + 1;
  if (params.chunk > 0) {
    const int begin = chunk_of(params, key) * params.chunk;
    low = max(low, begin);
    high = min(high, begin + params.chunk);
  }
  const int shift = len_k - len_q;  // a query's position is its row and this
  return {low - shift, high - shift};
}

template <class C>
__device__ __forceinline__ KeyTile find_tile(const BackwardParams& params, int block) {
  // Sections of heads whose queries and sums the L2 cache holds; within one, tiles in order, each
  // for all of its heads. Sums in order take the tiles from the last to the first, as the later
  // ones are added first.
  const int sequences = params.cu_seqlens_k != nullptr ? 1 : params.batch;
  const int units = params.heads_k * sequences;
  const int tiles = params.cu_seqlens_k != nullptr ? params.tiles_k : params.tiles_per_k;
  const int section = block / (params.heads_at_a_time * tiles);
  const int first_unit = section * params.heads_at_a_time;
  const int units_here = min(params.heads_at_a_time, units - first_unit);
  const int inside = block - first_unit * tiles;
  const int unit = first_unit + inside % units_here;
  int tile = inside / units_here;
  if (params.added != nullptr) tile = tiles - 1 - tile;
  KeyTile found;
  found.head = unit % params.heads_k;
  found.batch = unit / params.heads_k;
  if (params.cu_seqlens_k != nullptr) {
    found.batch = sequence_of_tile(params.cu_seqlens_k, tile, params.batch, C::kKeys, 0);
    tile -= first_tile(params.cu_seqlens_k, found.batch, C::kKeys, 0);
  }
  found.len_q =
      sequence_length(found.batch, params.seqlen_q, params.cu_seqlens_q, params.seqused_q);
  found.len_k =
      sequence_length(found.batch, params.seqlen_k, params.cu_seqlens_k, params.seqused_k);
  found.first_key = tile * C::kKeys;
  found.tile_q = first_tile(params.cu_seqlens_q, found.batch, C::kQueries, params.tiles_per_q);
  found.seen_key = visible_keys<true>(params, 0, found.len_q, found.len_k).low;
  found.seeing_row = max(0, seeing_queries(params, 0, found.len_q, found.len_k).low);
  const int last_key = min(found.first_key + C::kKeys, found.len_k) - 1;
  const int low = max(0, seeing_queries(params, found.first_key, found.len_q, found.len_k).low);
  const int high =
      min(found.len_q, seeing_queries(params, last_key, found.len_q, found.len_k).high);
  const bool none = found.first_key < 0 || found.first_key >= found.len_k || low >= high;
  found.begin = none ? 0 : low / C::kQueries;
  found.end = none ? 0 : (high + C::kQueries - 1) / C::kQueries;
  return found;
}

// The last tile of keys that adds to a tile of queries.
template <class C>
__device__ __forceinline__ int last_key_tile(const BackwardParams& params, const KeyTile& tile,
                                             int query_tile) {
  const int row = min((query_tile + 1) * C::kQueries, tile.len_q) - 1;
  return (visible_keys<true>(params, row, tile.len_q, tile.len_k).high - 1) / C::kKeys;
}

}  // namespace jit_kernel::hopper
