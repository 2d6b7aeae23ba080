// The producer warp: takes tiles in order and keeps the rings of queries, keys and values full.
#pragma once

#include "flash_attention_v3/hopper/tile_scheduler.cuh"
#include "jit_kernel/tma.cuh"

namespace jit_kernel::hopper {

// Coordinates of a sequence in a tensor's map; row is added to `row`.
struct MapPlace {
  int row, place, wrap;
};

__device__ __forceinline__ MapPlace map_place(const TensorRows& rows, const int* cu_seqlens, int batch,
                                              int length) {
  const int offset = cu_seqlens != nullptr ? cu_seqlens[batch] : 0;
  return {rows.bound > 0 ? rows.bound - length : 0,
          (cu_seqlens != nullptr ? 0 : batch * rows.batch_step) + (offset + length) * rows.row_step,
          rows.wrap};
}

// Copies `kRows` rows of all columns, panel by panel.
template <int kColumns, int kPanel, int kRows>
__device__ __forceinline__ void load_rows(u32 destination, const TensorRows& rows, u32 barrier,
                                          u64 policy, const MapPlace& at, int row, int head) {
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanel; ++panel) {
    tma_load(destination + panel * kRows * kPanel * 2, &rows.map, barrier, policy, panel * kPanel,
             at.row + row, head, at.place, at.wrap);
  }
}

template <class C>
struct Producer {
  const ForwardParams& params;
  Shared<C> shared;
  RingPosition<C::kStagesQ> q_at;
  RingPosition<C::kStages> k_at, v_at;

  __device__ __forceinline__ void load_q(const TileInfo& tile, const MapPlace& at, int warpgroup) {
    mbarrier_wait(shared.q_empty(q_at.stage, warpgroup), q_at.parity ^ 1);
    const u32 full = shared.q_full(q_at.stage, warpgroup);
    mbarrier_arrive_expect(full, C::kBytesQ);
    load_rows<C::kHeadDim, C::kPanel, kRowsPerWarpgroup>(
        shared.q(q_at.stage, warpgroup), params.q, full, kEvictFirst, at,
        tile.row + warpgroup * kRowsPerWarpgroup, tile.head);
  }

  __device__ __forceinline__ void load_k(const TileInfo& tile, const MapPlace& at, int block) {
    mbarrier_wait(shared.k_empty(k_at.stage), k_at.parity ^ 1);
    mbarrier_arrive_expect(shared.k_full(k_at.stage), C::kBytesK);
    load_rows<C::kHeadDim, C::kPanel, C::kKeys>(shared.k(k_at.stage), params.k,
                                                shared.k_full(k_at.stage), kEvictLast, at,
                                                block * C::kKeys, tile.head / params.group);
    k_at.advance();
  }

  __device__ __forceinline__ void load_v(const TileInfo& tile, const MapPlace& at, int block) {
    mbarrier_wait(shared.v_empty(v_at.stage), v_at.parity ^ 1);
    mbarrier_arrive_expect(shared.v_full(v_at.stage), C::kBytesV);
    load_rows<C::kHeadDimV, C::kPanelV, C::kKeys>(shared.v(v_at.stage), params.v,
                                                  shared.v_full(v_at.stage), kEvictLast, at,
                                                  block * C::kKeys, tile.head / params.group);
    v_at.advance();
  }

  // Loads in the order of use: the first keys between the warpgroups' queries, then each block's
  // keys before the values of the block before it.
  __device__ __forceinline__ void load_tile(const TileInfo& tile, int count) {
    const MapPlace q = map_place(params.q, params.cu_seqlens_q, tile.batch, tile.len_q);
    const MapPlace k = map_place(params.k, params.cu_seqlens_k, tile.batch, tile.len_k);
    const MapPlace v = map_place(params.v, params.cu_seqlens_k, tile.batch, tile.len_k);
    // The queries' release of an older tile, waited for here, also frees the slot.
    mbarrier_wait(shared.q_empty(q_at.stage, 0), q_at.parity ^ 1);
    *shared.tile(count) = tile;
    load_q(tile, q, 0);
    load_k(tile, k, tile.block_end - 1);
#pragma unroll
    for (int warpgroup = 1; warpgroup < C::kWarpgroups; ++warpgroup) load_q(tile, q, warpgroup);
    q_at.advance();
    for (int block = tile.block_end - 2; block >= tile.block_begin; --block) {
      load_k(tile, k, block);
      load_v(tile, v, block + 1);
    }
    load_v(tile, v, tile.block_begin);
  }

  // A slot with batch -1 ends the consumers.
  __device__ __forceinline__ void end(int count) {
    mbarrier_wait(shared.q_empty(q_at.stage, 0), q_at.parity ^ 1);
    shared.tile(count)->batch = -1;
#pragma unroll
    for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) {
      mbarrier_wait(shared.q_empty(q_at.stage, warpgroup), q_at.parity ^ 1);
      mbarrier_arrive(shared.q_full(q_at.stage, warpgroup));
    }
  }
};

template <class C>
__device__ __forceinline__ void produce(const ForwardParams& params, const Shared<C>& shared) {
  const int lane = threadIdx.x % 32;
  TileScheduler<C> scheduler(params, shared.order());
  Producer<C> producer{params, shared};
  int index = blockIdx.x;
  int count = 0;
  TileInfo tile;
  while (scheduler.seek(index, tile)) {
    if (lane == 0) {
      // Asked for early: the answer is back by the time that this tile's loads are issued.
      const int next = atomicAdd(params.progress, 1);
      producer.load_tile(tile, count);
      index = next + gridDim.x;
    }
    index = __shfl_sync(0xffffffffu, index, 0);
    ++count;
  }
  if (lane != 0) return;
  producer.end(count);
  if (atomicAdd(params.progress + 1, 1) == gridDim.x - 1) {
    params.progress[0] = 0;
    params.progress[1] = 0;
  }
}

}  // namespace jit_kernel::hopper
