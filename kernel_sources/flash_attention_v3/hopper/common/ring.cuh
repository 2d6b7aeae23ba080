// Rings of stages in shared memory, each filled and emptied in turn under two barriers.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel::hopper {

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
