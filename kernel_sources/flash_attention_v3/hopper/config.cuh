// Everything that is fixed when a variant is compiled, and where things lie in shared memory.
#pragma once

#include "flash_attention_v3/hopper/params.h"
#include "flash_attention_v3/hopper/tile_size.h"
#include "jit_kernel/wgmma.cuh"

namespace jit_kernel::hopper {

constexpr int kRowsPerWarpgroup = 64;
constexpr int kMaxSorted = 1024;  // longest batch whose sequences are put in order of length

// What the scheduler tells the producer and the consumers about a tile; batch -1 ends them.
struct TileInfo {
  int batch, head, row;  // row: first query of the tile, within its sequence
  int len_q, len_k, offset_q;
  int block_begin, block_end;  // blocks of keys, walked from the last to the first
};

template <class Element_, int kHeadDim_, int kHeadDimV_, bool kMasked_, bool kSoftcap_, class Tile>
struct Config {
  using Element = Element_;
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
  static constexpr int kPolynomialEighths = Tile::kPolynomialEighths;
  // Registers a thread: 64 K are shared by the producer's and the consumers' warpgroups.
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 240 : 160;

  // A tile lies in panels of one swizzle width of columns each.
  static constexpr int kPanel = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kPanelV = kHeadDimV % 64 == 0 ? 64 : 32;
  static constexpr int kBytesQ = kRowsPerWarpgroup * kHeadDim * 2;  // of one warpgroup
  static constexpr int kBytesK = kKeys * kHeadDim * 2;
  static constexpr int kBytesV = kKeys * kHeadDimV * 2;
  static constexpr int kOffsetK = kStagesQ * kWarpgroups * kBytesQ;
  static constexpr int kOffsetV = kOffsetK + kStages * kBytesK;
  static constexpr int kOffsetOrder = kOffsetV + kStages * kBytesV;
  static constexpr int kOffsetTile = kOffsetOrder + kMaxSorted * 2;
  static constexpr int kOffsetBarriers = kOffsetTile + int(sizeof(TileInfo));
  static constexpr int kBarriers = 2 * kStagesQ * kWarpgroups + 4 * kStages + 2;
  static constexpr int kSharedBytes = kOffsetBarriers + kBarriers * 8;

  static_assert(kWarpgroups == 2 || kWarpgroups == 3, "two or three consumer warpgroups");
  static_assert(kKeys % 16 == 0 && kKeys <= 256, "a block of keys is a multiple of wgmma's k");
  static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "head sizes are padded to a panel");
  static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB of shared memory");
};

// The same value in all lanes, and known to be so: where a branch beside a wgmma in flight depends on a
// value that may differ between lanes, ptxas serialises every wgmma.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Addresses in shared memory, as the 32-bit ones that PTX takes.
template <class C>
struct Shared {
  char* base;

  __device__ u32 address(int offset) const { return shared_address(base) + offset; }
  __device__ u32 q(int stage, int warpgroup) const {
    return address((stage * C::kWarpgroups + warpgroup) * C::kBytesQ);
  }
  __device__ u32 k(int stage) const { return address(C::kOffsetK + stage * C::kBytesK); }
  __device__ u32 v(int stage) const { return address(C::kOffsetV + stage * C::kBytesV); }
  __device__ unsigned short* order() const {
    return reinterpret_cast<unsigned short*>(base + C::kOffsetOrder);
  }
  __device__ TileInfo* tile() const { return reinterpret_cast<TileInfo*>(base + C::kOffsetTile); }
  __device__ u32 barrier(int index) const { return address(C::kOffsetBarriers + 8 * index); }
  __device__ u32 q_full(int stage, int warpgroup) const {
    return barrier(stage * C::kWarpgroups + warpgroup);
  }
  __device__ u32 q_empty(int stage, int warpgroup) const {
    return barrier((C::kStagesQ + stage) * C::kWarpgroups + warpgroup);
  }
  __device__ u32 ring(int kind, int stage) const {
    return barrier(2 * C::kStagesQ * C::kWarpgroups + kind * C::kStages + stage);
  }
  __device__ u32 k_full(int stage) const { return ring(0, stage); }
  __device__ u32 k_empty(int stage) const { return ring(1, stage); }
  __device__ u32 v_full(int stage) const { return ring(2, stage); }
  __device__ u32 v_empty(int stage) const { return ring(3, stage); }
  __device__ u32 tile_full() const { return ring(4, 0); }
  __device__ u32 tile_empty() const { return ring(4, 1); }
};

// Waits for the scheduler's next tile and makes room for the one after it.
template <class C>
__device__ __forceinline__ TileInfo read_tile(const Shared<C>& shared, u32 parity) {
  mbarrier_wait(shared.tile_full(), parity);
  TileInfo tile = *shared.tile();
  int* const fields = &tile.batch;
#pragma unroll
  for (int i = 0; i < int(sizeof(TileInfo) / sizeof(int)); ++i) fields[i] = uniform(fields[i]);
  mbarrier_arrive_if(shared.tile_empty(), threadIdx.x % 32 == 0);
  return tile;
}

// A position in a ring of stages, with the parity of the phase that fills it.
template <int kStages>
struct RingPosition {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jit_kernel::hopper
