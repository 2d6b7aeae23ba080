// Addresses in shared memory of a backward kernel's block, as the 32-bit ones that PTX takes.
#pragma once

#include "flash_attention_v3/hopper/backward/config.h"
#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel::hopper {

template <class C>
struct BackwardShared {
  u32 base;

  __device__ u32 k() const { return base; }
  __device__ u32 v() const { return base + C::kOffsetV; }
  __device__ u32 q(int stage) const { return base + C::kOffsetQ + stage * C::kBytesQueries; }
  __device__ u32 grad_out(int stage) const {
    return base + C::kOffsetGradOut + stage * C::kBytesQueries;
  }
  __device__ u32 scores(int stage) const {
    return base + C::kOffsetScores + stage * C::kBytesScores;
  }
  // Of a warpgroup: a part of the sums on its way.
  __device__ u32 sums(int warpgroup) const {
    return base + C::kOffsetSums + warpgroup * C::kPartBytes;
  }
  __device__ u32 lse(int stage) const { return base + C::kOffsetLse + stage * C::kQueries * 4; }
  __device__ u32 delta(int stage) const { return base + C::kOffsetDelta + stage * C::kQueries * 4; }
  __device__ u32 barrier(int index) const { return base + C::kOffsetBarriers + 8 * index; }
  __device__ u32 keys_full() const { return barrier(0); }
  __device__ u32 q_full(int stage) const { return barrier(1 + stage); }
  __device__ u32 q_empty(int stage) const { return barrier(1 + C::kStages + stage); }
  __device__ u32 grad_out_full(int stage) const { return barrier(1 + 2 * C::kStages + stage); }
  __device__ u32 grad_out_empty(int stage) const {
    return barrier(1 + 2 * C::kStages + C::kStagesGradOut + stage);
  }
  __device__ u32 sums_full(int warpgroup) const {
    return barrier(1 + 2 * C::kStages + 2 * C::kStagesGradOut + warpgroup);
  }
  __device__ u32 sums_empty(int warpgroup) const { return sums_full(C::kWarpgroups + warpgroup); }
};

}  // namespace jit_kernel::hopper
