// Attention of few query rows over a cache, for sm_90a: one or two key heads and one part of the
// work a block, four producer warps (one where the copy engine loads) and a consumer warpgroup a
// stream.
#pragma once

#include "flash_attention_v3/hopper/decode/config.h"
#include "flash_attention_v3/hopper/decode/mixed.cuh"
#include "flash_attention_v3/hopper/decode/producer.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

// A thread each: tiles become full, by so many arrivals, and empty, then items; what the cluster
// sends is here.
template <class C>
__device__ __forceinline__ void initialise_barrier(const DecodeShared<C>& shared, int index,
                                                   int fillers, bool is_ahead) {
  constexpr int kItems = 2 * C::kStages, kIncoming = C::kBarriers - 1;
  if (index >= C::kBarriers) return;
  const int arrivals = index < C::kStages                  ? fillers
                       : index < kItems                    ? 4 * C::kStreams
                       : index < kItems + kDecodeItemSlots ? 1
                       : index < kIncoming                 ? 128 * C::kStreams + is_ahead
                                                           : 1;
  mbarrier_init(shared.barrier(index), arrivals);
  mbarrier_init_fence();
}

template <class C>
__device__ __forceinline__ void decode(const DecodeParams& params, char* base) {
  const DecodeShared<C> shared{base};
  const uint2 block = {blockIdx.x, blockIdx.y};
  const int part = part_of_block(params, block), head = first_head_of_block(params, block);
  const bool by_boxes = params.box_rows > 0, consumes = threadIdx.x >= 128;
  if (consumes) {
    // One thread expects the copies, and two warps load the scales of e4m3.
    const int fillers = !by_boxes                         ? 128
                        : C::kMixed && has_scales(params) ? 1 + kThreadsOfScales
                                                          : 1;
    initialise_barrier<C>(shared, threadIdx.x - 128, fillers, finds_ahead<C>(params));
  } else if (by_boxes && threadIdx.x < 2) {
    tma_prefetch_descriptor(threadIdx.x == 0 ? &params.k.map : &params.v.map);
  }
  if (params.in_clusters) {
    cluster_arrive();
    if (threadIdx.x / 32 == 3) prefetch_places(params, sequence_of(params, blockIdx.z), part);
  }
  // All that another kernel writes is read behind this, lengths before the barriers are made.
  wait_for_previous_kernel();
  let_next_kernel_start();
  EarlyPlaces early;
  DecodeSchedule schedule(params);
  DecodeItem item;
  bool found = false;
  if (!consumes) {
    if (params.in_clusters && by_boxes) early.ask(params, sequence_of(params, blockIdx.z));
    if (__builtin_expect(params.in_clusters, 1)) {
      found = item_of_cluster(params, blockIdx.z, part, item);
    } else {
      schedule.start(part);
      found = schedule.next(item);
    }
  }
  __syncthreads();
  if (consumes) {
    if constexpr (C::kStreams == 2) raise_registers<C::kConsumerRegisters>();
    const int stream = uniform(threadIdx.x / 128 - 1);
    DecodeConsumer<C> consumer{params, shared, stream};
    consumer.run();
    return;
  }
  if constexpr (C::kStreams == 2) lower_registers<C::kProducerRegisters>();
  const int least_warps = C::kMixed && has_scales(params) ? 4 : 2;
  if (!by_boxes || static_cast<int>(threadIdx.x) < 32 * max(least_warps, params.copy_warps)) {
    produce_items<C>(params, shared, schedule, item, found, head, early);
  }
  // Behind the loads, in the kernel's code as well: instructions come from memory, too.
  if (params.clear_rest && threadIdx.x >= 96) clear_other_rows(params);
  if (params.in_clusters) cluster_wait();
}

}  // namespace jit_kernel::hopper

// The kernel of a variant.
#define JIT_KERNEL_EXPORT_DECODE(element, head_dim, rows, mixed)                                \
  using Variant = jit_kernel::hopper::DecodeConfig<jit_kernel::element, head_dim, rows, mixed>; \
  extern "C" __global__ void __launch_bounds__(Variant::kThreads, 1)                            \
      decode(const __grid_constant__ jit_kernel::hopper::DecodeParams params) {                 \
    extern __shared__ __align__(1024) char shared_memory[];                                     \
    jit_kernel::hopper::decode<Variant>(params, shared_memory);                                 \
  }
