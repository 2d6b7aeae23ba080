// The producer warps: one finds the items, two keep a buffer each full by boxes of the copy engine.
// The halves of the first one are emptied left before right, those of the second right before left
// but where the operands are swapped.
#pragma once

#include "flash_attention_v3/hopper/decode/producer.cuh"
#include "flash_attention_v3/hopper/mla/shared_memory.cuh"
#include "flash_attention_v3/hopper/mla/work.cuh"

namespace jit_kernel::hopper {

template <class C>
struct MlaProducer {
  const MlaParams& params;
  const MlaShared<C> shared;
  const int head, buffer;
  u32 parity = 0;

  // Panels of a half that are loaded: with the right one goes k.
  __device__ __forceinline__ int panels_of(int half) const {
    return C::kHalf + (half == 1 && !params.only_qv ? 1 : 0);
  }
  __device__ __forceinline__ int first_row(int block) const {
    return block * kMlaBlockKeys + buffer * kMlaKeys;
  }
  __device__ __forceinline__ void wait_empty(int half) {
    mbarrier_wait(shared.empty(buffer, half), parity ^ 1);
  }

  __device__ __forceinline__ bool is_needed(const DecodeItem& item, int row) const {
    return row < end_of_keys(item) && row + params.box_rows > item.low;
  }
  __device__ __forceinline__ int place_of(const DecodeItem& item, const CachePlaces& places,
                                          int row) const {
    return is_needed(item, row) ? places.place(row) : 0;
  }

  // The copy engine takes a box of rows of a panel at a time. A lane knows the place of a box, and
  // the place of the next block's is on its way.
  __device__ __forceinline__ void load(const DecodeItem& item) {
    const int lane = threadIdx.x % 32;
    const int row_of_lane = (lane & ((1 << params.boxes_log2) - 1)) * params.box_rows;
    const CachePlaces places(params, item.batch);
    int next_place = place_of(item, places, first_row(item.begin[0]) + row_of_lane);
#pragma unroll 1
    for (int block = item.begin[0]; block < item.end[0]; ++block) {
      const int row = first_row(block) + row_of_lane;
      const int place = next_place;
      next_place = place_of(item, places, row + kMlaBlockKeys);
      const bool needed = is_needed(item, row);
      const int in_place = needed ? places.row_in_place(row) : 0;
#pragma unroll 1
      for (int i = 0; i < 2; ++i)
        load_half(i ^ (C::kIsSwapped ? 0 : buffer), place, in_place, needed);
      parity ^= 1;
    }
  }

  // Of a buffer, panel by panel; lane b of the first ones knows where box b lies.
  __device__ __forceinline__ void load_half(int half, int place, int in_place, bool needed) {
    const int lane = threadIdx.x % 32, boxes = 1 << params.boxes_log2;  // 1 to 8
    const int panels = panels_of(half), copies = panels << params.boxes_log2;
    const unsigned all = __ballot_sync(0xffffffffu, needed && lane < boxes);
    wait_empty(half);
    if (lane < C::kHalf + half) {
      mbarrier_arrive_expect(shared.full(buffer, half * C::kHalf + lane),
                             lane < panels ? __popc(all) * params.box_rows * 128 : 0);
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < copies; first += 32) {
      const int copy = first + lane, box = copy & (boxes - 1);
      const int here = __shfl_sync(0xffffffffu, place, box);
      const int in_here = __shfl_sync(0xffffffffu, in_place, box);
      if (copy < copies && (all >> box & 1) != 0) {
        const int panel = half * C::kHalf + (copy >> params.boxes_log2);
        const bool is_k = panel == C::kPanelsV;
        tma_load(shared.keys(buffer, panel) + box * params.box_rows * 128,
                 is_k ? &params.k.map : &params.v.map, shared.full(buffer, panel), params.policy,
                 is_k ? 0 : panel * 64, in_here, 0, head, here);
      }
    }
    __syncwarp();
  }
};

// A loading warp, until the items end.
template <class C, class Producer>
__device__ __forceinline__ void load_mla_items(const MlaShared<C>& shared, Producer& producer) {
  RingPosition<C::kItemSlots> at;
#pragma unroll 1
  while (true) {
    mbarrier_wait(shared.item_full(at.stage()), at.parity());
    const MlaItem& item = *shared.item(at.stage());
    if (uniform(item.batch) < 0) return;
    producer.load(item);
    asm volatile("" : "+r"(at.state));  // its address is not kept meanwhile: it would spill
    mbarrier_arrive(shared.item_empty(at.stage()));
    at.advance();
  }
}

// One warp: hands this part's items over to all others.
template <class C>
__device__ __forceinline__ void find_mla_items(const MlaParams& params,
                                               const MlaShared<C>& shared) {
  MlaSchedule schedule(params);
  schedule.start(blockIdx.y);
  RingPosition<C::kItemSlots> at;
  MlaItem item;
  bool found = true;
#pragma unroll 1
  while (found) {
    found = schedule.next(item);
    item.is_last = schedule.is_done();
    if (!found) {
      item.batch = -1;
    } else {
      item.plain_end = end_of_keys(item);
      if (params.draft_mask != nullptr) {
        item.plain_end = min(item.plain_end, first_draft(params, item));
      }
    }
    mbarrier_wait(shared.item_empty(at.stage()), at.parity() ^ 1);
    if (threadIdx.x % 32 == 0) {
      *shared.item(at.stage()) = item;
      mbarrier_arrive(shared.item_full(at.stage()));
    }
    __syncwarp();
    at.advance();
  }
}

}  // namespace jit_kernel::hopper
