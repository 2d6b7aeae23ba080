// Order of the tiles: which block of queries of which sequence and head is the n-th.
//
// Sequences, longest first, are taken in windows whose keys and values fit the L2 cache together; a
// sequence too large for it is a window of its own, cut into sections of heads. With a mask, tiles
// of a window go from the last block of queries to the first, over all its sequences and heads, so
// that long tiles come first and short ones fill the end. Blocks take tiles in this order from one
// counter.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_parts.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_factors.cuh"
#include "flash_attention_v3/hopper/prefill/producer.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

__device__ __forceinline__ bool is_sorted(const ForwardParams& params) {
  return has_lengths(params) && params.batch > 1 && params.batch <= kMaxSorted;
}

// Ranks the sequences by number of keys, all threads of the block together. `scratch` holds batch
// ints.
template <class C>
__device__ __forceinline__ void sort_sequences(const typename C::Params& params, int* scratch,
                                               unsigned short* order) {
  for (int i = threadIdx.x; i < params.batch; i += blockDim.x) {
    scratch[i] = key_count<C>(params, i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.batch; i += blockDim.x) {
    const int key = scratch[i];
    int rank = 0;
    for (int j = 0; j < params.batch; ++j) {
      rank += scratch[j] > key || (scratch[j] == key && j < i);
    }
    order[rank] = static_cast<unsigned short>(i);
  }
}

// Walks the order forwards; all lanes of one warp together, one sequence of the window each. What
// can be computed again is not kept: this warp has few registers.
template <class C>
class TileScheduler {
 public:
  __device__ TileScheduler(const typename C::Params& params, const unsigned short* order)
      : params_(params), order_(order) {
    if constexpr (C::kCached) cut_ = parts_of_tiles<C>(params);
    open_window(0);
  }

  // Finds the tile of a linear index that is not below that of the call before. False past the end.
  __device__ bool seek(int index, typename C::Info& info) {
    int tiles = __reduce_add_sync(0xffffffffu, blocks_);
    while (index - base_ >= tiles * heads() * cut_.parts()) {
      base_ += tiles * heads() * cut_.parts();
      if (!advance()) return false;
      tiles = __reduce_add_sync(0xffffffffu, blocks_);
    }
    int source, head, block, offset = index - base_, part = 0;
    if constexpr (C::kCached) {
      // Tiles of the same part side by side: they read the same keys.
      part = offset / (tiles * heads());
      offset -= part * tiles * heads();
    }
    locate(offset, tiles, source, head, block);
    const int len_q = __shfl_sync(0xffffffffu, len_q_, source);
    const int len_k = __shfl_sync(0xffffffffu, len_k_, source);
    const int batch = __shfl_sync(0xffffffffu, batch_, source);
    if (lane() == 0) {
      write(info, batch, first_head_ + head, block * C::kRows, len_q, len_k);
      if constexpr (C::kCached) cut(info, base_ / cut_.parts() + offset, part);
    }
    return true;
  }

 private:
  // Tiles of different length need many of them to even out, and 8 heads at a time still share each
  // read from memory 16 times: 8 heads of 16384 keys, d 256, took 12 % longer in sections of two
  // heads.
  static constexpr int kLeastHeads = C::kMasked ? kHeadsOfSection : 1;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ int heads() const { return min(section_, heads_of_tiles<C>(params_) - first_head_); }

  // The place of a tile in its section: the lane of its sequence, head of the section, block of
  // queries.
  __device__ void locate(int offset, int tiles, int& source, int& head, int& block) const {
    if (width_ == 1) {
      source = 0;
      head = C::kMasked ? offset % heads() : offset / tiles;
      block = tiles - 1 - (C::kMasked ? offset / heads() : offset % tiles);
      return;
    }
    block = __reduce_max_sync(0xffffffffu, blocks_);
    u32 alive = 0;
    do {  // sequences of the window differ in length, so this is a walk
      offset -= __popc(alive) * heads();
      alive = __ballot_sync(0xffffffffu, --block < blocks_);
    } while (offset >= __popc(alive) * heads());
    const int rank = offset / heads();
    head = offset % heads();
    const bool chosen = block < blocks_ && __popc(alive & ((1u << lane()) - 1)) == rank;
    source = __ffs(__ballot_sync(0xffffffffu, chosen)) - 1;
  }

  // One lane. At least one block of keys, which may be masked as a whole.
  __device__ void write(typename C::Info& info, int batch, int head, int row, int len_q,
                        int len_k) const {
    info.batch = batch;
    info.head = head;
    info.row = row;
    info.len_q = len_q;
    info.len_k = len_k;
    info.offset_q = params_.cu_seqlens_q != nullptr ? params_.cu_seqlens_q[batch] : 0;
    if constexpr (C::kFp8) info.factors = factors_of(params_, batch, head / params_.group);
    if constexpr (C::kCached) {
      write_cached(info);
      return;
    }
    const int last_row = min(row + C::kRows, len_q) - 1;
    const int high = visible_keys<C::kMasked>(params_, last_row, len_q, len_k).high;
    const int low = visible_keys<C::kMasked>(params_, row, len_q, len_k).low;
    const int block_end = max(1, (max(0, high) + C::kKeys - 1) / C::kKeys);
    info.block_end = block_end;
    info.block_begin = min(max(0, low) / C::kKeys, block_end - 1);
  }

  // The rest of a tile's info on cached keys.
  __device__ void write_cached(typename C::Info& info) const {
    const int batch = info.batch;
    info.head <<= params_.pack_shift;
    info.leftpad = left_padding(params_, batch);
    info.cache_row = params_.cache_batch_idx != nullptr ? params_.cache_batch_idx[batch] : batch;
    const int last_row = min(info.row + C::kRows, tile_rows<C>(params_, info.len_q)) - 1;
    const int low = seen_keys<C>(params_, info, info.row).low;
    const int high = seen_keys<C>(params_, info, last_row).high;
    info.low = low < high ? low : 0;  // so that no box of an empty interval has a row in it
    info.high = low < high ? high : 0;
    info.block_end = max(1, (info.high + C::kKeys - 1) / C::kKeys);
    info.block_begin = info.low / C::kKeys;
  }

  // The blocks of one part of a tile; none where part is not below parts.
  __device__ void cut(typename C::Info& info, int ordinal, int part) const {
    info.ordinal = ordinal;
    info.first_part = ordinal * cut_.parts();
    info.part = part;
    info.parts = 1;
    if (cut_.parts() == 1 || info.first_part + cut_.parts() > params_.most_parts) return;
    const int blocks = info.block_end - info.block_begin;
    const int each = cut_.blocks_of_part(blocks);
    info.parts = (blocks + each - 1) / each;
    info.block_begin += part * each;
    info.block_end = min(info.block_end, info.block_begin + each);
  }

  __device__ void open_window(int first) {
    first_ = first;
    first_head_ = 0;
    const int place = first + lane();
    const bool exists = place < params_.batch;
    batch_ = !exists ? 0 : is_sorted(params_) ? order_[place] : place;
    len_q_ =
        exists ? sequence_length(batch_, params_.seqlen_q, params_.cu_seqlens_q, params_.seqused_q)
               : 0;
    len_k_ = exists ? key_count<C>(params_, batch_) : 0;
    const int kMany = 1 << 24;  // sums below cannot overflow
    int tokens = min(len_k_, kMany);
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, tokens, step);
      if (lane() >= step) tokens = min(tokens + below, kMany);
    }
    const int heads_k = params_.heads_q / params_.group;
    const bool fits =
        tokens <= params_.l2_tokens / heads_k || (lane() + 1) * heads_k <= kLeastHeads;
    width_ = __popc(__ballot_sync(0xffffffffu, exists && fits));
    section_ = heads_of_tiles<C>(params_);
    if (width_ == 0) {
      width_ = 1;
      const int first_len = __shfl_sync(0xffffffffu, max(1, len_k_), 0);
      section_ = max(kLeastHeads, params_.l2_tokens / first_len) * params_.group;
      if constexpr (C::kCached) section_ >>= params_.pack_shift;
    }
    blocks_ = lane() < width_ ? (tile_rows<C>(params_, len_q_) + C::kRows - 1) / C::kRows : 0;
  }

  __device__ bool advance() {
    if (first_head_ + section_ < heads_of_tiles<C>(params_)) {
      first_head_ += section_;
      return true;
    }
    if (first_ + width_ >= params_.batch) return false;
    open_window(first_ + width_);
    return true;
  }

  const typename C::Params& params_;
  const unsigned short* order_;
  int base_ = 0;                        // linear index of the section's first tile
  int first_, width_;                   // the window's sequences
  int batch_, len_q_, len_k_, blocks_;  // this lane's sequence, blocks of queries
  int first_head_, section_;            // first query head of the section, heads of a whole one
  PartCut cut_{1};                      // of each tile's keys
};

