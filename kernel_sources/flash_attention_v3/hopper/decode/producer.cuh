// The producer warps: keep the rings of keys and values full, item after item.
//
// The copy engine loads a box of rows of a page at a time, asked by one warp; where a page has no 8
// rows in a line (pages of 1, of 3), all four warps load 16 bytes a thread.
#pragma once

#include "flash_attention_v3/hopper/decode/schedule.cuh"
#include "flash_attention_v3/hopper/decode/shared_memory.cuh"
#include "jit_kernel/cuda/tma.cuh"

namespace jit_kernel::hopper {

// Where a sequence's rows lie: pages by a table, or one entry of a dense cache.
struct CachePlaces {
  const DecodeParams& params;
  const int* table;  // null for a dense cache
  int entry;

  __device__ __forceinline__ CachePlaces(const DecodeParams& params, int batch) : params(params) {
    entry = params.cache_batch_idx != nullptr ? params.cache_batch_idx[batch] : batch;
    table = params.page_table != nullptr ? params.page_table + entry * params.page_table_stride
                                         : nullptr;
  }
  __device__ __forceinline__ int index(int row) const {
    return divide(row, params.place_multiplier, params.place_shift);
  }
  __device__ __forceinline__ int place(int row) const {
    return table != nullptr ? table[index(row)] : entry;
  }
  __device__ __forceinline__ int row_in_place(int row) const {
    return row - index(row) * params.place_rows;
  }
};

template <class C>
struct DecodeProducer {
  const DecodeParams& params;
  const DecodeShared<C> shared;
  const int head;
  RingPosition<C::kStages> at;

  // The place of a row's box; 0 for a box without a row that is seen, whose page is not looked up.
  __device__ __forceinline__ int place_of(const DecodeItem& item, const CachePlaces& places,
                                          int row) const {
    return row < item.high && row + params.box_rows > item.low ? places.place(row) : 0;
  }

  // One warp. Each lane has a box: lane l that of the l-th rows of the blocks that come next.
  __device__ __forceinline__ void load_boxes(const DecodeItem& item) {
    const int lane = threadIdx.x % 32;
    const int boxes = kDecodeKeys / params.box_rows;  // of a block, 1 to 8
    const int bytes = params.box_rows * C::kHeadDim * 2;
    const CachePlaces places(params, item.batch);
    int place = 0, next_place = 0;
    int ahead = 0;  // boxes that the lanes know of; the places of the 32 behind are on their way
#pragma unroll 1
    for (int block = item.block_begin; block < item.block_end; ++block) {
      if (ahead == 0) {
        const int row = block * kDecodeKeys + lane * params.box_rows;
        if (block == item.block_begin) next_place = place_of(item, places, row);
        place = next_place;
        next_place = place_of(item, places, row + 32 * params.box_rows);
        ahead = 32;
      }
      const int index = 32 - ahead + lane;
      const int row = block * kDecodeKeys + lane * params.box_rows;
      const int here = __shfl_sync(0xffffffffu, place, index % 32);
      const bool loads = lane < boxes && row < item.high && row + params.box_rows > item.low;
      const int expected = __popc(__ballot_sync(0xffffffffu, loads)) * bytes;
      const int in_place = loads ? places.row_in_place(row) : 0;
      const int stage = at.stage();
      load_box(params.k, shared.k(stage), shared.k_full(stage), shared.k_empty(stage), loads,
               expected, lane, in_place, here);
      load_box(params.v, shared.v(stage), shared.v_full(stage), shared.v_empty(stage), loads,
               expected, lane, in_place, here);
      at.advance();
      ahead -= boxes;
    }
  }

  __device__ __forceinline__ void load_box(const CacheRows& rows, u32 tile, u32 full, u32 empty,
                                           bool loads, int expected, int lane, int in_place,
                                           int place) {
    mbarrier_wait(empty, at.parity() ^ 1);
    if (lane == 0) mbarrier_arrive_expect(full, expected);
    __syncwarp();
    if (loads) {
      const u32 destination = tile + lane * params.box_rows * kDecodePanel * 2;
#pragma unroll 1
      for (int panel = 0; panel < C::kPanels; panel += params.box_panels) {
        tma_load(destination + panel * kDecodeKeys * kDecodePanel * 2, &rows.map, full, kEvictNormal,
                 panel * kDecodePanel, in_place, 0, head, place);
      }
    }
    __syncwarp();
  }

