// cp.async: 16 bytes a thread from global into shared memory, in groups that are waited for in
// order. It writes as ordinary stores do, so what wgmma reads of it needs a proxy_fence by the
// writer between its wait and the arrival that tells the reader.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

// `bytes` of the source are read, 0 or 16; the rest of the 16 becomes 0.
__device__ __forceinline__ void cp_async_16(u32 destination, const void* source, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jit_kernel