// The scheduler warp: finds the next tile while the producer and the consumers work on the present
// one, so that finding it is never waited for.
template <class C>
__device__ __forceinline__ void schedule(const typename C::Params& params,
                                         const Shared<C>& shared) {
  const bool leader = threadIdx.x % 32 == 0;
  TileScheduler<C> scheduler(params, shared.order());
  RingPosition<kTileSlots> at;
  int index = blockIdx.x;
  u32 claims = 0;
  bool found;
  do {
    typename C::Info& tile = *shared.tile(at.stage());
    mbarrier_wait(shared.tile_empty(at.stage()), at.parity() ^ 1);
    found = scheduler.seek(index, tile);
    if constexpr (C::kCached) {
      // A tile with fewer blocks than parts. Lane 0 wrote it, and reads it alone.
      while (found && uniform(leader && tile.part >= tile.parts)) {
        if (leader) index = atomicAdd(params.progress, 1) + gridDim.x;
        index = uniform(index);
        found = scheduler.seek(index, tile);
      }
    }
    if (leader) {
      if (!found) tile.batch = -1;
      mbarrier_arrive(shared.tile_full(at.stage()));
      if (found) {
        if constexpr (kPrefetches<C>) prefetch_queries<C>(params, tile);
        if (claims_late<C>(params)) mbarrier_wait(shared.claim(), claims++ % 2);
        index = atomicAdd(params.progress, 1) + gridDim.x;
      }
    }
    at.advance();
    index = uniform(index);
  } while (found);
  if (leader && atomicAdd(params.progress + 1, 1) == gridDim.x - 1) {
    params.progress[0] = 0;
    params.progress[1] = 0;
  }
}

}  // namespace jit_kernel::hopper
