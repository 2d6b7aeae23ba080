// The producer's warps: one loads tiles, two add the sums of grad_q to those in global memory.
#pragma once

#include "flash_attention_v3/hopper/backward/shared_memory.cuh"
#include "flash_attention_v3/hopper/backward/tile.cuh"
#include "flash_attention_v3/hopper/common/ring.cuh"
#include "flash_attention_v3/hopper/common/tensor_rows.cuh"
#include "jit_kernel/cuda/bulk.cuh"

namespace jit_kernel::hopper {

// One thread: keys and values once, then the queries of each head of the group, tile by tile.
template <class C>
__device__ __forceinline__ void load_tiles(const BackwardParams& params,
                                           const BackwardShared<C>& shared, const KeyTile& tile) {
  const MapPlace keys = map_place(params.k, params.cu_seqlens_k, tile.batch, tile.len_k);
  const MapPlace values = map_place(params.v, params.cu_seqlens_k, tile.batch, tile.len_k);
  mbarrier_arrive_expect(shared.keys_full(), 2 * C::kBytesKeys);
  load_rows<C::kHeadDim, C::kPanel, C::kKeys>(shared.k(), params.k, shared.keys_full(),
                                              kEvictNormal, keys, tile.first_key, tile.head);
  load_rows<C::kHeadDim, C::kPanel, C::kKeys>(shared.v(), params.v, shared.keys_full(),
                                              kEvictNormal, values, tile.first_key, tile.head);
  const MapPlace queries = map_place(params.q, params.cu_seqlens_q, tile.batch, tile.len_q);
  const MapPlace grads = map_place(params.grad_out, params.cu_seqlens_q, tile.batch, tile.len_q);
  RingPosition<C::kStages> at;
  for (int i = 0; i < params.group; ++i) {
    const int head = tile.head * params.group + i;
    const long long rows =
        (static_cast<long long>(head) * params.tiles_q + tile.tile_q) * C::kQueries;
    for (int block = tile.begin; block < tile.end; ++block) {
      const int row = block * C::kQueries, stage = at.stage();
      mbarrier_wait(shared.q_empty(stage), at.parity() ^ 1);
      mbarrier_arrive_expect(shared.q_full(stage), C::kBytesQueries + C::kQueries * 4);
      load_rows<C::kHeadDim, C::kPanel, C::kQueries>(shared.q(stage), params.q,
                                                     shared.q_full(stage), kEvictLast, queries,
                                                     row, head);
      bulk_load(shared.lse(stage), params.lse_log2 + rows + row, C::kQueries * 4,
                shared.q_full(stage));
      mbarrier_wait(shared.grad_out_empty(stage), at.parity() ^ 1);
      mbarrier_arrive_expect(shared.grad_out_full(stage), C::kBytesQueries + C::kQueries * 4);
      load_rows<C::kHeadDim, C::kPanel, C::kQueries>(shared.grad_out(stage), params.grad_out,
                                                     shared.grad_out_full(stage), kEvictLast,
                                                     grads, row, head);
      bulk_load(shared.delta(stage), params.delta + rows + row, C::kQueries * 4,
                shared.grad_out_full(stage));
      at.advance();
    }
  }
}

// Waits until the tiles of keys behind this one have added to a part. They were handed out before
// this one, so that they run or have ended.
__device__ __forceinline__ void wait_for_turn(const int* added, int turn) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(added) : "memory");
  } while (seen != turn);
}

__device__ __forceinline__ void end_turn(int* added) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(added) : "memory");
}

// One thread a part: adds what its warpgroup computed of each tile.
template <class C>
__device__ __forceinline__ void add_sums(const BackwardParams& params,
                                         const BackwardShared<C>& shared, const KeyTile& tile,
                                         int part) {
  u32 parity = 0;
  for (int i = 0; i < params.group; ++i) {
    const long long first =
        static_cast<long long>(tile.head * params.group + i) * params.tiles_q + tile.tile_q;
    for (int block = tile.begin; block < tile.end; ++block) {
      const long long place = (first + block) * C::kParts + part;
      mbarrier_wait(shared.sums_full(part), parity);
      if (params.added != nullptr) {
        const int turn = last_key_tile<C>(params, tile, block) - tile.first_key / C::kKeys;
        wait_for_turn(params.added + place, turn);
        asm volatile("fence.proxy.async;" ::: "memory");
      }
      bulk_add(params.sums + place * kPartFloats, shared.sums(part), C::kPartBytes);
      bulk_commit();
      bulk_wait_read();
      mbarrier_arrive(shared.sums_empty(part));
      if (params.added != nullptr) {
        bulk_wait();
        end_turn(params.added + place);
      }
      parity ^= 1;
    }
  }
  bulk_wait();
}

}  // namespace jit_kernel::hopper
