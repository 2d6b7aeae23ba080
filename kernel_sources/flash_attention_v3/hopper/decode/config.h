// Everything that is fixed when a decode variant is compiled, and where things lie in shared
// memory. No device code: the launcher reads it too.
#pragma once

namespace jit_kernel::hopper {

constexpr int kDecodeKeys = 64;      // keys of a block: the rows of one wgmma
constexpr int kDecodePanel = 64;     // columns of a panel: 128 bytes, the widest swizzle
constexpr int kDecodeItemSlots = 4;  // items that the warp which finds them may be ahead
constexpr int kMostSharedBytes = 227 * 1024;
constexpr int kClusterParts =
    8;  // thread blocks that share one sequence's keys, where those are few
constexpr int kPartialsPerBlock = 2;  // a block's run of work is cut at most at both of its ends
// Fixed ranges: a sequence of more blocks has twice as many, and one of more query rows wide ones,
// whose results take as long to keep as keys to read.
constexpr int kBlocksOfShort = 128;
constexpr int kRowsOfNarrowRange = 32, kBlocksOfWideRange = 32;
constexpr int kMostRangesLog2 = 7;
// Of a sequence of more query rows 2^kChainLog2 ranges are joined in turn, so that a stream keeps
// one result where a tree has three: what shared memory has no room for takes as long to come as
// keys do.
constexpr int kRowsOfTree = 16, kChainLog2 = 3;

// A sequence, and the blocks of its keys that are this part's.
struct DecodeItem {
  int batch;  // -1 ends them
  int len_q, offset_q;
  int first_token;     // of this tile's
  int len_k, leftpad;  // key j is row leftpad + j of the cache
  int low, high;       // rows of the cache that some query sees
  // Blocks of kDecodeKeys rows of the cache, of each of two streams of one head: every second one,
  // or a range. Of two heads, or of one stream, the first numbers hold; the last end is the item's.
  int begin[2], end[2];
  int first_part;          // the parts that share the item
  short parts;             // 1: it is whole
  unsigned char is_first;  // of a shared item: whether it begins in this part
  // An item of a call with fixed ranges is one range of a sequence, or a cluster's part of them; of
  // two streams of one head the second one's range lies so many behind as a half has. first_part:
  // where the ranges of a sequence meet that several parts share.
  unsigned char range;  // which one it is
  short ranges;         // of the whole sequence; 0: the call's splits are free
  short from, to;       // this part's ranges of the sequence, those of the first half where streams
                        // have halves
};

// A packed query row: which query it is and the rows of the cache that it sees.
struct alignas(16) DecodeQuery {
  int low, high;
  int token;  // -1: none
  int head;
};

// A thread block has one or two streams, a consumer warpgroup each: two neighbouring key heads,
// whose rows lie beside each other in memory, or one key head whose blocks they take in turns.
template <class Element_, int kHeadDim_, int kRows_, bool kMixed_ = false>
struct DecodeConfig {
  using Element = Element_;                // of queries and of the result
  static constexpr bool kMixed = kMixed_;  // keys and values in e4m3, which are computed in fp16
  static constexpr int kCacheBytes = kMixed ? 1 : 2;
  static constexpr int kHeadDim = kHeadDim_;  // of queries, keys and values, padded
  static constexpr int kRows = kRows_;  // packed query rows: tokens x group, no more in a sequence
  static constexpr int kStreams = kHeadDim * kCacheBytes > 256 ? 1 : 2;
  static constexpr int kThreads = 128 + 128 * kStreams;  // four producer warps
  // setmaxnreg: the producer's warps leave registers to the consumers. With 88 of their own they
  // spill beside 64 rows of head size 64; with 200 the consumers do beside 64 rows of 128, and
  // beside 32 rows of e4m3.
  static constexpr bool kManyNumbers = kHeadDim == 128 && kRows == (kMixed ? 32 : 64);
  static constexpr int kProducerRegisters = kManyNumbers ? 88 : 104;
  static constexpr int kConsumerRegisters = kManyNumbers ? 208 : 200;
  // Whether a producer warp may find items for another one: beside 32 rows of e4m3 it would spill.
  static constexpr bool kFindsAhead = !(kMixed && kManyNumbers);
  static constexpr int kPanels = kHeadDim / kDecodePanel;  // of queries and of the result
  // Of keys and values: 128 bytes, the widest swizzle, or a row where it is shorter.
  static constexpr int kCachePanel = kMixed && kHeadDim > 64 ? 128 : 64;  // columns
  static constexpr int kCachePanels = kHeadDim / kCachePanel;
  static constexpr int kPanelBytes = kCachePanel * kCacheBytes;                // of a row
  static constexpr int kBytesOfStream = kDecodeKeys * kHeadDim * kCacheBytes;  // of a stage
  static constexpr int kBytesTile = kStreams * kBytesOfStream;
  static constexpr int kBytesQ = kRows * kHeadDim * 2;  // of a stream
  static constexpr int kBytesP = kRows * kDecodeKeys * 2;
  // Blocks that a stream of e4m3 computes side by side, where there are registers for them.
  // When values of e4m3 are loaded: while the first product runs, behind it, or behind the second
  // operand of their own.
  static constexpr bool kEarlyValues = kRows * kHeadDim <= 4096;
  static constexpr int kBlocksAtOnce = kMixed && kHeadDim <= 128 && kRows <= 32 ? 2 : 1;

