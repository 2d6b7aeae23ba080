// Where things lie in shared memory: tiles of queries, keys and values, their barriers, the order
// of sequences and the tile that the scheduler hands over.
#pragma once

#include "flash_attention_v3/hopper/common/ring.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"

namespace jit_kernel::hopper {

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
  // Where the copy engine puts values: where they are multiplied from, or transposed.
  __device__ u32 loaded_v(int stage) const {
    if constexpr (C::kTransposers > 0) return address(C::kOffsetLoaded + stage * C::kBytesV);
    return v(stage);
  }
  __device__ unsigned short* order() const {
    return reinterpret_cast<unsigned short*>(base + C::kOffsetOrder);
  }
  __device__ typename C::Info* tile(int slot) const {
    return reinterpret_cast<typename C::Info*>(base + C::kOffsetTile) + slot;
  }
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
  __device__ u32 loaded_v_full(int stage) const {
    if constexpr (C::kTransposers > 0) return barrier(C::kLoadedBarriers + stage);
    return v_full(stage);
  }
  __device__ u32 loaded_v_empty(int stage) const {
    if constexpr (C::kTransposers > 0)
      return barrier(C::kLoadedBarriers + C::kStagesLoaded + stage);
    return v_empty(stage);
  }
  __device__ u32 tile_full(int slot) const { return ring(4, slot); }
  __device__ u32 tile_empty(int slot) const { return ring(4, kTileSlots + slot); }
  __device__ u32 claim() const { return ring(4, 2 * kTileSlots); }
};

}  // namespace jit_kernel::hopper
