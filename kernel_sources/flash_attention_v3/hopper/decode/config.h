// Everything that is fixed when a decode variant is compiled, and where things lie in shared
// memory. No device code: the launcher reads it too.
#pragma once

namespace jit_kernel::hopper {

constexpr int kDecodeKeys = 64;      // keys of a block: the rows of one wgmma
constexpr int kDecodePanel = 64;     // columns of a panel: 128 bytes, the widest swizzle
constexpr int kDecodeItemSlots = 2;  // items that the producer may be ahead
constexpr int kClusterParts =
    8;  // thread blocks that share one sequence's keys, where those are few
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

// A thread block has one or two streams, a consumer warpgroup each: two neighbouring key heads,
// whose rows lie beside each other in memory, or one key head whose blocks they take in turns.
template <class Element_, int kHeadDim_, int kRows_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of queries, keys and values, padded
  static constexpr int kRows = kRows_;  // packed query rows: tokens x group, no more in a sequence
  static constexpr int kStreams = kHeadDim > 128 ? 1 : 2;
  static constexpr int kThreads = 128 + 128 * kStreams;  // four producer warps
  // setmaxnreg: the producer's warps leave registers to the consumers. With 88 of their own they
  // spill beside 64 rows of head size 64.
  static constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
  static constexpr int kPanels = kHeadDim / kDecodePanel;
  static constexpr int kBytesOfStream = kDecodeKeys * kHeadDim * 2;  // keys, or values, of a stage
  static constexpr int kBytesTile = kStreams * kBytesOfStream;
  static constexpr int kBytesQ = kRows * kHeadDim * 2;  // of a stream
  static constexpr int kBytesP = kRows * kDecodeKeys * 2;

  static constexpr int kOffsetP = kStreams * kBytesQ;
  static constexpr int kOffsetTiles = kOffsetP + kStreams * 2 * kBytesP;
  // Keys and values take turns. 64 KB in flight a multiprocessor reach 99.6 % of the memory's rate,
  // 128 KB all of it, more only delays.
  static constexpr int kRoom = 200 * 1024 - kOffsetTiles;
  static constexpr int kFitting = kRoom / kBytesTile;
  static constexpr int kStages = kFitting > 10 ? 10 : kFitting;
  static constexpr int kOffsetStatistics = kOffsetTiles + kStages * kBytesTile;
  static constexpr int kBytesStatistics = 6 * kRows * 4;
  static constexpr int kOffsetQueries = kOffsetStatistics + kStreams * kBytesStatistics;
  static constexpr int kOffsetItem = kOffsetQueries + kStreams * kRows * 16;
  static constexpr int kOffsetBarriers = kOffsetItem + kDecodeItemSlots * 64;
  static constexpr int kBarriers = 2 * kStages + 2 * kDecodeItemSlots + 1;
  static constexpr int kOffsetEnd = kOffsetBarriers + kBarriers * 8;
  // What the blocks of a cluster send each other, four numbers of a row with their reference and
  // sum from each: behind all else, or among the tiles, behind the streams' own results.
  static constexpr int kQuadsOfBlock = kRows * kHeadDim / 4 / kClusterParts;
  static constexpr int kBytesOfQuad = 24;
  static constexpr int kBytesIncoming = kClusterParts * kQuadsOfBlock * kBytesOfQuad;
  static constexpr int kBytesResults = kStreams * kRows * kHeadDim * 4;
  static constexpr int kOffsetBehind = (kOffsetEnd + 15) / 16 * 16;
  static constexpr bool kRoomForIncoming = kOffsetBehind + kBytesIncoming <= 227 * 1024;
  static constexpr int kOffsetIncoming =
      kRoomForIncoming ? kOffsetBehind : kOffsetTiles + kBytesResults;
  static constexpr int kSharedBytes =
      kRoomForIncoming ? kOffsetBehind + kBytesIncoming : kOffsetEnd;
  static constexpr int kPartialFloats = kRows * (kHeadDim + 2);

  static_assert(kStreams == 1 ||
                    kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / 384 / 8 * 8),
                "no more registers than the block has at its start");
  static_assert(sizeof(DecodeItem) <= 64, "an item has 64 bytes of shared memory");
  static_assert(kRows % 8 == 0 && kRows <= 64, "columns of one wgmma");
  static_assert(kHeadDim % kDecodePanel == 0, "head sizes are padded to a panel");
  static_assert(kStages >= 3, "keys and values of a block, and something on its way");
  static_assert(kOffsetIncoming + kBytesIncoming <=
                    (kRoomForIncoming ? kSharedBytes : kOffsetStatistics),
                "results and what others send lie where the tiles did");
  static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB of shared memory");
};

// The one table of decode tiles: padded head size, packed query rows.
#define JIT_KERNEL_DECODE_TILES(TILE) \
  TILE(64, 8)                         \
  TILE(64, 16)                        \
  TILE(64, 32)                        \
  TILE(64, 64)                        \
  TILE(128, 8) TILE(128, 16) TILE(128, 32) TILE(128, 64) TILE(256, 8) TILE(256, 16) TILE(256, 32)

}  // namespace jit_kernel::hopper
