// Everything that is fixed when a decode variant is compiled, and where things lie in shared memory.
// No device code: the launcher reads it too.
#pragma once

namespace jit_kernel::hopper {

constexpr int kDecodeKeys = 64;       // keys of a block: the rows of one wgmma
constexpr int kDecodePanel = 64;      // columns of a panel: 128 bytes, the widest swizzle
constexpr int kDecodeItemSlots = 2;   // items that the producer may be ahead
constexpr int kDecodeThreads = 256;   // four producer warps, four consumer warps
constexpr int kPartialsPerBlock = 2;  // a block's run of work is cut at most at both of its ends

// A sequence, and the blocks of its keys that are this part's.
struct DecodeItem {
  int batch;  // -1 ends them
  int len_q, offset_q;
  int len_k, leftpad;          // key j is row leftpad + j of the cache
  int low, high;               // rows of the cache that some query sees
  int block_begin, block_end;  // blocks of kDecodeKeys rows of the cache
  int first_part, parts;       // the parts that share the item; 1: it is whole
  int is_first;                // of a shared item: whether it begins in this part
};

// A packed query row: which query it is and the rows of the cache that it sees.
struct alignas(16) DecodeQuery {
  int low, high;
  int token;  // -1: none
  int head;
};

template <class Element_, int kHeadDim_, int kRows_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of queries, keys and values, padded
  static constexpr int kRows = kRows_;        // packed query rows: tokens x group, no more in a sequence
  static constexpr int kPanels = kHeadDim / kDecodePanel;
  static constexpr int kBytesTile = kDecodeKeys * kHeadDim * 2;  // keys, or values, of a stage
  static constexpr int kBytesQ = kRows * kHeadDim * 2;
  static constexpr int kBytesP = kRows * kDecodeKeys * 2;
  // Bytes in flight: 32 KB a multiprocessor reach 95 % of the memory's rate, 64 KB 99.6 %.
  static constexpr int kStages = kHeadDim == 64 ? 5 : kHeadDim == 128 ? 5 : kRows == 64 ? 2 : 3;
  static constexpr int kResidents = kHeadDim == 64 ? 2 : 1;  // blocks of a multiprocessor

  static constexpr int kOffsetP = kBytesQ;
  static constexpr int kOffsetK = kOffsetP + 2 * kBytesP;
  static constexpr int kOffsetV = kOffsetK + kStages * kBytesTile;
  static constexpr int kOffsetStatistics = kOffsetV + kStages * kBytesTile;
  static constexpr int kOffsetQueries = kOffsetStatistics + 6 * kRows * 4;
  static constexpr int kOffsetItem = kOffsetQueries + kRows * 16;
  static constexpr int kOffsetBarriers = kOffsetItem + kDecodeItemSlots * 64;
  static constexpr int kBarriers = 4 * kStages + 2 * kDecodeItemSlots;
  static constexpr int kSharedBytes = kOffsetBarriers + kBarriers * 8;
  static constexpr int kPartialFloats = kRows * (kHeadDim + 2);

  static_assert(sizeof(DecodeItem) <= 64, "an item has 64 bytes of shared memory");
  static_assert(kRows % 8 == 0 && kRows <= 64, "columns of one wgmma");
  static_assert(kHeadDim % kDecodePanel == 0, "head sizes are padded to a panel");
  static_assert(kResidents * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of sm_90");
};

// The one table of decode tiles: padded head size, packed query rows.
#define JIT_KERNEL_DECODE_TILES(TILE)                   \
  TILE(64, 8) TILE(64, 16) TILE(64, 32) TILE(64, 64)     \
  TILE(128, 8) TILE(128, 16) TILE(128, 32) TILE(128, 64) \
  TILE(256, 8) TILE(256, 16) TILE(256, 32) TILE(256, 64)

}  // namespace jit_kernel::hopper
