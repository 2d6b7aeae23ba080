// Attention over a compressed cache (MLA, absorbed form) for sm_90a: scores are q k + qv v, of 64
// and 256 or 512 columns. A tile of up to 64 packed query rows, tokens x heads, and one part of
// the work a block: four producer warps and two consumer warpgroups.
#pragma once

#include "flash_attention_v3/hopper/mla/consumer.cuh"
#include "flash_attention_v3/hopper/mla/mixed_producer.cuh"
#include "flash_attention_v3/hopper/mla/producer.cuh"
#include "flash_attention_v3/hopper/mla/row_producer.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

template <class C>
__device__ __forceinline__ void initialise_mla_barrier(const MlaParams& params,
                                                       const MlaShared<C>& shared, int index) {
  if (index >= C::kBarriers) return;
  const bool by_boxes = params.box_rows > 0;
  const int loaders = !by_boxes ? kMlaRowWarps : C::kMixed ? 1 : 2;
  const int arrivals = index < C::kFirstEmpty                  ? (by_boxes ? 1 : 32 * loaders)
                       : index < C::kFirstItem                 ? 4
                       : index < C::kFirstItem + C::kItemSlots ? 1
                                                               : 256 + 32 * loaders;
  mbarrier_init(shared.barrier(index), arrivals);
  mbarrier_init_fence();
}

// What the four producer warps do: the third finds the items.
template <class C>
__device__ __forceinline__ void produce_mla_items(const MlaParams& params,
                                                  const MlaShared<C>& shared, int head) {
  const int warp = uniform(threadIdx.x / 32);
  if (warp == 2) {
    find_mla_items<C>(params, shared);
    if (params.clear_rest) clear_other_rows(params);
  } else if (params.box_rows == 0) {
    MlaRowProducer<C> producer{params, shared, head, min(warp, kMlaRowWarps - 1)};
    load_mla_items<C>(shared, producer);
  } else if constexpr (C::kMixed) {
    if (warp != 0) return;
    MlaMixedProducer<C> producer{params, shared, head};
    load_mla_items<C>(shared, producer);
  } else {
    if (warp > 1) return;
    MlaProducer<C> producer{params, shared, head, warp};
    load_mla_items<C>(shared, producer);
  }
}

template <class C>
__device__ __forceinline__ void mla(const MlaParams& params, char* base) {
  const MlaShared<C> shared{base};
  const int head = static_cast<int>(blockIdx.x) / params.row_tiles;
  const bool consumes = threadIdx.x >= 128;
  if (consumes) {
    const int thread = threadIdx.x - 128;
    initialise_mla_barrier<C>(params, shared, thread);
    if (params.only_qv) {  // k is not loaded, and 0 times what lies there may be no number
      constexpr int kOfK = C::kIsStreamed ? C::kPairs : C::kPanelsV;
#pragma unroll 1
      for (int i = thread; i < kMlaBytesPanel / 16; i += 256) {
#pragma unroll
        for (int buffer = 0; buffer < C::kBuffers; ++buffer) {
          store_zeros(shared.keys(buffer, kOfK) + i * 16);
        }
      }
      proxy_fence();
    }
  } else if (params.box_rows > 0 && threadIdx.x < 2) {
    tma_prefetch_descriptor(threadIdx.x == 0 ? &params.k.map : &params.v.map);
  }
  // All that another kernel writes is read behind this.
  wait_for_previous_kernel();
  let_next_kernel_start();
  __syncthreads();
  if (consumes) {
    raise_registers<C::kConsumerRegisters>();
    consume_mla_items<C>(params, shared, head);
  } else {
    lower_registers<C::kProducerRegisters>();
    produce_mla_items<C>(params, shared, head);
  }
}

}  // namespace jit_kernel::hopper

// The kernel of a variant; mixed: of an e4m3 cache, with fp16 as element.
#define JIT_KERNEL_EXPORT_MLA(element, head_dim_v, rows, mixed)                                \
  using Variant = jit_kernel::hopper::MlaConfig<jit_kernel::element, head_dim_v, rows, mixed>; \
  extern "C" __global__ void __launch_bounds__(jit_kernel::hopper::kMlaThreads, 1)             \
      mla(const __grid_constant__ jit_kernel::hopper::MlaParams params) {                      \
    extern __shared__ __align__(1024) char shared_memory[];                                    \
    jit_kernel::hopper::mla<Variant>(params, shared_memory);                                   \
  }
