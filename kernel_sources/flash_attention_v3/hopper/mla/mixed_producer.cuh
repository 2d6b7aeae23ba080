// Boxes of an e4m3 cache, by one warp: of 128 columns, for both warpgroups' buffers.
#pragma once

#include "flash_attention_v3/hopper/mla/row_producer.cuh"

namespace jit_kernel::hopper {

template <class C>
struct MlaMixedProducer {
  static constexpr int kPairsOfHalf = C::kPairs / 2;

  const MlaParams& params;
  const MlaShared<C> shared;
  const int head;
  BufferPosition<C> position;

  __device__ __forceinline__ bool loads_k(int half) const { return half == 1 && !params.only_qv; }

  __device__ __forceinline__ void wait_empty(const int2& at) {
    mbarrier_wait(shared.empty(position.buffer(at.x), at.y), position.parity() ^ 1);
  }

  __device__ __forceinline__ bool is_needed(const DecodeItem& item, int row) const {
    return row < end_of_keys(item) && row + params.box_rows > item.low;
  }

  // Boxes of 128 columns. A lane of the first 16 knows the place of a box of the first buffer, of
  // the others one of the second; the place of the next block's is on its way.
  __device__ __forceinline__ void load(const DecodeItem& item) {
    const int lane = threadIdx.x % 32, boxes = 1 << params.boxes_log2;  // 1 to 8
    const int row_of_lane = lane / 16 * kMlaKeys + (lane & (boxes - 1)) * params.box_rows;
    const CachePlaces places(params, item.batch);
    const auto place_of = [&](int row) { return is_needed(item, row) ? places.place(row) : 0; };
    int next_place = place_of(item.begin[0] * kMlaBlockKeys + row_of_lane);
#pragma unroll 1
    for (int block = item.begin[0]; block < item.end[0]; ++block) {
      const int row = block * kMlaBlockKeys + row_of_lane;
      const int place = next_place;
      next_place = place_of(row + kMlaBlockKeys);
      const bool needed = lane % 16 < boxes && is_needed(item, row);
      const int in_place = needed ? places.row_in_place(row) : 0;
      const unsigned all = __ballot_sync(0xffffffffu, needed);
#pragma unroll 1
      for (int step = 0; step < 4; ++step) {
        const int2 at = half_of_step<C>(step);
        load_half(at, place, in_place, all >> (16 * at.x) & 0xffffu);
      }
      ++position.blocks;
    }
  }

  __device__ __forceinline__ void load_half(const int2& at, int place, int in_place, unsigned all) {
    const int lane = threadIdx.x % 32, boxes = 1 << params.boxes_log2;
    const int parts = kPairsOfHalf + loads_k(at.y), first = at.y * kPairsOfHalf;
    const int buffer = position.buffer(at.x);
    wait_empty(at);
    if (lane < kPairsOfHalf + at.y) {  // k is waited for where it is not loaded, too
      mbarrier_arrive_expect(shared.full(buffer, first + lane),
                             lane < parts ? __popc(all) * params.box_rows * 128 : 0);
    }
    __syncwarp();
    static_assert((kPairsOfHalf + 1) * 8 <= 32, "a lane asks for one box of a half");
    const int box = lane & (boxes - 1), part = lane >> params.boxes_log2;
    const int here = __shfl_sync(0xffffffffu, place, 16 * at.x + box);
    const int in_here = __shfl_sync(0xffffffffu, in_place, 16 * at.x + box);
    if (part < parts && (all >> box & 1) != 0) {
      const int pair = first + part;
      const bool is_k = pair == C::kPairs;
      tma_load(shared.pair(buffer, pair) + box * params.box_rows * 128,
               is_k ? &params.k.map : &params.v.map, shared.full(buffer, pair), params.policy,
               is_k ? 0 : pair * 128, in_here, 0, head, here);
    }
    __syncwarp();
  }
};

}  // namespace jit_kernel::hopper
