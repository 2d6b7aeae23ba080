// The producers of keys and values from a cache: pages by boxes of the copy engine, or row by row.
//
// By boxes: one warp. A lane looks its box's page up a block ahead, and issues it. Boxes without a
// row that the tile sees are neither looked up nor issued; consumers clear what they leave behind.
//
// Row by row, where pages are no multiple of 8 rows, the swizzle's period: three warps, 16 bytes a
// lane by cp.async. It writes as ordinary stores do, and wgmma reads as the copy engine: each lane
// waits for its copies, fences, and then arrives. So a stage is told of when the next one
// has been asked for; and never is anything waited for while a finished stage has not been told of.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"
#include "flash_attention_v3/hopper/prefill/producer.cuh"
#include "jit_kernel/cuda/cp_async.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

enum : int { kRowLoaders = 3 };  // warps; enumerators leave no symbol in cubins without them

// Threads that arrive when they have loaded a stage of keys or values.
template <class C>
__device__ __forceinline__ int loaders_of_stage(const typename C::Params& params) {
  return uses_boxes<C>(params) ? 1 : 32 * kRowLoaders;
}

// Threads that load keys and values, each of which hands a tile back.
template <class C>
__device__ __forceinline__ int loaders_of_tile(const typename C::Params& params) {
  return !C::kCached ? 1 : uses_boxes<C>(params) ? 32 : 32 * kRowLoaders;
}

// Where a tile's keys lie, and the rows of the cache that it sees.
struct KeySource {
  int head, cache_row, low, high;
};

// What a lane knows of a block's pages: that of its box, or those of two of its warp's rows.
struct LanePages {
  int first = 0, second = 0;
};

template <class C, bool kBoxes>
struct CachedProducer {
  const CachedParams& params;
  Shared<C> shared;
  const int lane, rank;  // rank: of the warp among those that load
  RingPosition<C::kStagesQ> q_at = {};
  RingPosition<C::kStages> k_at = {}, v_at = {};
  KeySource v_source = {};  // of the tile whose last values are still to be loaded
  int v_block = -1;
  LanePages v_page = {};
  static constexpr bool kTwoRows =
      C::kKeys > 32 * kRowLoaders;  // a lane knows two of its warp's rows
  u32 untold = 0;                   // the barrier of a stage whose copies are in flight

  __device__ __forceinline__ const int* table_row(const KeySource& source) const {
    return params.page_table + source.cache_row * params.table_stride;
  }

  // Whether this lane's box of a block has a row that the tile sees.
  __device__ __forceinline__ bool has_box(const KeySource& source, int block) const {
    const int row = block * C::kKeys + lane * params.box_rows;
    return lane < params.boxes && row < source.high && row + params.box_rows > source.low;
  }

  // The pages that this lane looks up of a block, all of a warp's at once: to look each up when its
  // row is copied took 600 cycles for every 8 rows.
  __device__ __forceinline__ LanePages look_up(const KeySource& source, int block) const {
    if constexpr (!kBoxes) {
      if constexpr (!kTwoRows) return {look_up_row(source, block, lane), 0};
      return {look_up_row(source, block, lane), look_up_row(source, block, lane + 32)};
    }
    if (!has_box(source, block)) return {};
    if (params.page_table == nullptr) return {source.cache_row, 0};
    return {table_row(source)[page_of(params, block * C::kKeys + lane * params.box_rows)], 0};
  }

  template <int kColumns, int kPanel>
  __device__ __forceinline__ void copy_boxes(u32 destination, const TensorMap& map, u32 full,
                                             const KeySource& source, int block, int page) const {
    const bool copies = has_box(source, block);
    const int count = __popc(__ballot_sync(0xffffffffu, copies));
    if (lane == 0) mbarrier_arrive_expect(full, count * params.box_rows * kColumns * 2);
    __syncwarp();
    if (!copies) return;
    const int first = lane * params.box_rows, row = block * C::kKeys + first;
    const int slot = row - page_of(params, row) * params.page_size;
#pragma unroll
    for (int panel = 0; panel < kColumns / kPanel; ++panel) {
      tma_load(destination + (panel * C::kKeys + first) * kPanel * 2, &map, full, kEvictLast,
               panel * kPanel, slot, source.head, page, 0);
    }
  }

