// Everything that is fixed when a backward kernel is compiled, and where things lie in shared
// memory. No device code: the launcher reads it too.
#pragma once

#include "flash_attention_v3/hopper/backward/params.h"
#include "flash_attention_v3/hopper/common/warpgroups.h"
#include "jit_kernel/cuda/element_types.h"

namespace jit_kernel::hopper {

enum : int {
  kPartRows = 64,  // the sums of a tile's grad_q lie in parts of 64 x 64, a wgmma's accumulators
  kPartFloats = 64 * 64,
  kPrepareThreads = 256,
  kFinishThreads = 128,
};

// A block's tile of keys, of one key head.
struct KeyTile {
  int batch, head;  // of the keys
  int len_q, len_k;
  int first_key;   // of the tile
  int seen_key;    // the first of the sequence that some query sees
  int seeing_row;  // the first query that sees some key
  int begin, end;  // tiles of queries that see some key of the tile
  int tile_q;      // the sequence's first tile of queries
};

// Up to 128 scores and their gradients are computed with keys as rows, 64 to a warpgroup, whose
// sums of grad_k and grad_v take head_dim registers of a thread; that leaves room for 64 queries at
// 128. At 256 both warpgroups have the same 64 keys and half of the columns each.
template <int kHeadDim>
struct BackwardTile;
template <>
struct BackwardTile<64> {
  enum : int { kQueries = 128, kKeys = 128, kStagesGradOut = 2 };
};
template <>
struct BackwardTile<128> {
  enum : int { kQueries = 64, kKeys = 128, kStagesGradOut = 2 };
};
template <>
struct BackwardTile<256> {
  enum : int { kQueries = 64, kKeys = 64, kStagesGradOut = 1 };
};

template <class Element_, int kHeadDim_, bool kSoftcap_>
struct BackwardConfig {
  using Element = Element_;
  using Tile = BackwardTile<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kQueries = Tile::kQueries;
  static constexpr int kKeys = Tile::kKeys;
  static constexpr int kWarpgroups = 2;
  static constexpr bool kIsWide = kKeys == kRowsPerWarpgroup;
  static constexpr bool kCarriesGradK = kHeadDim == 128;  // 64 queries leave registers for it
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kStages = 2;  // of queries, and of the gradients of scores
  static constexpr int kStagesGradOut = Tile::kStagesGradOut;

  // Tiles lie in panels of 64 columns, 128 bytes a row.
  static constexpr int kPanel = 64;
  static constexpr int kPanelKeys = kKeys * 128;  // bytes of a panel
  static constexpr int kPanelQueries = kQueries * 128;
  static constexpr int kBytesKeys = kKeys * kHeadDim * 2;
  static constexpr int kBytesQueries = kQueries * kHeadDim * 2;
  static constexpr int kBytesScores = kKeys * kQueries * 2;
  static constexpr int kScoreBuffers = kIsWide ? 2 * kStages : kStages;  // wide: probabilities, too
  static constexpr int kParts = kQueries / 64 * (kHeadDim / 64);         // of a tile's grad_q
  static constexpr int kPartColumns = kHeadDim / 64;                     // parts beside each other
  static constexpr int kTurns = kParts / kWarpgroups;  // parts that a warpgroup computes
  static constexpr int kPartBytes = kPartFloats * 4;
  static constexpr int kOffsetV = kBytesKeys;
  static constexpr int kOffsetQ = kOffsetV + kBytesKeys;
  static constexpr int kOffsetGradOut = kOffsetQ + kStages * kBytesQueries;
  static constexpr int kOffsetScores = kOffsetGradOut + kStagesGradOut * kBytesQueries;
  static constexpr int kOffsetSums = kOffsetScores + kScoreBuffers * kBytesScores;
  static constexpr int kOffsetLse = kOffsetSums + kWarpgroups * kPartBytes;
  static constexpr int kOffsetDelta = kOffsetLse + kStages * kQueries * 4;
  static constexpr int kOffsetBarriers = kOffsetDelta + kStagesGradOut * kQueries * 4;
  static constexpr int kBarriers = 1 + 2 * kStages + 2 * kStagesGradOut + 2 * kWarpgroups;
  static constexpr int kOffsetTile = kOffsetBarriers + kBarriers * 8;
  static constexpr int kSharedBytes = kOffsetTile + int(sizeof(KeyTile));

  static_assert(kTurns * kWarpgroups == kParts, "each warpgroup has as many parts");
  static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB of shared memory");
};

}  // namespace jit_kernel::hopper
