// Bulk copies of contiguous bytes: into shared memory, and float32 sums from it into global memory.
// Addresses and sizes are multiples of 16 bytes.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

// Counts its bytes on `barrier`.
__device__ __forceinline__ void bulk_load(u32 destination, const void* source, u32 bytes,
                                          u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Adds float32 numbers of shared memory to those at `destination`, as part of this thread's group.
__device__ __forceinline__ void bulk_add(float* destination, u32 source, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   destination),
               "r"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's groups have read their sources.
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until this thread's groups have written.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace jit_kernel
