// Addresses in shared memory, rings of stages, and the tile that the scheduler hands over.
#pragma once

#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel::hopper {

// The same value in all lanes, and known to be so: where a branch beside a wgmma in flight depends
// on a value that may differ between lanes, ptxas serialises every wgmma.
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
  __device__ TileInfo* tile(int slot) const {
    return reinterpret_cast<TileInfo*>(base + C::kOffsetTile) + slot;
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
  __device__ u32 tile_full(int slot) const { return ring(4, slot); }
  __device__ u32 tile_empty(int slot) const { return ring(4, kTileSlots + slot); }
  __device__ u32 claim() const { return ring(4, 2 * kTileSlots); }
};

// The first kSteps * 16 columns of this warpgroup's 64 rows as wgmma's register operand, from
// panels of kPanel columns at `base` as the copy engine swizzled them.
template <int kSteps, int kPanel, int kCount>
__device__ __forceinline__ void load_fragments(u32 (&fragments)[kCount], u32 base) {
  constexpr int kSwizzle = 2 * kPanel;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const int swizzled = kPanel == 64 ? row % 8 : row / 2 % 4;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = i * 16 % kPanel / 8 + lane / 16;  // in units of 16 bytes
    const u32 address = base + i * 16 / kPanel * kRowsPerWarpgroup * kSwizzle + row * kSwizzle +
                        (column ^ swizzled) * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[4 * i]), "=r"(fragments[4 * i + 1]), "=r"(fragments[4 * i + 2]),
                   "=r"(fragments[4 * i + 3])
                 : "r"(address)
                 : "memory");
  }
}

// A position in a ring of stages, with the parity of the phase that fills it; one register.
template <int kStages>
struct RingPosition {
  u32 state = 0;

  __device__ __forceinline__ int stage() const { return state >> 1; }
  __device__ __forceinline__ u32 parity() const { return state & 1; }
  __device__ __forceinline__ void advance() {
    state += 2;
    if (state >= 2 * kStages) state = (state - 2 * kStages) ^ 1;
  }
};

}  // namespace jit_kernel::hopper
