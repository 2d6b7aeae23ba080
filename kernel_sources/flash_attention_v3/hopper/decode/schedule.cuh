// Which work is whose: every key head's blocks of keys, all sequences end to end, are cut into equal
// runs, one for each of the head's `parts` thread blocks.
//
// Neighbouring thread blocks are the heads of one part, so they read the same tokens at the same
// time: 1 to 3 % of the memory's rate. A sequence is cut only where a run ends. Lengths are read here,
// so that a captured graph serves any.
#pragma once

#include "flash_attention_v3/hopper/common/mask.cuh"
#include "flash_attention_v3/hopper/decode/config.h"
#include "flash_attention_v3/hopper/decode/params.h"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

// Fewer blocks than this are not worth another part: its partial result has to be merged.
constexpr unsigned kLeastBlocks = 1;

// floor(value / n) for 0 <= value < 2^31, by the numbers that the launcher made for n.
__device__ __forceinline__ int divide(int value, unsigned multiplier, unsigned shift) {
  return __umulhi(2u * value, multiplier) >> shift;
}

// Lengths of a sequence; len_k counts from leftpad.
struct DecodeLengths {
  int len_q, len_k, leftpad;
};

__device__ __forceinline__ DecodeLengths lengths_of(const DecodeParams& params, int batch) {
  DecodeLengths of;
  of.len_q = params.seqlen_q;
  if (params.cu_seqlens_q != nullptr) {
    of.len_q = params.cu_seqlens_q[batch + 1] - params.cu_seqlens_q[batch];
  }
  if (params.seqused_q != nullptr) of.len_q = min(of.len_q, params.seqused_q[batch]);
  of.len_q = max(0, of.len_q);
  int rows = params.rows_k;
  if (params.seqused_k != nullptr) rows = params.seqused_k[batch];
  rows += params.cu_seqlens_k_new != nullptr
              ? params.cu_seqlens_k_new[batch + 1] - params.cu_seqlens_k_new[batch]
              : params.new_rows;
  of.leftpad = params.cache_leftpad != nullptr ? max(0, params.cache_leftpad[batch]) : 0;
  of.len_k = max(0, min(rows, params.rows_k) - of.leftpad);
  return of;
}

// What the queries of a sequence see: rows of the cache, and blocks of them.
struct BlockRange {
  int low, high;
  int begin, end;

  // A sequence that sees no key is work, too: its rows become 0.
  __device__ __forceinline__ unsigned cost() const { return max(1, end - begin); }
};

__device__ __forceinline__ BlockRange blocks_of(const DecodeParams& params,
                                                const DecodeLengths& of) {
  const int low = max(0, visible_keys<true>(params, 0, of.len_q, of.len_k).low);
  const int high = visible_keys<true>(params, of.len_q - 1, of.len_q, of.len_k).high;
  BlockRange range;
  range.low = of.leftpad + low;
  range.high = of.leftpad + max(low, high);
  range.begin = range.low / kDecodeKeys;
  range.end = high > low ? (range.high + kDecodeKeys - 1) / kDecodeKeys : range.begin;
  return range;
}

// All lanes of one warp together: a lane has a sequence of 32.
class DecodeSchedule {
 public:
  __device__ __forceinline__ DecodeSchedule(const DecodeParams& params, unsigned part)
      : params_(params) {
    total_ = 0;
#pragma unroll 1
    for (int first = 0; first < params.batch; first += 32) {
      open(first);
      total_ += __reduce_add_sync(0xffffffffu, cost_);
    }
    parts_ = min(static_cast<unsigned>(params.parts), (total_ + kLeastBlocks - 1) / kLeastBlocks);
    at_ = part < parts_ ? part * total_ / parts_ : total_;
    end_ = part < parts_ ? (part + 1) * total_ / parts_ : total_;
    if (params.batch > 32) open(0);
  }

  // The next item of this part; false when there are no more.
  __device__ __forceinline__ bool next(DecodeItem& item) {
    if (at_ >= end_) return false;
    unsigned window = __reduce_add_sync(0xffffffffu, cost_);
#pragma unroll 1
    while (at_ >= base_ + window) {
      base_ += window;
      open(first_ + 32);
      window = __reduce_add_sync(0xffffffffu, cost_);
    }
    const int lane = threadIdx.x % 32;
    unsigned up_to = cost_;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += below;
    }
    const int source = __popc(__ballot_sync(0xffffffffu, up_to <= at_ - base_));
    const unsigned end = base_ + __shfl_sync(0xffffffffu, up_to, source);
    DecodeLengths of;
    of.len_q = __shfl_sync(0xffffffffu, of_.len_q, source);
    of.len_k = __shfl_sync(0xffffffffu, of_.len_k, source);
    of.leftpad = __shfl_sync(0xffffffffu, of_.leftpad, source);
    fill(item, first_ + source, of, end);
    at_ = min(end_, end);
    return true;
  }

 private:
  __device__ __forceinline__ unsigned part_of(unsigned block) const {
    return ((block + 1) * parts_ - 1) / total_;
  }

  // This lane's sequence of the 32 from `first` on.
  __device__ __forceinline__ void open(int first) {
    first_ = first;
    const int batch = first + threadIdx.x % 32;
    cost_ = 0;
    of_ = {0, 0, 0};
    if (batch >= params_.batch) return;
    of_ = lengths_of(params_, batch);
    if (of_.len_q > 0) cost_ = blocks_of(params_, of_).cost();
  }

  __device__ __forceinline__ void fill(DecodeItem& item, int batch, const DecodeLengths& of,
                                       unsigned end) const {
    const BlockRange range = blocks_of(params_, of);
    const unsigned start = end - range.cost();
    item.batch = batch;
    item.len_q = of.len_q;
    item.len_k = of.len_k;
    item.leftpad = of.leftpad;
    item.offset_q = params_.cu_seqlens_q != nullptr ? params_.cu_seqlens_q[batch] : 0;
    item.low = range.low;
    item.high = range.high;
    item.block_begin = range.begin + static_cast<int>(at_ - start);
    item.block_end = min(range.end, range.begin + static_cast<int>(min(end_, end) - start));
    item.is_first = at_ == start;
    item.first_part = 0;
    item.parts = 1;
    if (start < at_ || end > end_) {
      item.first_part = part_of(start);
      item.parts = part_of(end - 1) - item.first_part + 1;
    }
  }

  const DecodeParams& params_;
  unsigned total_, at_, end_;  // in blocks, over all sequences
  unsigned parts_;
  unsigned base_ = 0;  // where the 32 sequences begin
  int first_;
  DecodeLengths of_;
  unsigned cost_;
};

}  // namespace jit_kernel::hopper
