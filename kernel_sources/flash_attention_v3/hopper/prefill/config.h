// Everything that is fixed when a variant is compiled, and where things lie in shared memory. No
// device code: the launcher reads it too.
#pragma once

#include "flash_attention_v3/hopper/common/warpgroups.h"
#include "flash_attention_v3/hopper/prefill/cached_params.h"
#include "flash_attention_v3/hopper/prefill/fp8_params.h"
#include "flash_attention_v3/hopper/prefill/tile_size.h"
#include "jit_kernel/cuda/element_types.h"

namespace jit_kernel::hopper {

constexpr int kTileSlots = 2;
constexpr int kMaxSorted = 1024;  // longest batch whose sequences are put in order of length

// What the scheduler tells the producer and the consumers about a tile; batch -1 ends them.
struct TileInfo {
  int batch, head, row;  // row: first query of the tile, within its sequence
  int len_q, len_k, offset_q;
  int block_begin, block_end;  // blocks of keys, walked from the last to the first
};

// The same in e4m3, with the factors of the sequence's and head's scores and values.
struct Fp8TileInfo : TileInfo {
  TileFactors factors;
};

// The same of keys in a cache, whose rows are numbered as cached_params.h says. head is the first
// of the tile's query heads, row counts packed rows, len_q tokens.
struct CachedTileInfo : TileInfo {
  int leftpad, cache_row;   // cache_row: of the page table, or of the dense cache
  int low, high;            // rows of the cache that some row of the tile sees
  int part, parts;          // of the tile's keys, and how many there are
  int ordinal, first_part;  // the tile's number among all, and its first part's
};

// Calls on cached keys have one kernel for each pair of head sizes: what they ask for is found out
// at run time.
template <bool kCached, bool kFp8>
struct CallTypes {
  using Params = ForwardParams;
  using Info = TileInfo;
};
template <>
struct CallTypes<true, false> {
  using Params = CachedParams;
  using Info = CachedTileInfo;
};
template <>
struct CallTypes<false, true> {
  using Params = Fp8Params;
  using Info = Fp8TileInfo;
};

template <class Element_, int kHeadDim_, int kHeadDimV_, bool kMasked_, bool kSoftcap_, class Tile,
          bool kCached_ = false>
struct Config {
  using Element = Element_;
  static constexpr int kElementBytes = ElementSize<Element>::kBytes;
  static constexpr bool kFp8 = kElementBytes == 1;
  using Params = typename CallTypes<kCached_, kFp8>::Params;
  using Info = typename CallTypes<kCached_, kFp8>::Info;
  static constexpr bool kCached = kCached_;
  static constexpr bool kTileFactors = kCached || kFp8;  // a tile has factors of its own
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kMasked = kMasked_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kKeys = Tile::kKeys;  // keys of a block
  static constexpr int kWarpgroups = Tile::kWarpgroups;
  static constexpr int kRows = kWarpgroups * kRowsPerWarpgroup;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kStagesQ = Tile::kStagesQ;
  static constexpr int kStages = Tile::kStages;
  static constexpr bool kOverlap = Tile::kOverlap;
  static constexpr bool kPingPong = Tile::kPingPong;
  static constexpr int kQuerySteps = Tile::kQuerySteps;
  static constexpr bool kQueriesInRegisters = kQuerySteps * 16 == kHeadDim;  // all of them
  static constexpr int kProducerRegisters = Registers<kWarpgroups>::kProducer;
  static constexpr int kConsumerRegisters = Registers<kWarpgroups>::kConsumer;

  // A tile lies in panels of one swizzle width of columns each.
  static constexpr int kPanel = (kHeadDim * kElementBytes % 128 == 0 ? 128 : 64) / kElementBytes;
  static constexpr int kPanelV = (kHeadDimV * kElementBytes % 128 == 0 ? 128 : 64) / kElementBytes;
  static constexpr int kBytesQ = kRowsPerWarpgroup * kHeadDim * kElementBytes;  // of one warpgroup
  static constexpr int kBytesK = kKeys * kHeadDim * kElementBytes;
  static constexpr int kBytesV = kKeys * kHeadDimV * kElementBytes;
  static constexpr int kOffsetK = kStagesQ * kWarpgroups * kBytesQ;
  static constexpr int kOffsetV = kOffsetK + kStages * kBytesK;
  // Values of e4m3 are loaded here, and transposed to where others are loaded.
  static constexpr int kTransposers = Tile::kTransposers;  // warps
  static constexpr int kStagesLoaded = kTransposers > 0 ? Tile::kStagesLoaded : kStages;
  static constexpr int kPartColumns =
      kFp8 ? Tile::kPartColumns : kHeadDimV;  // of the output, multiplied at a time
  static constexpr int kParts = kFp8 ? kHeadDimV / kPartColumns : 1;
  // Values of e4m3 that a kernel before has transposed; else warps of this one do.
  static constexpr bool kPrepared = kFp8 && kTransposers == 0;
  static constexpr int kOffsetLoaded = kOffsetV + kStages * kBytesV;
  static constexpr int kOffsetOrder =
      kOffsetLoaded + (kTransposers > 0 ? kStagesLoaded * kBytesV : 0);
  static constexpr int kOffsetTile = kOffsetOrder + kMaxSorted * 2;
  static constexpr int kOffsetBarriers = kOffsetTile + kTileSlots * int(sizeof(Info));
  static constexpr int kLoadedBarriers =
      2 * kStagesQ * kWarpgroups + 4 * kStages + 2 * kTileSlots + 1;
  static constexpr int kBarriers = kLoadedBarriers + (kTransposers > 0 ? 2 * kStagesLoaded : 0);
  static constexpr int kSharedBytes = kOffsetBarriers + kBarriers * 8;

  static_assert(!kCached || (kMasked && kSoftcap), "cached keys are masked and capped at run time");
  static_assert(kWarpgroups >= 2 && kWarpgroups <= 4, "two to four consumer warpgroups");
  static_assert(kKeys % 16 == 0 && kKeys <= 256, "a block of keys is a multiple of wgmma's k");
  static_assert(!kFp8 || kKeys == 128 || kKeys == 64, "the bytes of a row of transposed values");
  static_assert(!kFp8 || (kOverlap && kQuerySteps == 0 && !kCached && kHeadDim % 64 == 0),
                "what the kernels in e4m3 are made for");
  static_assert(kParts == 1 || kParts == 4, "see run_in_parts()");
  static_assert(!kPrepared || kParts > 1, "run_overlapped() clears no prepared values");
  static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "head sizes are padded to a panel");
  static_assert(kQuerySteps >= 0 && kQuerySteps <= kHeadDim / 16, "steps of the head size");
  static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB of shared memory");
};

}  // namespace jit_kernel::hopper
