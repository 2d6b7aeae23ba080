// Tile of each variant: keys of a block, consumer warpgroups of 64 queries, stages, schedule.
// tile_table.inc says which there are, and why.
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

#define JIT_KERNEL_TILE(head_dim, head_dim_v, ...) \
  template <bool kMasked>                          \
  struct TileFor<head_dim, head_dim_v, kMasked> : Tile<__VA_ARGS__> {};
#include "flash_attention_v3/hopper/prefill/tile_table.inc"

}  // namespace jit_kernel::hopper