  // All producer threads: kThreadsOfRow of them a row, 16 bytes each.
  static constexpr int kThreadsOfRow = C::kHeadDim / 8;
  static constexpr int kRowsAtOnce = 128 / kThreadsOfRow;
  static constexpr int kPasses = kDecodeKeys / kRowsAtOnce;

  __device__ __forceinline__ void find_rows(const DecodeItem& item, const CachePlaces& places,
                                            int block, int (&found)[kPasses]) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = block * kDecodeKeys + pass * kRowsAtOnce + threadIdx.x / kThreadsOfRow;
      found[pass] = row >= item.low && row < item.high ? places.place(row) : -1;
    }
  }

  __device__ __forceinline__ void load_rows(const CacheRows& rows, const CachePlaces& places,
                                            u32 tile, u32 full, u32 empty, int columns, int block,
                                            const int (&found)[kPasses]) {
    const int piece = threadIdx.x % kThreadsOfRow;
    const int filled = piece * 8 < columns ? 16 : 0;
    mbarrier_wait(empty, at.parity() ^ 1);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int in_tile = pass * kRowsAtOnce + threadIdx.x / kThreadsOfRow;
      if (found[pass] < 0) continue;
      const int in_place = places.row_in_place(block * kDecodeKeys + in_tile);
      const void* const source = static_cast<const unsigned short*>(rows.data) +
                                 found[pass] * rows.place_stride + in_place * rows.row_stride +
                                 head * rows.head_stride + (filled != 0 ? piece * 8 : 0);
      const u32 destination = tile + piece / 8 * (kDecodeKeys * kDecodePanel * 2) +
                              in_tile * (kDecodePanel * 2) + ((piece % 8) ^ (in_tile % 8)) * 16;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                   "r"(filled)
                   : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
  }

  __device__ __forceinline__ void load_each_row(const DecodeItem& item) {
    const CachePlaces places(params, item.batch);
    int found[kPasses];
    if (item.block_begin < item.block_end) find_rows(item, places, item.block_begin, found);
#pragma unroll 1
    for (int block = item.block_begin; block < item.block_end; ++block) {
      const int stage = at.stage();
      load_rows(params.k, places, shared.k(stage), shared.k_full(stage), shared.k_empty(stage),
                params.head_dim, block, found);
      load_rows(params.v, places, shared.v(stage), shared.v_full(stage), shared.v_empty(stage),
                params.head_dim_v, block, found);
      if (block + 1 < item.block_end) find_rows(item, places, block + 1, found);
      at.advance();
    }
  }
};

// A producer warp; the first one also hands the items over to the consumers.
template <class C>
__device__ __forceinline__ void produce_items(const DecodeParams& params,
                                              const DecodeShared<C>& shared, int part, int head) {
  const bool by_boxes = params.box_rows > 0;
  if (by_boxes && threadIdx.x >= 32) return;
  DecodeSchedule schedule(params, part);
  DecodeProducer<C> producer{params, shared, head};
  RingPosition<kDecodeItemSlots> at;
  DecodeItem item;
  bool found;
  do {
    found = schedule.next(item);
    if (threadIdx.x < 32) {
      mbarrier_wait(shared.item_empty(at.stage()), at.parity() ^ 1);
      if (threadIdx.x == 0) {
        DecodeItem& slot = *shared.item(at.stage());
        if (found) {
          slot = item;
        } else {
          slot.batch = -1;
        }
        mbarrier_arrive(shared.item_full(at.stage()));
      }
      __syncwarp();
      at.advance();
    }
    if (!found) break;
    if (by_boxes) {
      producer.load_boxes(item);
    } else {
      producer.load_each_row(item);
    }
  } while (true);
}

}  // namespace jit_kernel::hopper
