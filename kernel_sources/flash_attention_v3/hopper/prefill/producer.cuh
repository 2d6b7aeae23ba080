// The producer warp: keeps the rings of queries, keys and values full, tile after tile.
#pragma once

#include "flash_attention_v3/hopper/common/mask.cuh"
#include "flash_attention_v3/hopper/common/sequence.cuh"
#include "flash_attention_v3/hopper/common/tensor_rows.cuh"
#include "flash_attention_v3/hopper/prefill/hidden_values.cuh"
#include "flash_attention_v3/hopper/prefill/shared_memory.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

// The next tile is claimed when so many blocks of keys of the present one are still to be loaded:
// early enough to be found in time (5,000 cycles), and so late that a block with long tiles does
// not claim another too early. Claims a whole tile ahead left the blocks 447,000 to 648,000
// cycles of work (d 256, 4096, causal).
constexpr int kClaimBlocks = 2;

// Tiles of one length are as well claimed at once: waiting cost 1 % there.
template <class C>
__device__ __forceinline__ bool claims_late(const ForwardParams& params) {
  return C::kMasked || has_lengths(params);
}

// Where queries stay in their one stage to the tile's end, the next ones are loaded late, and
// should then be in the L2 cache: 2 % at d 256 without a mask; with one it costs 1 to 3 %.
template <class C>
constexpr bool kPrefetches = !C::kMasked && C::kStagesQ == 1 && !C::kQueriesInRegisters;

template <class C>
__device__ __forceinline__ void prefetch_queries(const ForwardParams& params,
                                                 const TileInfo& tile) {
  const MapPlace at = map_place(params.q, params.cu_seqlens_q, tile.batch, tile.len_q);
#pragma unroll 1
  for (int i = 0; i < C::kWarpgroups * (C::kHeadDim / C::kPanel); ++i) {
    tma_prefetch(&params.q.map, i / C::kWarpgroups * C::kPanel,
                 at.row + tile.row + i % C::kWarpgroups * kRowsPerWarpgroup, tile.head, at.place,
                 params.q.wrap);
  }
}

template <class C>
struct Producer {
  const typename C::Params& params;
  Shared<C> shared;
  RingPosition<C::kStagesQ> q_at;
  RingPosition<C::kStages> k_at;
  RingPosition<C::kStagesLoaded> v_at;
  MapPlace v_place = {};  // of the tile whose last values are still to be loaded
  int v_head = 0, v_block = -1;

  __device__ __forceinline__ void load_q(const TileInfo& tile, const MapPlace& at, int warpgroup) {
    mbarrier_wait(shared.q_empty(q_at.stage(), warpgroup), q_at.parity() ^ 1);
    const u32 full = shared.q_full(q_at.stage(), warpgroup);
    mbarrier_arrive_expect(full, C::kBytesQ);
    load_rows<C::kHeadDim, C::kPanel, kRowsPerWarpgroup, C::kElementBytes>(
        shared.q(q_at.stage(), warpgroup), params.q, full, kEvictFirst, at,
        tile.row + warpgroup * kRowsPerWarpgroup, tile.head);
  }

  __device__ __forceinline__ void load_k(const MapPlace& at, int block, int head) {
    mbarrier_wait(shared.k_empty(k_at.stage()), k_at.parity() ^ 1);
    const u32 full = shared.k_full(k_at.stage());
    mbarrier_arrive_expect(full, C::kBytesK);
    load_rows<C::kHeadDim, C::kPanel, C::kKeys, C::kElementBytes>(
        shared.k(k_at.stage()), params.k, full, kEvictLast, at, block * C::kKeys, head);
    k_at.advance();
  }

  __device__ __forceinline__ void load_v(const MapPlace& at, int block, int head) {
    mbarrier_wait(shared.loaded_v_empty(v_at.stage()), v_at.parity() ^ 1);
    const u32 full = shared.loaded_v_full(v_at.stage());
    mbarrier_arrive_expect(full, C::kBytesV);
    if constexpr (C::kPrepared) {
      bulk_load(shared.v(v_at.stage()),
                params.prepared + static_cast<long long>(at.place + block) * C::kBytesV, C::kBytesV,
                full, kEvictLast);
    } else {
      load_rows<C::kHeadDimV, C::kPanelV, C::kKeys, C::kElementBytes>(
          shared.loaded_v(v_at.stage()), params.v, full, kEvictLast, at, block * C::kKeys, head);
    }
    v_at.advance();
  }

  __device__ __forceinline__ void load_queries(const TileInfo& tile) {
    const MapPlace at = map_place(params.q, params.cu_seqlens_q, tile.batch, tile.len_q);
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) load_q(tile, at, warpgroup);
    q_at.advance();
  }

  // Values are loaded as if the sequence ended where the tile's last query sees no more: the copy
  // engine fills the rest with zeros.
  __device__ __forceinline__ MapPlace place_of_values(const TileInfo& tile, int head) const {
    if constexpr (C::kPrepared) {
      return {0, first_prepared<C::kKeys>(params, tile.batch, head)};
    } else {
      return map_place(params.v, params.cu_seqlens_k, tile.batch, end_of_values<C>(params, tile));
    }
  }

  // Loads in the order of use: each block's keys before the values of the block before it, also
  // from one tile to the next.
  __device__ __forceinline__ void load_tile(const TileInfo& tile) {
    const MapPlace k = map_place(params.k, params.cu_seqlens_k, tile.batch, tile.len_k);
    const int head = tile.head / params.group;
    load_k(k, tile.block_end - 1, head);
    // With one stage the queries wait for the last product of the tile before, its values must not.
    if constexpr (C::kStagesQ == 1) load_last_values();
    load_queries(tile);
    if constexpr (C::kStagesQ > 1) load_last_values();
    v_place = place_of_values(tile, head);
    v_head = head;
    const int claim_at =
        claims_late<C>(params) ? min(tile.block_end - 2, tile.block_begin + kClaimBlocks) : -1;
    if (claims_late<C>(params) && claim_at < tile.block_begin) mbarrier_arrive(shared.claim());
    for (int block = tile.block_end - 2; block >= tile.block_begin; --block) {
      if (block == claim_at) mbarrier_arrive(shared.claim());
      load_k(k, block, head);
      load_v(v_place, block + 1, head);
    }
    v_block = tile.block_begin;
  }

  __device__ __forceinline__ void load_last_values() {
    if (v_block >= 0) load_v(v_place, v_block, v_head);
  }
};

// One thread.
template <class C>
__device__ __forceinline__ void produce(const typename C::Params& params, const Shared<C>& shared) {
  // Also where there is no tile: the values' memory is the caller's again when this kernel ends.
  if constexpr (C::kPrepared) wait_for_previous_kernel();
  Producer<C> producer{params, shared};
  RingPosition<kTileSlots> at;
  while (true) {
    mbarrier_wait(shared.tile_full(at.stage()), at.parity());
    const TileInfo& tile = *shared.tile(at.stage());  // read as needed: registers are few
    if (tile.batch < 0) break;
    producer.load_tile(tile);
    mbarrier_arrive(shared.tile_empty(at.stage()));
    at.advance();
  }
  producer.load_last_values();
}

}  // namespace jit_kernel::hopper
