// Everything that is fixed when an MLA variant is compiled, and where things lie in shared memory.
// No device code: the launcher reads it too.
#pragma once

#include "flash_attention_v3/hopper/decode/config.h"

namespace jit_kernel::hopper {

constexpr int kMlaTileRows = 64;             // most packed query rows of a tile
constexpr int kMlaKeys = 64;                 // keys of a buffer
constexpr int kMlaBlockKeys = 2 * kMlaKeys;  // of a block: one buffer for each consumer warpgroup
constexpr int kMlaBytesPanel = 64 * 64 * 2;  // 64 keys of 64 columns
constexpr int kMlaThreads = 384;             // four producer warps, two consumer warpgroups
constexpr int kMlaCounters = 4;  // of a cut sequence: arrived, slices taken, parts that have left

struct MlaItem : DecodeItem {
  int is_last;    // of this part's
  int plain_end;  // rows of the cache from here on are another part's, or have bits in a draft mask
};

// The keys' latent columns are the values as well: panels of 64 columns, in a left and a right
// half. The last panel holds the 64 columns of k. Of 64 rows a consumer warpgroup has one half of
// the output (halves.cuh); of fewer, which are the columns of the products then, it has every
// second 64 keys (swapped.cuh).
//
// Of an e4m3 cache products are made in fp16, which holds it exactly, and the queries' type is
// settled at run time. Up to 32 rows the consumers convert what they load into registers
// (streamed.cuh), else in place, before they score it (mixed.cuh).
template <class Element_, int kHeadDimV_, int kRows_, bool kMixed_ = false>
struct MlaConfig {
  using Element = Element_;                // of products: fp16 where the cache is in e4m3
  static constexpr bool kMixed = kMixed_;  // k and v are in e4m3
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kRows = kRows_;
  static constexpr bool kIsSwapped = kRows < kMlaTileRows;
  static constexpr bool kIsStreamed = kMixed && kIsSwapped;  // keys stay in e4m3 in shared memory
  // With fewer consumers' registers 512 columns spill, with fewer producers' 256 and 16 rows do.
  static constexpr bool kIsWide = kHeadDimV > 256 && kRows > 16;
  static constexpr int kProducerRegisters = kIsWide ? 40 : 56;
  static constexpr int kConsumerRegisters = kIsWide ? 232 : 224;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kMlaThreads / 8 * 8),
                "no more registers than the block has at its start");
  static constexpr int kBlocksAtOnce = 1;  // of which decode/ keeps probabilities
  static constexpr int kPanelsV = kHeadDimV / 64;
  static constexpr int kHalf = kPanelsV / 2;
  static constexpr int kPanels = kPanelsV + 1;
  static constexpr int kPairs = kPanelsV / 2;  // of panels: 128 columns, a row of 128 bytes in e4m3
  static constexpr int kBuffers = kIsStreamed ? 4 : 2;  // two for each warpgroup, or one
  static constexpr int kBytesKeys = (kIsStreamed ? kPairs + 1 : kPanels) * kMlaBytesPanel;
  static constexpr int kBytesPanelQ = kRows * 64 * 2;
  static constexpr int kBytesQueries = kPanels * kBytesPanelQ;
  static constexpr int kBytesP = kRows * kMlaKeys * 2;

  // Probabilities of the first buffer's keys. Those of the second: swapped, as decode/ has them,
  // two for each warpgroup, else where q's 64 columns lay, which the consumers hold in registers:
  // 8 KB that are not there otherwise.
  static constexpr int kOffsetP = kBytesQueries;
  static constexpr int kOffsetSecond = kPanelsV * kBytesPanelQ;
  static constexpr int kOffsetKeys = kOffsetP + (kIsSwapped ? 4 : 1) * kBytesP;
  static constexpr int kOffsetStatistics = kOffsetKeys + kBuffers * kBytesKeys;
  static constexpr int kBytesStatistics = (kIsStreamed  ? 8
                                           : kIsSwapped ? 7
                                                        : 3) *
                                          kRows * 4;  // of a warpgroup
  static constexpr int kOffsetQueries = kOffsetStatistics + 2 * kBytesStatistics;
  static constexpr int kOffsetItem = kOffsetQueries + kRows * 16;
  static constexpr int kItemSlots = 2;  // items that the producer may be ahead
  static constexpr int kBytesItem = 80;
  static constexpr int kOffsetAnswer = kOffsetItem + kItemSlots * kBytesItem;
  static constexpr int kOffsetBarriers = kOffsetAnswer + 8;
  // Full: of each panel, or pair of panels in e4m3. Empty: of each half of a buffer. Items: full
  // and empty.
  static constexpr int kFulls = kMixed ? kPairs + 1 : kPanels;  // of a buffer
  static constexpr int kFirstEmpty = kBuffers * kFulls;
  static constexpr int kFirstItem = kFirstEmpty + 2 * kBuffers;
  static constexpr int kBarriers = kFirstItem + 2 * kItemSlots;
  static constexpr int kSharedBytes = kOffsetBarriers + kBarriers * 8;
  static constexpr int kPartialFloats = kRows * (kHeadDimV + 2);

  // Half of a result as rows, where the queries lay: 4 numbers of padding keep a warp's apart in
  // the banks.
  static constexpr int kResultPitch = kHeadDimV / 2 + 4;

  static_assert(sizeof(MlaItem) <= kBytesItem, "an item has its place in shared memory");
  static_assert(kHeadDimV % 128 == 0, "two halves of whole panels");
  static_assert(kHalf % 2 == 0, "pairs of panels do not cross the halves");
  static_assert(kRows % 16 == 0, "panels of queries are aligned to the swizzle");
  static_assert(!kIsSwapped || kRows * kResultPitch * 4 <= kOffsetKeys, "a result has its place");
  static_assert(kSharedBytes <= kMostSharedBytes, "a block of sm_90 has 227 KiB of shared memory");
};

// The one table of MLA variants: head sizes of the values, packed query rows.
#define JIT_KERNEL_MLA_TILES(TILE) \
  TILE(256, 16) TILE(256, 32) TILE(256, 64) TILE(512, 16) TILE(512, 32) TILE(512, 64)

}  // namespace jit_kernel::hopper
