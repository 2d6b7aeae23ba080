// Which work is whose: every key head's blocks of keys, all sequences end to end, are cut into
// equal runs, one for each of the head's `parts` thread blocks.
//
// Neighbouring thread blocks are the heads of one part, so they read the same tokens at the same
// time: 1 to 3 % of the memory's rate. A sequence is cut only where a run ends. Lengths are read
// here, so that a captured graph serves any.
#pragma once

#include "flash_attention_v3/hopper/common/mask.cuh"
#include "flash_attention_v3/hopper/decode/config.h"
#include "flash_attention_v3/hopper/decode/params.h"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

// Neighbouring thread blocks, or clusters, are the key heads of the same tokens.
__device__ __forceinline__ int part_of_block(const DecodeParams& params, const uint2& block) {
  return params.in_clusters ? block.x : block.y;
}
__device__ __forceinline__ int first_head_of_block(const DecodeParams& params, const uint2& block) {
  return (params.in_clusters ? block.y : block.x) * params.heads_of_block;
}

// floor(value / n) for 0 <= value < 2^31, by the numbers that the launcher made for n.
__device__ __forceinline__ int divide(int value, unsigned multiplier, unsigned shift) {
  return __umulhi(2u * value, multiplier) >> shift;
}

// Lengths of a sequence; len_k counts from leftpad.
struct DecodeLengths {
  int len_q, len_k, leftpad;
};

__device__ __forceinline__ int sequence_of(const DecodeParams& params, int tile) {
  return params.tiles <= 1 ? tile : divide(tile, params.tiles_multiplier, params.tiles_shift);
}

// The query tokens of a tile: a sequence of more than it has is several.
struct TileTokens {
  int first, count;
};
__device__ __forceinline__ TileTokens tokens_of(const DecodeParams& params, int tile, int len_q) {
  if (params.tiles <= 1) return {0, len_q};
  const int first = (tile - sequence_of(params, tile) * params.tiles) * params.tile_tokens;
  return {first, min(len_q - first, params.tile_tokens)};
}

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

// The query tokens of an item's tile.
__device__ __forceinline__ int tokens_of(const DecodeParams& params, const DecodeItem& item) {
  const int rest = item.len_q - item.first_token;
  return params.tiles <= 1 ? rest : min(rest, params.tile_tokens);
}

// What a tile's queries see: rows of the cache, and how many blocks that is. A sequence that
// sees no key is work, too: its rows become 0.
struct SeenRows {
  int low, high;
  unsigned cost;
};

__device__ __forceinline__ SeenRows seen_rows(const DecodeParams& params, const DecodeLengths& of,
                                              const TileTokens& tokens) {
  const int last = tokens.first + tokens.count - 1;
  const int low = max(0, visible_keys<true>(params, tokens.first, of.len_q, of.len_k).low);
  const int high = visible_keys<true>(params, last, of.len_q, of.len_k).high;
  SeenRows seen;
  seen.low = of.leftpad + low;
  seen.high = of.leftpad + max(low, high);
  const int blocks = (seen.high + kDecodeKeys - 1) / kDecodeKeys - seen.low / kDecodeKeys;
  seen.cost = high > low ? blocks : 1;
  if (tokens.count <= 0) seen.cost = 0;
  return seen;
}

// A sequence's ranges: 2^log2 of them, and what each of a block's streams has of these.
struct RangeCuts {
  int log2;
  bool halves;
};

// Of a sequence of `rows` query rows that sees so many blocks. By these and by what all calls of a
// model share, so that no other sequence has a say: few enough that a multiprocessor has some share
// of a sequence that is alone, more where it is long.
__device__ __forceinline__ RangeCuts range_cuts(const DecodeParams& params, int rows,
                                                unsigned blocks) {
  const unsigned least =
      max(params.range_blocks, rows > kRowsOfNarrowRange ? kBlocksOfWideRange : 1);
  const unsigned most = max(blocks / least, min(blocks, 2u));
  const int log2 = min(params.ranges_log2 + (blocks > kBlocksOfShort), 31 - __clz(most));
  return {log2, params.halves};
}