  // Of the rows of a block that this warp copies, eight in a line of every 24, the index-th.
  __device__ __forceinline__ int row_in_block(int index) const {
    return (rank + kRowLoaders * (index / 8)) * 8 + index % 8;
  }

  // Its page; -1 where the tile does not see it.
  __device__ __forceinline__ int look_up_row(const KeySource& source, int block, int index) const {
    const int in_block = row_in_block(index), row = block * C::kKeys + in_block;
    if (in_block >= C::kKeys || row < source.low || row >= source.high) return -1;
    return table_row(source)[page_of(params, row)];
  }

  // A warp copies 64 bytes of 8 rows at a time, so that neighbouring lanes write to different
  // banks.
  template <int kColumns, int kPanel>
  __device__ __forceinline__ void copy_rows(u32 empty, u32 parity, u32 destination,
                                            const CacheRows& from, u32 full,
                                            const KeySource& source, int block,
                                            const LanePages& pages) {
    static_assert(C::kKeys <= 64 * kRowLoaders, "a lane knows two rows");
    wait(empty, parity);
#pragma unroll 1
    for (int n = 0; (rank + kRowLoaders * n) * 8 < C::kKeys; ++n) {
      const int index = n * 8 + lane % 8;
      const int page =
          __shfl_sync(0xffffffffu, !kTwoRows || n < 4 ? pages.first : pages.second, index % 32);
      if (page >= 0) {
        const int in_block = row_in_block(index), row = block * C::kKeys + in_block;
        const int slot = row - page_of(params, row) * params.page_size;
        const char* const at = from.base + page * from.page_stride + slot * from.row_stride +
                               source.head * from.head_stride + lane / 8 * 16;
        const int swizzled = kPanel == 64 ? in_block % 8 : in_block / 2 % 4;
        const u32 target = destination + in_block * kPanel * 2;
#pragma unroll
        for (int j = 0; j < kColumns / 32; ++j) {
          const int piece = lane / 8 + 4 * j;  // of 16 bytes
          const int inside = (lane / 8 + 4 * j % (kPanel / 8)) ^ swizzled;
          cp_async_16(target + 4 * j / (kPanel / 8) * C::kKeys * kPanel * 2 + (inside << 4),
                      at + 64 * j, piece * 8 < from.columns ? 16 : 0);
        }
      }
    }
    cp_async_commit();
    tell<1>();
    untold = full;
  }

  // Tells the consumers of the stage before, once no more than kLater later groups are in flight.
  template <int kLater>
  __device__ __forceinline__ void tell() {
    if (untold == 0) return;
    cp_async_wait<kLater>();
    proxy_fence();
    mbarrier_arrive(untold);
    untold = 0;
  }

