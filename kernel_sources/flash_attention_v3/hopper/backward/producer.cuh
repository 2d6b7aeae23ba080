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
  RingPosition<C::kStages> q_at;
  RingPosition<C::kStagesGradOut> grad_at;
  for (int i = 0; i < params.group; ++i) {
    const int head = tile.head * params.group + i;
    const long long rows =
        (static_cast<long long>(head) * params.tiles_q + tile.tile_q) * C::kQueries;
    for (int block = tile.begin; block < tile.end; ++block) {
      const int row = block * C::kQueries;
      const u32 q_full = shared.q_full(q_at.stage());
      mbarrier_wait(shared.q_empty(q_at.stage()), q_at.parity() ^ 1);
      mbarrier_arrive_expect(q_full, C::kBytesQueries + C::kQueries * 4);
      load_rows<C::kHeadDim, C::kPanel, C::kQueries>(shared.q(q_at.stage()), params.q, q_full,
                                                     kEvictLast, queries, row, head);
      bulk_load(shared.lse(q_at.stage()), params.lse_log2 + rows + row, C::kQueries * 4, q_full);
      q_at.advance();
      const u32 grad_full = shared.grad_out_full(grad_at.stage());
      mbarrier_wait(shared.grad_out_empty(grad_at.stage()), grad_at.parity() ^ 1);
      mbarrier_arrive_expect(grad_full, C::kBytesQueries + C::kQueries * 4);
      load_rows<C::kHeadDim, C::kPanel, C::kQueries>(shared.grad_out(grad_at.stage()),
                                                     params.grad_out, grad_full, kEvictLast, grads,
                                                     row, head);
      bulk_load(shared.delta(grad_at.stage()), params.delta + rows + row, C::kQueries * 4,
                grad_full);
      grad_at.advance();
    }
  }
}

__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Which part of which tile a warpgroup's sums are, one after the other.
template <class C>
struct SumsPosition {
  const BackwardParams& params;
  const KeyTile& tile;
  const int warpgroup;
  int head, block, turn;

  __device__ __forceinline__ bool advance() {
    if (++turn < C::kTurns) return true;
    turn = 0;
    if (++block < tile.end) return true;
    block = tile.begin;
    return ++head < (tile.head + 1) * params.group;
  }
  __device__ __forceinline__ long long place() const {
    const long long of_tile = static_cast<long long>(head) * params.tiles_q + tile.tile_q + block;
    return of_tile * C::kParts + warpgroup * C::kTurns + turn;
  }
  // How many tiles of keys add to it before this one: those behind it, which were handed out
  // before, so that they run or have ended.
  __device__ __forceinline__ int before() const {
    return last_key_tile<C>(params, tile, block) - tile.first_key / C::kKeys;
  }
};

// One thread a warpgroup: adds what it computed of each tile.
template <class C>
__device__ __forceinline__ void add_sums(const BackwardParams& params,
                                         const BackwardShared<C>& shared, const KeyTile& tile,
                                         int warpgroup) {
  SumsPosition<C> at{params, tile, warpgroup, tile.head * params.group, tile.begin, 0};
  u32 parity = 0;
  do {
    mbarrier_wait(shared.sums_full(warpgroup), parity);
    bulk_add(params.sums + at.place() * kPartFloats, shared.sums(warpgroup), C::kPartBytes);
    bulk_commit();
    bulk_wait_read();
    mbarrier_arrive(shared.sums_empty(warpgroup));
    parity ^= 1;
  } while (at.advance());
  bulk_wait();
}

// The same in order. Whether it is the next part's turn is asked while this one's sums are written.
template <class C>
__device__ __forceinline__ void add_sums_in_order(const BackwardParams& params,
                                                  const BackwardShared<C>& shared,
                                                  const KeyTile& tile, int warpgroup) {
  SumsPosition<C> at{params, tile, warpgroup, tile.head * params.group, tile.begin, 0};
  u32 parity = 0;
  int* added = params.added + at.place();
  int before = at.before(), seen = load_acquire(added);
  while (true) {
    while (seen != before) seen = load_acquire(added);
    mbarrier_wait(shared.sums_full(warpgroup), parity);
    asm volatile("fence.proxy.async.global;" ::: "memory");
    bulk_add(params.sums + at.place() * kPartFloats, shared.sums(warpgroup), C::kPartBytes);
    bulk_commit();
    bulk_wait_read();
    mbarrier_arrive(shared.sums_empty(warpgroup));
    parity ^= 1;
    int* const done = added;
    const bool more = at.advance();
    if (more) {
      added = params.added + at.place();
      before = at.before();
      seen = load_acquire(added);
    }
    bulk_wait();
    asm volatile("fence.proxy.async.global;" ::: "memory");
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(done) : "memory");
    if (!more) break;
  }
}

}  // namespace jit_kernel::hopper