// How many of an item's ranges are joined in turn, as exponent of 2, within a half of them. kRows:
// of the kernel, which has no sequence of more.
template <int kRows>
__device__ __forceinline__ int chain_log2(const DecodeParams& params, const DecodeItem& item) {
  if (kRows <= kRowsOfTree || item.len_q * params.group <= kRowsOfTree) return 0;
  return max(0, min(kChainLog2, 30 - __clz(item.ranges)));
}

// The blocks of a range, of 2^log2 of so many blocks; behind the last range there is none. The
// ranges are the leaves of a tree, of whose halves the first one is the longer where they are not
// of one length.
struct RangeBlocks {
  unsigned begin, end;
};

__device__ __forceinline__ RangeBlocks blocks_of_range(unsigned blocks, int log2, unsigned range) {
  if (range >> log2) return {blocks, blocks};
  unsigned begin = 0;
#pragma unroll 1
  for (int bit = log2 - 1; bit >= 0; --bit) {
    const unsigned first = (blocks + 1) / 2;
    const bool second = range >> bit & 1;
    begin += second ? first : 0;
    blocks = second ? blocks - first : first;
  }
  return {begin, begin + blocks};
}

// How many of these ranges have their middle before a block.
__device__ __forceinline__ unsigned ranges_before(unsigned blocks, int log2, unsigned block) {
  unsigned range = 0;
#pragma unroll 1
  for (int level = 0; level < log2; ++level) {
    const unsigned first = (blocks + 1) / 2;
    const bool second = block >= first;
    block -= second ? first : 0;
    blocks = second ? blocks - first : first;
    range = 2 * range + second;
  }
  return range + (2 * block >= blocks);
}

// The ranges of a cluster's block: one each stream, or one alone where the blocks are enough.
__device__ __forceinline__ void set_ranges_of_cluster(DecodeItem& item, int first, unsigned blocks,
                                                      int log2, int part) {
  const unsigned ranges = 1u << log2;
  const bool two = ranges > kClusterParts;
  const unsigned range = min(static_cast<unsigned>(two ? 2 * part : part), ranges);
  const RangeBlocks own = blocks_of_range(blocks, log2, range);
  item.begin[0] = first + static_cast<int>(own.begin);
  item.end[0] = first + static_cast<int>(own.end);
  item.begin[1] = max(item.end[0], item.begin[0] + 1);
  item.end[1] =
      two ? first + static_cast<int>(blocks_of_range(blocks, log2, range + 1).end) : item.end[0];
  item.ranges = static_cast<short>(ranges);
}

// The only item of a block of a cluster; false where the sequence has no query.
__device__ __forceinline__ bool item_of_cluster(const DecodeParams& params, int tile, int part,
                                                DecodeItem& item) {
  item.batch = sequence_of(params, tile);
  const DecodeLengths of = lengths_of(params, item.batch);
  const TileTokens tokens = tokens_of(params, tile, of.len_q);
  const SeenRows seen = seen_rows(params, of, tokens);
  item.len_q = of.len_q;
  item.first_token = tokens.first;
  item.len_k = of.len_k;
  item.leftpad = of.leftpad;
  item.offset_q = params.cu_seqlens_q != nullptr ? params.cu_seqlens_q[item.batch] : 0;
  item.low = seen.low;
  item.high = seen.high;
  const int first = seen.low / kDecodeKeys;
  const int blocks = seen.high > seen.low ? seen.cost : 0;
  item.begin[0] = first + part * blocks / kClusterParts;
  item.begin[1] = item.begin[0] + 1;
  item.end[0] = item.end[1] = first + (part + 1) * blocks / kClusterParts;
  item.first_part = 0;
  item.parts = 1;
  item.is_first = item.range = 0;
  item.ranges = item.from = item.to = 0;
  if (params.ranges_log2 > 0) {
    const int log2 = range_cuts(params, of.len_q * params.group, seen.cost).log2;
    set_ranges_of_cluster(item, first, static_cast<unsigned>(blocks), log2, part);
  }
  return seen.cost > 0;
}

