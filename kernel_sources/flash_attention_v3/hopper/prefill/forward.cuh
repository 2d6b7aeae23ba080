// Forward attention for sm_90a: a producer and a scheduler warp, two or four consumer warpgroups,
// persistent blocks.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_producer.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"
#include "flash_attention_v3/hopper/prefill/consumer.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_transposer.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_values.cuh"
#include "flash_attention_v3/hopper/prefill/producer.cuh"
#include "flash_attention_v3/hopper/prefill/tile_scheduler.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

// Threads arrive each for itself, no lane for its warp: racecheck does not see what a lane read or
// wrote before __syncwarp in the arrival of another.
template <class C>
__device__ __forceinline__ void initialise_barriers(const typename C::Params& params,
                                                    const Shared<C>& shared) {
  const int loaders = loaders_of_stage<C>(params);
  for (int stage = 0; stage < C::kStagesQ; ++stage) {
    for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) {
      mbarrier_init(shared.q_full(stage, warpgroup), 1);
      mbarrier_init(shared.q_empty(stage, warpgroup), 4);
    }
  }
  for (int stage = 0; stage < C::kStages; ++stage) {
    mbarrier_init(shared.k_full(stage), loaders);
    mbarrier_init(shared.k_empty(stage), 4 * C::kWarpgroups);
    mbarrier_init(shared.v_full(stage), C::kTransposers > 0 ? C::kTransposers : loaders);
    mbarrier_init(shared.v_empty(stage), (uses_boxes<C>(params) ? 4 : 128) * C::kWarpgroups);
  }
  for (int stage = 0; C::kTransposers > 0 && stage < C::kStagesLoaded; ++stage) {
    mbarrier_init(shared.loaded_v_full(stage), loaders);
    mbarrier_init(shared.loaded_v_empty(stage), C::kTransposers);
  }
  for (int slot = 0; slot < kTileSlots; ++slot) {
    mbarrier_init(shared.tile_full(slot), 1);
    mbarrier_init(shared.tile_empty(slot),
                  loaders_of_tile<C>(params) + C::kTransposers + 128 * C::kWarpgroups);
  }
  mbarrier_init(shared.claim(), 1);
  mbarrier_init_fence();
}

// On cached keys the producer is a warp, or three that copy rows; the second is the scheduler.
template <class C>
__device__ __forceinline__ void run_cached_producers(const CachedParams& params,
                                                     const Shared<C>& shared) {
  const int warp = uniform(threadIdx.x / 32);
  if (warp == 1) {
    schedule<C>(params, shared);
    return;
  }
  if (warp == 2 && params.clear_rest) clear_rest(params);
  if (!uses_boxes<C>(params)) {
    produce_cached<C, false>(params, shared, max(0, warp - 1));
  } else if (warp == 0) {
    produce_cached<C, true>(params, shared, 0);
  }
}

// Without a cache the producer is one thread; warps that would be idle transpose values of e4m3.
template <class C>
__device__ __forceinline__ void run_producers(const typename C::Params& params,
                                              const Shared<C>& shared) {
  if (threadIdx.x == 0) {
    produce<C>(params, shared);
  } else if (threadIdx.x < 32) {
    // The producer is one thread.
  } else if (threadIdx.x < 64) {
    schedule<C>(params, shared);
  } else {
    if (threadIdx.x < 96 && params.clear_rest) clear_rest(params);
    if constexpr (C::kTransposers > 0) {
      transpose_values<C>(params, shared, uniform(threadIdx.x / 32 - 2));
    }
  }
}

template <class C>
__device__ __forceinline__ void forward(const typename C::Params& params, char* base) {
  const Shared<C> shared{base};
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&params.q.map);
    if (uses_boxes<C>(params)) {
      tma_prefetch_descriptor(&params.k.map);
      tma_prefetch_descriptor(&params.v.map);
    }
    initialise_barriers<C>(params, shared);
  }
  if constexpr (C::kCached) wait_for_previous_kernel();
  if (is_sorted(params)) {
    sort_sequences<C>(params, reinterpret_cast<int*>(base), shared.order());
    proxy_fence();  // the copy engine writes next where the lengths lay
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    lower_registers<C::kProducerRegisters>();
    if constexpr (C::kCached) {
      run_cached_producers<C>(params, shared);
    } else {
      run_producers<C>(params, shared);
    }
  } else {
    raise_registers<C::kConsumerRegisters>();
    Consumer<C> consumer(params, shared, uniform(threadIdx.x / 128 - 1));
    consumer.run();
  }
}

}  // namespace jit_kernel::hopper

// The kernel of a variant.
#define JIT_KERNEL_EXPORT_FORWARD(element, head_dim, head_dim_v, masked, softcap)            \
  using ForwardConfig =                                                                      \
      jit_kernel::hopper::Config<jit_kernel::element, head_dim, head_dim_v, masked, softcap, \
                                 jit_kernel::hopper::TileFor<head_dim, head_dim_v, masked>>; \
  extern "C" __global__ void __launch_bounds__(ForwardConfig::kThreads, 1)                   \
      forward(const __grid_constant__ jit_kernel::hopper::ForwardParams params) {            \
    extern __shared__ __align__(1024) char shared_memory[];                                  \
    jit_kernel::hopper::forward<ForwardConfig>(params, shared_memory);                       \
  }

// The kernel of a head size in e4m3; softcap is a branch in it.
#define JIT_KERNEL_EXPORT_FORWARD_FP8(head_dim, masked, prepared)                             \
  using ForwardConfig =                                                                       \
      jit_kernel::hopper::Config<jit_kernel::e4m3, head_dim, head_dim, masked, true,          \
                                 jit_kernel::hopper::Fp8TileFor<head_dim, masked, prepared>>; \
  extern "C" __global__ void __launch_bounds__(ForwardConfig::kThreads, 1)                    \
      forward_fp8(const __grid_constant__ jit_kernel::hopper::Fp8Params params) {             \
    extern __shared__ __align__(1024) char shared_memory[];                                   \
    jit_kernel::hopper::forward<ForwardConfig>(params, shared_memory);                        \
  }

// The kernel that prepares values for it.
#define JIT_KERNEL_EXPORT_PREPARE_VALUES(head_dim, threads)                                      \
  static_assert(threads == jit_kernel::hopper::kPreparerThreads, "what the launcher counts on"); \
  extern "C" __global__ void __launch_bounds__(threads)                                          \
      prepare_values(const __grid_constant__ jit_kernel::hopper::PrepareParams params) {         \
    jit_kernel::let_next_kernel_start();                                                         \
    jit_kernel::hopper::prepare_values<                                                          \
        head_dim, jit_kernel::hopper::Fp8TileFor<head_dim, false, true>::kKeys>(params);         \
  }

// The kernel of a pair of head sizes on cached keys.
#define JIT_KERNEL_EXPORT_FORWARD_CACHED(element, head_dim, head_dim_v)                          \
  using ForwardConfig =                                                                          \
      jit_kernel::hopper::Config<jit_kernel::element, head_dim, head_dim_v, true, true,          \
                                 jit_kernel::hopper::TileFor<head_dim, head_dim_v, true>, true>; \
  extern "C" __global__ void __launch_bounds__(ForwardConfig::kThreads, 1)                       \
      forward_cached(const __grid_constant__ jit_kernel::hopper::CachedParams params) {          \
    extern __shared__ __align__(1024) char shared_memory[];                                      \
    jit_kernel::hopper::forward<ForwardConfig>(params, shared_memory);                           \
  }