  __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    if constexpr (!kBoxes) {
      if (__all_sync(0xffffffffu, mbarrier_test(barrier, parity))) return;
      tell<0>();
    }
    mbarrier_wait(barrier, parity);
  }

  __device__ __forceinline__ void load_k(const KeySource& source, int block,
                                         const LanePages& page) {
    const u32 full = shared.k_full(k_at.stage()), empty = shared.k_empty(k_at.stage());
    if constexpr (kBoxes) {
      wait(empty, k_at.parity() ^ 1);
      copy_boxes<C::kHeadDim, C::kPanel>(shared.k(k_at.stage()), params.k.map, full, source, block,
                                         page.first);
    } else {
      copy_rows<C::kHeadDim, C::kPanel>(empty, k_at.parity() ^ 1, shared.k(k_at.stage()),
                                        params.k_rows, full, source, block, page);
    }
    k_at.advance();
  }

  __device__ __forceinline__ void load_v(const KeySource& source, int block,
                                         const LanePages& page) {
    const u32 full = shared.v_full(v_at.stage()), empty = shared.v_empty(v_at.stage());
    if constexpr (kBoxes) {
      wait(empty, v_at.parity() ^ 1);
      copy_boxes<C::kHeadDimV, C::kPanelV>(shared.v(v_at.stage()), params.v.map, full, source,
                                           block, page.first);
    } else {
      copy_rows<C::kHeadDimV, C::kPanelV>(empty, v_at.parity() ^ 1, shared.v(v_at.stage()),
                                          params.v_rows, full, source, block, page);
    }
    v_at.advance();
  }

  // Map dimensions: (column, head of the tile, token, tile of heads, batch entry).
  __device__ __forceinline__ void load_queries(const CachedTileInfo& tile) {
    if (rank != 0) return;
    const bool ragged = params.cu_seqlens_q != nullptr;
    const int token = (ragged ? tile.offset_q : 0) + (tile.row >> params.pack_shift);
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) {
      wait(shared.q_empty(q_at.stage(), warpgroup), q_at.parity() ^ 1);
      if (lane != 0) continue;
      const u32 full = shared.q_full(q_at.stage(), warpgroup);
      mbarrier_arrive_expect(full, C::kBytesQ);
#pragma unroll
      for (int panel = 0; panel < C::kHeadDim / C::kPanel; ++panel) {
        tma_load(shared.q(q_at.stage(), warpgroup) + panel * kRowsPerWarpgroup * C::kPanel * 2,
                 &params.q.map, full, kEvictFirst, panel * C::kPanel, 0,
                 token + (warpgroup * kRowsPerWarpgroup >> params.pack_shift),
                 tile.head >> params.pack_shift, ragged ? 0 : tile.batch);
      }
    }
    q_at.advance();
  }

  __device__ __forceinline__ void claim() {
    if (rank == 0 && lane == 0) mbarrier_arrive(shared.claim());
  }

  // In the order of Producer::load_tile. A block's pages are looked up before the block above it is
  // loaded.
  __device__ __forceinline__ void load_tile(const CachedTileInfo& tile) {
    const KeySource source = {tile.head / params.group, tile.cache_row, tile.low, tile.high};
    const int begin = tile.block_begin, end = tile.block_end;
    LanePages page = look_up(source, end - 1), next = look_up(source, end - 2);
    load_k(source, end - 1, page);
    if constexpr (C::kStagesQ == 1) load_last_values();
    load_queries(tile);
    if constexpr (C::kStagesQ > 1) load_last_values();
    const int claim_at = min(end - 2, begin + kClaimBlocks);
    if (claim_at < begin) claim();
    for (int block = end - 2; block >= begin; --block) {
      if (block == claim_at) claim();
      const LanePages after = look_up(source, block - 1);
      load_k(source, block, next);
      load_v(source, block + 1, page);
      page = next;
      next = after;
    }
    v_source = source;
    v_block = begin;
    v_page = page;
  }

  __device__ __forceinline__ void load_last_values() {
    if (v_block >= 0) load_v(v_source, v_block, v_page);
  }
};

// One warp of those that load.
template <class C, bool kBoxes>
__device__ __forceinline__ void produce_cached(const CachedParams& params, const Shared<C>& shared,
                                               int rank) {
  CachedProducer<C, kBoxes> producer{params, shared, static_cast<int>(threadIdx.x % 32), rank};
  RingPosition<kTileSlots> at;
  while (true) {
    producer.wait(shared.tile_full(at.stage()), at.parity());
    const CachedTileInfo& tile = *shared.tile(at.stage());
    if (tile.batch < 0) break;
    producer.load_tile(tile);
    mbarrier_arrive(shared.tile_empty(at.stage()));
    at.advance();
  }
  producer.load_last_values();
  producer.template tell<0>();
}

}  // namespace jit_kernel::hopper