// All lanes of one warp together: a lane has a sequence of 32. Params: what lengths_of, seen_rows
// and range_cuts are found for, with blocks of kKeys rows.
template <class Params, int kKeys>
class ScheduleOf {
 public:
  __device__ __forceinline__ ScheduleOf(const Params& params) : params_(params) {}

  __device__ __forceinline__ void start(unsigned part) {
    total_ = 0;
#pragma unroll 1
    for (int first = 0; first < params_.all_tiles; first += 32) {
      open(first);
      total_ += __reduce_add_sync(0xffffffffu, seen_.cost);
    }
    // Equal runs, of which the first are one block longer.
    run_ = divide(total_, params_.parts_multiplier, params_.parts_shift);
    longer_ = total_ - run_ * params_.parts;
    at_ = begin_of(part);
    end_ = at_ + run_ + (part < longer_);
    if (params_.all_tiles > 32) open(0);
  }

  // The next item of this part; false when there are no more.
  __device__ __forceinline__ bool next(DecodeItem& item) {
#pragma unroll 1
    while (at_ < end_) {
      unsigned window = __reduce_add_sync(0xffffffffu, seen_.cost);
#pragma unroll 1
      while (at_ >= base_ + window) {
        base_ += window;
        open(first_ + 32);
        window = __reduce_add_sync(0xffffffffu, seen_.cost);
      }
      const int lane = threadIdx.x % 32;
      unsigned up_to = seen_.cost;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const unsigned below = __shfl_up_sync(0xffffffffu, up_to, step);
        if (lane >= step) up_to += below;
      }
      const int source = __popc(__ballot_sync(0xffffffffu, up_to <= at_ - base_));
      const unsigned end = base_ + __shfl_sync(0xffffffffu, up_to, source);
      const unsigned start = end - __shfl_sync(0xffffffffu, seen_.cost, source);
      tile_ = first_ + source;
      item.batch = sequence_of(params_, tile_);
      item.len_q = __shfl_sync(0xffffffffu, of_.len_q, source);
      item.len_k = __shfl_sync(0xffffffffu, of_.len_k, source);
      item.first_token = tokens_of(params_, tile_, item.len_q).first;
      item.leftpad = __shfl_sync(0xffffffffu, of_.leftpad, source);
      item.low = __shfl_sync(0xffffffffu, seen_.low, source);
      item.high = __shfl_sync(0xffffffffu, seen_.high, source);
      item.offset_q = params_.cu_seqlens_q != nullptr ? params_.cu_seqlens_q[item.batch] : 0;
      const bool found =
          params_.ranges_log2 > 0 ? set_range(item, start, end) : set_run(item, start, end);
      if (found) return true;
    }
    return false;
  }

  // Whether the item that `next` gave last ends this part's run.
  __device__ __forceinline__ bool is_done() const { return at_ >= end_; }

 private:
  // The blocks from at_ to `stop` of the sequence from `start` on.
  __device__ __forceinline__ void set_blocks(DecodeItem& item, unsigned start, unsigned stop) {
    const int first_block = item.low / kKeys;
    item.begin[0] = first_block + static_cast<int>(at_ - start);
    item.begin[1] = item.begin[0] + 1;
    item.end[0] = item.end[1] =
        item.high > item.low ? first_block + static_cast<int>(stop - start) : item.begin[0];
    at_ = stop;
  }

  // What is left of the run, of the sequence from `start` to `end`.
  __device__ __forceinline__ bool set_run(DecodeItem& item, unsigned start, unsigned end) {
    item.is_first = at_ == start;
    item.first_part = 0;
    item.parts = 1;
    item.range = 0;
    item.ranges = item.from = item.to = 0;
    if (start < at_ || end > end_) {
      item.first_part = part_of(start);
      item.parts = part_of(end - 1) - item.first_part + 1;
    }
    set_blocks(item, start, min(end_, end));
    return true;
  }

  // The next range of the sequence from `start` to `end`; false, and on to the next sequence, where
  // none is left for this part.
  __device__ __forceinline__ bool set_range(DecodeItem& item, unsigned start, unsigned end) {
    const unsigned blocks = end - start;
    const RangeCuts cuts = range_cuts(params_, item.len_q * params_.group, blocks);
    // Of two streams with a half each, this counts the first one's ranges and half of the blocks.
    const int shift = cuts.halves && cuts.log2 > 0;
    const unsigned ranges = 1u << (cuts.log2 - shift);
    // A range belongs to the part whose run has its middle. How many do before that of a run that
    // ends at a block:
    const auto before = [&](unsigned block) {
      return block >= end ? ranges : ranges_before(blocks, cuts.log2, (block - start) >> shift);
    };
    const unsigned range = before(at_), to = before(end_);
    if (range >= to) {
      at_ = end;
      return false;
    }
    const unsigned from = before(max(start, begin_of(blockIdx.y)));
    item.range = static_cast<unsigned char>(range);
    item.ranges = static_cast<short>(1 << cuts.log2);
    item.from = static_cast<short>(from);
    item.to = static_cast<short>(to);
    item.is_first = from == 0;
    item.first_part = 0;
    item.parts = 1;
    if (to - from < ranges) {
      // Up to the first range's middle.
      const unsigned half = (((blocks + (1u << cuts.log2) - 1) >> cuts.log2) + 1) / 2 << shift;
      item.parts = 2;  // or more
      item.first_part = params_.all_tiles < params_.parts
                            ? tile_
                            : static_cast<int>(part_of(min(start + half, end) - 1));
    }
    const RangeBlocks own = blocks_of_range(blocks, cuts.log2, range);
    set_range_blocks(item, own, blocks, cuts, ranges);
    at_ = range + 1 < ranges ? start + (own.end << shift) : end;
    return true;
  }

  // The blocks of a range, and of the second stream's where streams have halves of `ranges` each.
  __device__ __forceinline__ void set_range_blocks(DecodeItem& item, const RangeBlocks& own,
                                                   unsigned blocks, const RangeCuts& cuts,
                                                   unsigned ranges) {
    const int first = item.low / kKeys, sees = item.high > item.low;
    item.begin[0] = first + static_cast<int>(own.begin);
    item.end[0] = item.end[1] = first + static_cast<int>(own.end) * sees;
    item.begin[1] = item.begin[0] + 1;
    if (!cuts.halves) return;
    item.begin[1] = max(item.begin[1], item.end[0]);
    if (cuts.log2 == 0) return;
    const RangeBlocks second = blocks_of_range(blocks, cuts.log2, ranges + item.range);
    item.begin[1] = first + static_cast<int>(second.begin);
    item.end[1] = first + static_cast<int>(second.end);
  }

  // Where a part's run of blocks begins.
  __device__ __forceinline__ unsigned begin_of(unsigned part) const {
    return part * run_ + min(part, longer_);
  }

  __device__ __forceinline__ unsigned part_of(unsigned block) const {
    const unsigned in_longer = longer_ * (run_ + 1);
    const bool longer = block < in_longer;  // one division for both: it is 20 instructions
    return (longer ? 0 : longer_) + (block - (longer ? 0 : in_longer)) / (run_ + longer);
  }

  // This lane's tile of the 32 from `first` on.
  __device__ __forceinline__ void open(int first) {
    first_ = first;
    const int tile = first + threadIdx.x % 32;
    seen_ = {0, 0, 0};
    if (tile >= params_.all_tiles) return;
    of_ = lengths_of(params_, sequence_of(params_, tile));
    seen_ = seen_rows(params_, of_, tokens_of(params_, tile, of_.len_q));
  }

  const Params& params_;
  unsigned total_, at_, end_;  // in blocks, over all sequences
  unsigned run_, longer_;      // blocks of a part; so many parts have one more
  unsigned base_ = 0;          // where the 32 sequences begin
  int first_, tile_;
  DecodeLengths of_ = {0, 0, 0};
  SeenRows seen_ = {0, 0, 0};
};

using DecodeSchedule = ScheduleOf<DecodeParams, kDecodeKeys>;

}  // namespace jit_kernel::hopper
