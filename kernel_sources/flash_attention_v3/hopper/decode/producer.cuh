// The producer warps: keep the ring of keys and values full, item after item.
//
// The copy engine loads a box of rows of a page at a time, asked by the lanes of one warp; where a
// page has no 8 rows in a line (pages of 1, of 3), all four warps load 16 bytes a thread.
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
  const int head;  // the first of this block
  RingPosition<C::kStages> at;

  // Blocks of keys in a stage: each stream's own of one head, or the same of two.
  __device__ __forceinline__ int blocks_of_stage() const {
    return params.heads_of_block == 1 ? C::kStreams : 1;
  }

  // The place of a row's box; 0 for a box without a row that is seen, whose page is not looked up.
  __device__ __forceinline__ int place_of(const DecodeItem& item, const CachePlaces& places,
                                          int row) const {
    return is_needed(item, row) ? places.place(row) : 0;
  }
  __device__ __forceinline__ bool is_needed(const DecodeItem& item, int row) const {
    return row < min(item.high, item.block_end * kDecodeKeys) && row + params.box_rows > item.low;
  }

  // One warp. A lane knows the place of a box of rows, 32 of them in a line, and the 32 behind are on
  // their way. In a stage lane l asks for box l % boxes of the rows and for the panels l / boxes.
  __device__ __forceinline__ void load_boxes(const DecodeItem& item) {
    const int lane = threadIdx.x % 32;
    const int blocks = blocks_of_stage();
    const int boxes = blocks * kDecodeKeys / params.box_rows;  // 1 to 16
    const int panels = C::kPanels * params.heads_of_block / params.box_panels;
    const int box = lane % boxes, panel = lane / boxes * params.box_panels;
    const int bytes = params.box_rows * kDecodePanel * 2;
    // Of a stage: block by block, panel by panel.
    const int offset = box * params.box_rows / kDecodeKeys * C::kBytesOfStream +
                       panel * kDecodeKeys * kDecodePanel * 2 +
                       box * params.box_rows % kDecodeKeys * kDecodePanel * 2;
    const int column = panel % C::kPanels * kDecodePanel, of_head = head + panel / C::kPanels;
    const CachePlaces places(params, item.batch);
    int place = 0, next_place = 0;
    int ahead = 0;
#pragma unroll 1
    for (int block = item.block_begin; block < item.block_end; block += blocks) {
      const int first = block * kDecodeKeys;
      if (ahead == 0) {
        const int row = first + lane * params.box_rows;
        if (block == item.block_begin) next_place = place_of(item, places, row);
        place = next_place;
        next_place = place_of(item, places, row + 32 * params.box_rows);
        ahead = 32;
      }
      const int row = first + box * params.box_rows;
      const int here = __shfl_sync(0xffffffffu, place, 32 - ahead + box);
      const bool loads = lane < boxes * panels && is_needed(item, row);
      const int expected =
          __popc(__ballot_sync(0xffffffffu, loads)) * bytes * params.box_panels;
      const int in_place = loads ? places.row_in_place(row) : 0;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        load_tile(i == 0 ? params.k : params.v, loads, expected, offset, column, in_place, of_head,
                  here);
      }
      ahead -= boxes;
    }
  }

  __device__ __forceinline__ void load_tile(const CacheRows& rows, bool loads, int expected,
                                            int offset, int column, int row, int of_head,
                                            int place) {
    const u32 full = shared.full(at.stage());
    mbarrier_wait(shared.empty(at.stage()), at.parity() ^ 1);
    if (threadIdx.x % 32 == 0) mbarrier_arrive_expect(full, expected);
    __syncwarp();
    if (loads) {
      // One box over the panels of two heads begins at the first one's panel.
      const bool joined = params.box_panels > C::kPanels;
      tma_load(shared.tile(at.stage()) + offset, &rows.map, full, kEvictNormal, column, row,
               joined ? of_head * C::kPanels : 0, joined ? 0 : of_head, place);
    }
    __syncwarp();
    at.advance();
  }

  // All producer threads: kThreadsOfRow of them a row, 16 bytes each. A warp has kRowsOfWarp rows of
  // a stage, whose places its lanes know.
  static constexpr int kThreadsOfRow = C::kHeadDim / 8;
  static constexpr int kRowsAtOnce = 32 / kThreadsOfRow;  // of a warp
  static constexpr int kRowsOfWarp = C::kStreams * kDecodeKeys / 4;
  static constexpr int kPasses = kRowsOfWarp / kRowsAtOnce;
  static_assert(kRowsOfWarp <= 32, "a lane knows one row");

  // This lane's row of a stage whose first block is `block`: its block there, and its row in it.
  __device__ __forceinline__ int lane_row(int block) const {
    const int in_stage = threadIdx.x / 32 * kRowsOfWarp + threadIdx.x % 32;
    const int in_block = params.heads_of_block == 1 ? in_stage : in_stage % kDecodeKeys;
    return block * kDecodeKeys + in_block;
  }
  __device__ __forceinline__ int find_row(const DecodeItem& item, const CachePlaces& places,
                                          int block) const {
    const int row = lane_row(block);
    const bool seen = row >= item.low && row < min(item.high, item.block_end * kDecodeKeys);
    return seen && threadIdx.x % 32 < kRowsOfWarp ? places.place(row) : -1;
  }

  __device__ __forceinline__ void load_rows(const CacheRows& rows, int columns, int place,
                                            int in_place) {
    const int lane = threadIdx.x % 32, piece = lane % kThreadsOfRow;
    const int filled = piece * 8 < columns ? 16 : 0;
    const u32 full = shared.full(at.stage());
    mbarrier_wait(shared.empty(at.stage()), at.parity() ^ 1);
    const u32 tile = shared.tile(at.stage());
    const unsigned short* const data =
        static_cast<const unsigned short*>(rows.data) + (filled != 0 ? piece * 8 : 0);
#pragma unroll 4
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsAtOnce + lane / kThreadsOfRow;  // of this warp
      const int of_place = __shfl_sync(0xffffffffu, place, row);
      const int of_row = __shfl_sync(0xffffffffu, in_place, row);
      const int in_stage = threadIdx.x / 32 * kRowsOfWarp + row;
      const int stream = in_stage / kDecodeKeys, in_tile = in_stage % kDecodeKeys;
      const int of_head = head + (params.heads_of_block == 1 ? 0 : stream);
      const void* const source = data + of_place * rows.place_stride + of_row * rows.row_stride +
                                 of_head * rows.head_stride;
      const u32 destination = tile + stream * C::kBytesOfStream +
                              piece / 8 * (kDecodeKeys * kDecodePanel * 2) +
                              in_tile * (kDecodePanel * 2) + ((piece % 8) ^ (in_tile % 8)) * 16;
      if (of_place >= 0) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination),
                     "l"(source), "r"(filled)
                     : "memory");
      }
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
    at.advance();
  }

  // The rows of two stages are found ahead.
  __device__ __forceinline__ void load_each_row(const DecodeItem& item) {
    const CachePlaces places(params, item.batch);
    const int blocks = blocks_of_stage();
    int place = find_row(item, places, item.block_begin);
    int next = find_row(item, places, item.block_begin + blocks);
#pragma unroll 1
    for (int block = item.block_begin; block < item.block_end; block += blocks) {
      const int after = find_row(item, places, block + 2 * blocks);
      const int in_place = places.row_in_place(lane_row(block));
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        load_rows(i == 0 ? params.k : params.v, i == 0 ? params.head_dim : params.head_dim_v, place,
                  in_place);
      }
      place = next;
      next = after;
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
