// The bulk tensor copy engine: tiles of a tensor of rank 5 into shared memory.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

// L2 eviction policies, in the encoding that createpolicy.fractional returns for fraction 1.
constexpr u64 kEvictNormal = 0x1000000000000000ull;
constexpr u64 kEvictFirst = 0x12F0000000000000ull;
constexpr u64 kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_prefetch_descriptor(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies one box to `destination` and counts its bytes on `barrier`; elements outside the
// tensor are filled with 0.
__device__ __forceinline__ void tma_load(u32 destination, const void* map, u32 barrier, u64 policy,
                                         int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(destination),
      "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies `bytes` that lie side by side, a multiple of 16 at multiples of 16, and counts them on
// `barrier`.
__device__ __forceinline__ void bulk_load(u32 destination, const void* source, u32 bytes,
                                          u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Asks for a box to be brought into the L2 cache.
__device__ __forceinline__ void tma_prefetch(const void* map, int c0, int c1, int c2, int c3,
                                             int c4) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
      "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

}  // namespace jit_kernel
