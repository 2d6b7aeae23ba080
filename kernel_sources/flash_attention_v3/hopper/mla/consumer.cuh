// What the consumer warpgroups do: item after item, in one of two ways.
#pragma once

#include "flash_attention_v3/hopper/mla/halves.cuh"
#include "flash_attention_v3/hopper/mla/streamed.cuh"

namespace jit_kernel::hopper {

// A consumer warpgroup, until the items end.
template <class C>
__device__ __forceinline__ void consume_mla_items(const MlaParams& params,
                                                  const MlaShared<C>& shared, int head) {
  const int thread = threadIdx.x - 128;
  u32 phase = 0;  // of the buffers
  RingPosition<C::kItemSlots> at;
#pragma unroll 1
  while (true) {
    mbarrier_wait(shared.item_full(at.stage()), at.parity());
    const MlaItem& item = *shared.item(at.stage());
    if (uniform(item.batch) < 0) return;
    find_mla_queries<C>(params, item, shared, head, thread);
    consumers_sync();
    if constexpr (C::kMixed) {
      load_mixed_queries<C>(params, item, shared, head, thread);
    } else {
      load_mla_queries<C>(params, item, shared, thread);
    }
    proxy_fence();
    consumers_sync();
    const int warpgroup = uniform(thread / 128);
    if constexpr (C::kIsSwapped) {
      MlaSwapped<C> consumer{params, shared, warpgroup, phase};
      consumer.run_item(item);
      phase = consumer.phase;
    } else if (warpgroup == 0) {
      MlaHalf<C, 0> consumer{params, shared, phase};
      consumer.run_item(item);
      phase = consumer.parity;
    } else {
      MlaHalf<C, 1> consumer{params, shared, phase};
      consumer.run_item(item);
      phase = consumer.parity;
    }
    if (item.parts > 1) merge_mla_parts<C>(params, item, shared, thread);
    consumers_sync();                                // queries and statistics are free again
    mbarrier_arrive(shared.item_empty(at.stage()));  // every lane has read the item
    at.advance();
  }
}

}  // namespace jit_kernel::hopper
