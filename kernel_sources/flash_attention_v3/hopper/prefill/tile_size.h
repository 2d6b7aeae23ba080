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
  static constexpr int kStagesLoaded = kStages, kTransposers = 0, kPartColumns = 0;
};

// Of e4m3. kStagesLoaded: of values as they are loaded, 0 where a kernel before has transposed
// them; kStages: of keys, and of transposed values. kPartColumns: the output of a block is
// multiplied in parts of so many columns.
template <int kKeys_, int kWarpgroups_, int kStagesQ_, int kStages_, int kStagesLoaded_,
          bool kPingPong_, int kPartColumns_>
struct Fp8Tile {
  static constexpr int kKeys = kKeys_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kStagesQ = kStagesQ_;
  static constexpr int kStages = kStages_;
  static constexpr int kStagesLoaded = kStagesLoaded_;
  static constexpr bool kOverlap = true;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kQuerySteps = 0;
  static constexpr int kTransposers = kStagesLoaded > 0 ? 2 : 0;
  static constexpr int kPartColumns = kPartColumns_;
};

template <int kHeadDim, int kHeadDimV, bool kMasked>
struct TileFor;
template <int kHeadDim, bool kMasked, bool kPrepared>
struct Fp8TileFor;

#define JIT_KERNEL_TILE(head_dim, head_dim_v, ...) \
  template <bool kMasked>                          \
  struct TileFor<head_dim, head_dim_v, kMasked> : Tile<__VA_ARGS__> {};
#include "flash_attention_v3/hopper/prefill/tile_table.inc"

#define JIT_KERNEL_FP8_TILE(head_dim, ...) \
  template <bool kMasked>                  \
  struct Fp8TileFor<head_dim, kMasked, false> : Fp8Tile<__VA_ARGS__> {};
#define JIT_KERNEL_FP8_PREPARED_TILE(head_dim, ...) \
  template <bool kMasked>                           \
  struct Fp8TileFor<head_dim, kMasked, true> : Fp8Tile<__VA_ARGS__> {};
#include "flash_attention_v3/hopper/prefill/fp8_tile_table.inc"

}  // namespace jit_kernel::hopper
