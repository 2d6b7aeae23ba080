// Attention over a compressed cache (MLA, absorbed form) for sm_90a: scores are q k + qv v, of 64
// and 256 or 512 columns. A tile of up to 64 packed query rows, tokens x heads, and one part of
// the work a block: four producer warps and two consumer warpgroups.
#pragma once

#include "flash_attention_v3/hopper/mla/consumer.cuh"
#include "flash_attention_v3/hopper/mla/producer.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

template <class C>
__device__ __forceinline__ void initialise_mla_barrier(const MlaShared<C>& shared, int index,
                                                       bool by_boxes) {
  constexpr int kEmpty = 2 * C::kPanels, kItems = kEmpty + 4;
  if (index >= C::kBarriers) return;
  const int arrivals = index < kEmpty                      ? (by_boxes ? 1 : 32)
                       : index < kItems                    ? 4
                       : index < kItems + kDecodeItemSlots ? 1
                                                           : 256 + 64;
  mbarrier_init(shared.barrier(index), arrivals);
  mbarrier_init_fence();
}

template <class C>
__device__ __forceinline__ void mla(const MlaParams& params, char* base) {
  const MlaShared<C> shared{base};
  const int head = static_cast<int>(blockIdx.x) / params.row_tiles;
  const bool by_boxes = params.box_rows > 0, consumes = threadIdx.x >= 128;
  if (consumes) {
    const int thread = threadIdx.x - 128;
    initialise_mla_barrier<C>(shared, thread, by_boxes);
    if (params.only_qv) {  // k is not loaded, and 0 times what lies there may be no number
#pragma unroll 1
      for (int i = thread; i < kMlaBytesPanel / 16; i += 256) {
        store_zeros(shared.keys(0, C::kPanelsV) + i * 16);
        store_zeros(shared.keys(1, C::kPanelsV) + i * 16);
      }
      proxy_fence();
    }
  } else if (by_boxes && threadIdx.x < 2) {
    tma_prefetch_descriptor(threadIdx.x == 0 ? &params.k.map : &params.v.map);
  }
  // All that another kernel writes is read behind this.
  wait_for_previous_kernel();
  let_next_kernel_start();
  __syncthreads();
  if (consumes) {
    raise_registers<C::kConsumerRegisters>();
    consume_mla_items<C>(params, shared, head);
    return;
  }
  lower_registers<C::kProducerRegisters>();
  const int warp = uniform(threadIdx.x / 32);
  if (warp < 2) {
    MlaProducer<C> producer{params, shared, head, warp};
    producer.run();
  } else if (warp == 2) {
    find_mla_items<C>(params, shared);
  } else if (params.clear_rest) {
    clear_other_rows(params);
  }
}

}  // namespace jit_kernel::hopper

// The kernel of a variant.
#define JIT_KERNEL_EXPORT_MLA(element, head_dim_v, rows)                                \
  using Variant = jit_kernel::hopper::MlaConfig<jit_kernel::element, head_dim_v, rows>; \
  extern "C" __global__ void __launch_bounds__(jit_kernel::hopper::kMlaThreads, 1)      \
      mla(const __grid_constant__ jit_kernel::hopper::MlaParams params) {               \
    extern __shared__ __align__(1024) char shared_memory[];                             \
    jit_kernel::hopper::mla<Variant>(params, shared_memory);                            \
  }