  static constexpr int kOffsetP = kStreams * kBytesQ;
  static constexpr int kOffsetTiles = kOffsetP + kStreams * 2 * kBlocksAtOnce * kBytesP;
  // Keys and values take turns. 64 KB in flight a multiprocessor reach 99.6 % of the memory's rate,
  // 128 KB all of it, more only delays.
  static constexpr int kRoom = 200 * 1024 - kOffsetTiles;
  static constexpr int kFitting = kRoom / kBytesTile;
  static constexpr int kStages = kFitting > 10 ? 10 : kFitting;
  static constexpr int kOffsetStatistics = kOffsetTiles + kStages * kBytesTile;
  static constexpr int kBytesStatistics = (kMixed ? 7 : 6) * kRows * 4;
  // Of an e4m3 cache with a scale of each token and head: those of a stage's keys, or values.
  static constexpr int kOffsetScales = kOffsetStatistics + kStreams * kBytesStatistics;
  static constexpr int kBytesScales = kMixed ? kStreams * kDecodeKeys * 4 : 0;
  static constexpr int kOffsetQueries = kOffsetScales + kStages * kBytesScales;
  static constexpr int kOffsetItem = kOffsetQueries + kStreams * kRows * 16;
  static constexpr int kBytesItem = 64;
  // The places of an item's first boxes, a lane's each.
  static constexpr int kOffsetPlaces = kOffsetItem + kDecodeItemSlots * kBytesItem;
  static constexpr int kBytesPlaces = 32 * 4;
  static constexpr int kOffsetBarriers = kOffsetPlaces + kDecodeItemSlots * kBytesPlaces;
  static constexpr int kBarriers = 2 * kStages + 2 * kDecodeItemSlots + 1;
  static constexpr int kOffsetBehind = (kOffsetBarriers + kBarriers * 8 + 15) / 16 * 16;

  // Results of ranges that wait for those behind them, of a call with fixed ranges, a level of the
  // tree of ranges each: references and sums, then units of 16 bytes a thread, behind all else as
  // far as there is room, else in the launch's memory for partial results.
  static constexpr int kKeptLevels = kMostRangesLog2;
  static constexpr int kUnits = kRows * kHeadDim / 512, kBytesOfUnit = 128 * 16;  // of a stream
  static constexpr int kOffsetUnits = kOffsetBehind + kStreams * kKeptLevels * kRows * 8;
  static constexpr int kRoomForUnits = (kMostSharedBytes - kOffsetUnits) / kStreams / kBytesOfUnit;
  static constexpr int kSharedUnits =
      kRoomForUnits < kKeptLevels * kUnits ? kRoomForUnits : kKeptLevels * kUnits;
  static constexpr int kSharedLevels = kSharedUnits / kUnits;  // that lie there as a whole

  // In the same place what the blocks of a cluster send each other, four numbers of a row with
  // their reference and sum. Without room among the tiles, behind the streams' own results.
  static constexpr int kQuadsOfBlock = kRows * kHeadDim / 4 / kClusterParts;
  static constexpr int kBytesOfQuad = 24;
  static constexpr int kBytesIncoming = kClusterParts * kQuadsOfBlock * kBytesOfQuad;
  static constexpr bool kRoomForIncoming = kOffsetBehind + kBytesIncoming <= kMostSharedBytes;
  static constexpr int kBytesResults = kStreams * kRows * kHeadDim * 4;
  static constexpr int kOffsetIncoming =
      kRoomForIncoming ? kOffsetBehind : kOffsetTiles + kBytesResults;
  static constexpr int kOffsetEnds = kOffsetIncoming + kClusterParts * kQuadsOfBlock * 16;

  static constexpr int kEndOfUnits = kOffsetUnits + kStreams * kSharedUnits * kBytesOfUnit;
  static constexpr int kEndOfIncoming = kOffsetBehind + (kRoomForIncoming ? kBytesIncoming : 0);
  static constexpr int kSharedBytes = kEndOfUnits > kEndOfIncoming ? kEndOfUnits : kEndOfIncoming;
  // A row's numbers, reference and sum, and behind all rows how many ranges it is of.
  static constexpr int kOffsetCount = kRows * (kHeadDim + 2);
  static constexpr int kPartialFloats = kOffsetCount + 4;

  // Which columns of the result a thread has: of each panel two, kHalfStep apart. Of 16 bits a
  // panel's are the panel's rows in the second product; of e4m3 those whose bytes a thread loads
  // side by side, in steps of a warp and of four lanes.
  static constexpr int kPanelStep = kMixed ? 2 : 64, kHalfStep = kMixed ? 1 : 8;
  static constexpr int kWarpStep = kMixed ? kHeadDim / 4 : 16,
                       kLaneStep = kMixed ? kHeadDim / 32 : 1;

  static_assert(kStreams == 1 ||
                    kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / 384 / 8 * 8),
                "no more registers than the block has at its start");
  static_assert(sizeof(DecodeItem) <= kBytesItem, "an item has its place in shared memory");
  static_assert(kRows % 8 == 0 && kRows <= 64, "columns of one wgmma");
  static_assert(kHeadDim % kDecodePanel == 0, "head sizes are padded to a panel");
  static_assert(kStages >= 3, "keys and values of a block, and something on its way");
  static_assert(kOffsetIncoming + kBytesIncoming <=
                    (kRoomForIncoming ? kSharedBytes : kOffsetStatistics),
                "results and what others send lie where the tiles did");
  static_assert(kRoomForUnits >= 0, "references and sums of ranges have room");
  static_assert(kSharedBytes <= kMostSharedBytes, "a block of sm_90 has 227 KiB of shared memory");
};

// The one table of decode tiles: padded head size, packed query rows.
#define JIT_KERNEL_DECODE_TILES(TILE) \
  TILE(64, 8)                         \
  TILE(64, 16)                        \
  TILE(64, 32)                        \
  TILE(64, 64)                        \
  TILE(128, 8) TILE(128, 16) TILE(128, 32) TILE(128, 64) TILE(256, 8) TILE(256, 16) TILE(256, 32)

}  // namespace jit_kernel::hopper
