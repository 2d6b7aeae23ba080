// Order of the tiles: which block of queries of which sequence and head is the n-th.
//
// Sequences, longest first, are taken in windows whose keys and values fit the L2 cache together; within a
// window tiles go from the last block of queries to the first, over all its sequences and heads, so that with
// a causal mask the long tiles come first and the short ones fill the end. A sequence too large for
// the cache is a window of its own, cut into sections of heads. Blocks take tiles in this order from
// one counter.
#pragma once

#include "flash_attention_v3/hopper/config.cuh"
#include "flash_attention_v3/hopper/mask.cuh"

namespace jit_kernel::hopper {

__device__ __forceinline__ int sequence_length(int batch, int dense, const int* cu_seqlens,
                                               const int* seqused) {
  if (seqused != nullptr) return max(0, seqused[batch]);
  return cu_seqlens != nullptr ? max(0, cu_seqlens[batch + 1] - cu_seqlens[batch]) : dense;
}

__device__ __forceinline__ bool has_lengths(const ForwardParams& params) {
  return params.cu_seqlens_q != nullptr || params.cu_seqlens_k != nullptr ||
         params.seqused_q != nullptr || params.seqused_k != nullptr;
}

__device__ __forceinline__ bool is_sorted(const ForwardParams& params) {
  return has_lengths(params) && params.batch > 1 && params.batch <= kMaxSorted;
}

// Ranks the sequences by number of keys, all threads of the block together. `scratch` holds batch ints.
__device__ __forceinline__ void sort_sequences(const ForwardParams& params, int* scratch,
                                               unsigned short* order) {
  for (int i = threadIdx.x; i < params.batch; i += blockDim.x) {
    scratch[i] = sequence_length(i, params.seqlen_k, params.cu_seqlens_k, params.seqused_k);
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

// Walks the order forwards; all lanes of one warp together, one sequence of the window each.
template <class C>
class TileScheduler {
 public:
  __device__ TileScheduler(const ForwardParams& params, const unsigned short* order)
      : params_(params), order_(is_sorted(params) ? order : nullptr), lane_(threadIdx.x % 32) {
    open_window(0);
  }

  // Finds the tile of a linear index that is not below that of the call before. False past the end.
  __device__ bool seek(int index, TileInfo& info) {
    while (index - base_ >= alive_ * heads_) {
      base_ += alive_ * heads_;
      if (!advance()) return false;
    }
    const int offset = index - base_;
    const int rank = offset / heads_;
    const bool mine = block_ < blocks_;
    const u32 alive = __ballot_sync(0xffffffffu, mine);
    const bool chosen = mine && __popc(alive & ((1u << lane_) - 1)) == rank;
    const int source = __ffs(__ballot_sync(0xffffffffu, chosen)) - 1;
    info.batch = __shfl_sync(0xffffffffu, batch_, source);
    info.len_q = __shfl_sync(0xffffffffu, len_q_, source);
    info.len_k = __shfl_sync(0xffffffffu, len_k_, source);
    info.head = first_head_ + offset - rank * heads_;
    info.row = block_ * C::kRows;
    info.offset_q = params_.cu_seqlens_q != nullptr ? params_.cu_seqlens_q[info.batch] : 0;
    set_blocks(info);
    return true;
  }

 private:
  // Blocks of keys that some query of the tile sees; at least one, which may be masked as a whole.
  __device__ void set_blocks(TileInfo& info) const {
    const int last_row = min(info.row + C::kRows, info.len_q) - 1;
    const int high =
        visible_keys<C::kMasked>(params_, last_row, info.len_q, info.len_k).high;
    const int low = visible_keys<C::kMasked>(params_, info.row, info.len_q, info.len_k).low;
    info.block_end = max(1, (max(0, high) + C::kKeys - 1) / C::kKeys);
    info.block_begin = min(max(0, low) / C::kKeys, info.block_end - 1);
  }

  __device__ bool open_window(int first) {
    first_ = first;
    const int place = first + lane_;
    const bool exists = place < params_.batch;
    batch_ = exists ? (order_ != nullptr ? order_[place] : place) : 0;
    len_q_ = exists ? sequence_length(batch_, params_.seqlen_q, params_.cu_seqlens_q, params_.seqused_q) : 0;
    len_k_ = exists ? sequence_length(batch_, params_.seqlen_k, params_.cu_seqlens_k, params_.seqused_k) : 0;
    const int heads_k = params_.heads_q / params_.group;
    int tokens = min(len_k_, 1 << 24);
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, tokens, step);
      if (lane_ >= step) tokens = min(tokens + below, 1 << 24);
    }
    const int budget = params_.l2_tokens / heads_k;
    const u32 fits = __ballot_sync(0xffffffffu, exists && tokens <= budget);
    width_ = max(1, __popc(fits));
    const int first_len = __shfl_sync(0xffffffffu, max(1, len_k_), 0);
    section_ = __popc(fits) > 0 ? params_.heads_q
                                : max(1, params_.l2_tokens / first_len) * params_.group;
    blocks_ = lane_ < width_ ? (len_q_ + C::kRows - 1) / C::kRows : 0;
    most_ = __reduce_max_sync(0xffffffffu, blocks_);
    return open_section(0);
  }

  __device__ bool open_section(int head) {
    first_head_ = head;
    heads_ = min(section_, params_.heads_q - head);
    block_ = most_;
    return step_block();
  }

  __device__ bool step_block() {
    --block_;
    alive_ = block_ >= 0 ? __popc(__ballot_sync(0xffffffffu, block_ < blocks_)) : 0;
    return block_ >= 0;
  }

  __device__ bool advance() {
    if (block_ > 0) return step_block();
    if (block_ == 0 && first_head_ + heads_ < params_.heads_q) {
      return open_section(first_head_ + heads_);
    }
    while (first_ + width_ < params_.batch) {
      if (open_window(first_ + width_)) return true;
    }
    return false;
  }

  const ForwardParams& params_;
  const unsigned short* order_;
  int lane_;
  int base_ = 0;                       // linear index of the first tile of this block and section
  int first_, width_;                  // the window's sequences
  int batch_, len_q_, len_k_, blocks_; // this lane's sequence
  int first_head_, heads_, section_;   // this section's query heads
  int block_, most_, alive_;           // block of queries, and how many sequences have it
};

}  // namespace jit_kernel::hopper
