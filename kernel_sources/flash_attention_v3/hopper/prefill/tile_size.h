// Tile of each variant: keys of a block, consumer warpgroups of 64 queries, stages, schedule.
#pragma once

namespace jit_kernel::hopper {

template <int kKeys_, int kWarpgroups_, int kStagesQ_, int kStages_, bool kOverlap_,
          bool kPingPong_, int kQuerySteps_>
struct Tile {
  static constexpr int kKeys = kKeys_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kStagesQ = kStagesQ_;
  static constexpr int kStages = kStages_;  // of keys, and of values
  static constexpr bool kOverlap = kOverlap_;
  static constexpr bool kPingPong = kPingPong_;
  // Of the scores' product, 16 columns each: so many take the queries from registers.
  static constexpr int kQuerySteps = kQuerySteps_;
};

template <int kHeadDim, int kHeadDimV, bool kMasked>
struct TileFor;

template <bool kMasked>
struct TileFor<64, 64, kMasked> : Tile<96, 4, 2, 3, false, !kMasked, 0> {};
template <bool kMasked>
struct TileFor<96, 96, kMasked> : Tile<128, 2, 1, 3, true, true, 6> {};
template <bool kMasked>
struct TileFor<128, 128, kMasked> : Tile<128, 2, 1, 3, true, true, 8> {};
template <bool kMasked>
struct TileFor<192, 128, kMasked> : Tile<112, 2, 1, 2, true, true, 12> {};
template <bool kMasked>
struct TileFor<192, 192, kMasked> : Tile<96, 2, 1, 2, true, true, 4> {};
template <bool kMasked>
struct TileFor<256, 256, kMasked> : Tile<80, 2, 1, 2, true, !kMasked, kMasked ? 2 : 0> {};

}  // namespace jit_kernel::hopper
