// Backward attention for sm_90a: a block for each tile of keys and key head, which goes over the
// queries of the head's whole group; before it lse and D by rows, behind it grad_q from its sums.
#pragma once

#include "flash_attention_v3/hopper/backward/rows.cuh"

namespace jit_kernel::hopper {

template <class C>
__device__ __forceinline__ void initialise_barriers(const BackwardShared<C>& shared) {
  mbarrier_init(shared.keys_full(), 1);
  for (int stage = 0; stage < C::kStages; ++stage) {
    mbarrier_init(shared.q_full(stage), 1);
    mbarrier_init(shared.q_empty(stage), 4 * C::kWarpgroups);
  }
  for (int stage = 0; stage < C::kStagesGradOut; ++stage) {
    mbarrier_init(shared.grad_out_full(stage), 1);
    mbarrier_init(shared.grad_out_empty(stage), 4 * C::kWarpgroups);
  }
  for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) {
    mbarrier_init(shared.sums_full(warpgroup), 128);
    mbarrier_init(shared.sums_empty(warpgroup), 1);
  }
  mbarrier_init_fence();
}

template <class C>
__device__ __forceinline__ void backward(const BackwardParams& params, char* base) {
  const BackwardShared<C> shared{shared_address(base)};
  KeyTile& tile = *reinterpret_cast<KeyTile*>(base + C::kOffsetTile);
  if (threadIdx.x == 0) {
    tile = find_tile<C>(params, blockIdx.x);
    tma_prefetch_descriptor(&params.q.map);
    tma_prefetch_descriptor(&params.grad_out.map);
    initialise_barriers<C>(shared);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    lower_registers<C::kProducerRegisters>();
    if (tile.begin == tile.end) return;
    if (threadIdx.x == 0) {
      load_tiles<C>(params, shared, tile);
    } else if (threadIdx.x == 32 || threadIdx.x == 64) {
      const int warpgroup = threadIdx.x / 32 - 1;
      if (params.added != nullptr) {
        add_sums_in_order<C>(params, shared, tile, warpgroup);
      } else {
        add_sums<C>(params, shared, tile, warpgroup);
      }
    }
  } else {
    raise_registers<C::kConsumerRegisters>();
    ConsumerOf<C> consumer(params, shared, tile, uniform(threadIdx.x / 128 - 1));
    consumer.run();
    store_gradients_of_keys<C>(consumer);
  }
}

}  // namespace jit_kernel::hopper

// The kernels of a variant.
#define JIT_KERNEL_EXPORT_BACKWARD(element, head_dim, softcap)                                   \
  using BackwardOf = jit_kernel::hopper::BackwardConfig<jit_kernel::element, head_dim, softcap>; \
  extern "C" __global__ void __launch_bounds__(BackwardOf::kThreads, 1)                          \
      backward(const __grid_constant__ jit_kernel::hopper::BackwardParams params) {              \
    extern __shared__ __align__(1024) char shared_memory[];                                      \
    jit_kernel::hopper::backward<BackwardOf>(params, shared_memory);                             \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(jit_kernel::hopper::kPrepareThreads)              \
      backward_prepare(const __grid_constant__ jit_kernel::hopper::BackwardParams params) {      \
    jit_kernel::hopper::prepare_rows<BackwardOf>(params);                                        \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(jit_kernel::hopper::kFinishThreads)               \
      backward_finish(const __grid_constant__ jit_kernel::hopper::BackwardParams params) {       \
    jit_kernel::hopper::finish_rows<BackwardOf>(params);                                         \
  }
