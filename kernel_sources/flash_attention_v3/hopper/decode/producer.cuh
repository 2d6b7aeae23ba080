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

// One warp of each block of a cluster: the first 8,192 entries of a sequence's row of the page
// table, 1,024 a block, into the L2 cache, while its length, which says how many of them there are,
// is on its way. What they hold is not looked at.
__device__ __forceinline__ void prefetch_places(const DecodeParams& params, int batch, int part) {
  if (params.page_table == nullptr || params.cache_batch_idx != nullptr) return;
  const int entry = (part * 32 + threadIdx.x % 32) * 32;  // the first of 128 bytes
  if (entry >= divide(params.rows_k, params.place_multiplier, params.place_shift)) return;
  const int* const address = params.page_table + batch * params.page_table_stride + entry;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// The first 64 places of a sequence's row of the page table, two a lane, asked for before
// its length is known: else one would wait for the other.
struct EarlyPlaces {
  static constexpr int kOfLane = 2;
  int places[kOfLane];
  bool known = false;

  __device__ __forceinline__ void ask(const DecodeParams& params, int batch) {
    if (params.page_table == nullptr || params.cache_batch_idx != nullptr) return;
    const int columns = divide(params.rows_k, params.place_multiplier, params.place_shift);
    const int* const table = params.page_table + batch * params.page_table_stride;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int column = 32 * i + threadIdx.x % 32;
      places[i] = column < columns ? table[column] : 0;
    }
    known = true;
  }

  // By all lanes of a warp. Whether the place of a column is here, and which it is.
  __device__ __forceinline__ bool find(int column, int& place) const {
    if (!known) return false;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int found = __shfl_sync(0xffffffffu, places[i], column % 32);
      if (column / 32 == i) place = found;
    }
    return column < 32 * kOfLane;
  }
};

// Of an e4m3 cache with a scale of each token and head. Where boxes come by the copy engine the
// threads from this one on load the scales, beside no more than two warps that ask for boxes.
constexpr int kFirstOfScales = 64, kThreadsOfScales = 64;
__device__ __forceinline__ bool has_scales(const DecodeParams& params) {
  return params.k.scales != nullptr || params.v.scales != nullptr;
}

// Whether the second warp, which hands the items over, finds them for the first one as well, and
// the places of their first boxes: a first warp that did both itself asked for nothing meanwhile,
// 800 cycles to find an item and up to 1,600 for a line of the page table. Clusters have one item.
template <class C>
__device__ __forceinline__ bool finds_ahead(const DecodeParams& params) {
  return C::kFindsAhead && params.box_rows > 0 && params.copy_warps == 1 && !params.in_clusters &&
         !(C::kMixed && has_scales(params));
}

template <class C>
struct DecodeProducer {
  const DecodeParams& params;
  const DecodeShared<C> shared;
  const int head;  // the first of this block
  const EarlyPlaces& early;
  RingPosition<C::kStages> at;

  // Blocks of keys in a stage: each stream's own of one head, or the same of two.
  __device__ __forceinline__ int blocks_of_stage() const {
    return params.heads_of_block == 1 ? C::kStreams : 1;
  }
  // From the first block of a stage to that of the next one.
  __device__ __forceinline__ int step_of(const DecodeItem& item) const {
    return item.begin[1] - item.begin[0] > 1 ? 1 : blocks_of_stage();
  }
  // How far a row of a stage lies behind the stage's first block: the second stream's block may lie
  // further behind than the next.
  __device__ __forceinline__ int row_behind(const DecodeItem& item, int row) const {
    return row + row / kDecodeKeys * (item.begin[1] - item.begin[0] - 1) * kDecodeKeys;
  }

  // The place of a row's box; 0 for a box without a row that is seen, whose page is not looked up.
  __device__ __forceinline__ int place_of(const DecodeItem& item, const CachePlaces& places,
                                          int row) const {
    int place = 0;
    const bool is_early = early.find(places.index(row), place);
    if (!is_needed(item, row)) return 0;
    return is_early ? place : places.place(row);
  }
  __device__ __forceinline__ bool is_needed(const DecodeItem& item, int row) const {
    return row < min(item.high, item.end[1] * kDecodeKeys) && row + params.box_rows > item.low;
  }

  // How far the box whose place a lane knows lies behind a stage's first row.
  __device__ __forceinline__ int row_of_lane(const DecodeItem& item) const {
    const int lane = threadIdx.x % 32, boxes = 1 << params.boxes_log2;  // 1 to 16
    return (lane >> params.boxes_log2) * step_of(item) * kDecodeKeys +
           row_behind(item, (lane & (boxes - 1)) * params.box_rows);
  }
  // The place that a lane knows of an item's first boxes.
  __device__ __forceinline__ int first_place(const DecodeItem& item) const {
    return place_of(item, CachePlaces(params, item.batch),
                    item.begin[0] * kDecodeKeys + row_of_lane(item));
  }

  // A lane knows the place of a box of rows, 32 of them in a line, and the 32 behind are on their
  // way. Of a stage's copies, boxes x panels, warp w asks for every fourth: a warp issues them one
  // after the other. The first warp alone where there are no more than four.
  __device__ __forceinline__ void load_boxes(const DecodeItem& item, int next_place,
                                             bool is_known) {
    const int lane = threadIdx.x % 32;
    const int boxes = 1 << params.boxes_log2;
    const int copy = lane * params.copy_warps + threadIdx.x / 32;
    const int box = copy & (boxes - 1), panel = (copy >> params.boxes_log2) * params.box_panels;
    const int bytes = params.box_rows * params.box_panels * C::kPanelBytes;
    // Of a stage: block by block, panel by panel.
    const int offset = box * params.box_rows / kDecodeKeys * C::kBytesOfStream +
                       panel * kDecodeKeys * C::kPanelBytes +
                       box * params.box_rows % kDecodeKeys * C::kPanelBytes;
    const int column = panel % C::kCachePanels * C::kCachePanel;
    const int of_head = head + panel / C::kCachePanels;
    const CachePlaces places(params, item.batch);
    const int step = step_of(item);
    // Rows behind a stage's first one: of this lane's copy, and of the box whose place it knows.
    const int row_of_copy = row_behind(item, box * params.box_rows);
    const int row_of_known = row_of_lane(item);
    const int rows_of_line = (32 >> params.boxes_log2) * step * kDecodeKeys;
    int place = 0, ahead = 0;
#pragma unroll 1
    for (int block = item.begin[0]; block < item.end[0]; block += step) {
      const int first = block * kDecodeKeys;
      if (ahead == 0) {
        const int row = first + row_of_known;
        if (block == item.begin[0] && !is_known) next_place = place_of(item, places, row);
        place = next_place;
        next_place = place_of(item, places, row + rows_of_line);
        ahead = 32;
      }
      const int row = first + row_of_copy;
      const int here = __shfl_sync(0xffffffffu, place, 32 - ahead + box);
      const bool loads = copy < params.copies && is_needed(item, row);
      const unsigned needed =
          __ballot_sync(0xffffffffu, lane < boxes && is_needed(item, first + row_of_known));
      const int expected = __popc(needed) * (params.copies >> params.boxes_log2) * bytes;
      const int in_place = loads ? places.row_in_place(row) : 0;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const DecodeRows& rows = i == 0 ? params.k : params.v;
        load_tile(rows, loads, expected, offset, column, in_place, of_head, here);
        at.advance();
      }
      ahead -= boxes;
    }
  }

  __device__ __forceinline__ void load_tile(const DecodeRows& rows, bool loads, int expected,
                                            int offset, int column, int row, int of_head,
                                            int place) {
    const u32 full = shared.full(at.stage());
    mbarrier_wait(shared.empty(at.stage()), at.parity() ^ 1);
    // Bytes of another warp's copies may arrive before they are expected: the phase waits for this.
    if (threadIdx.x == 0) mbarrier_arrive_expect(full, expected);
    __syncwarp();
    if (loads) {
      // One box over the panels of two heads begins at the first one's panel.
      const bool joined = params.box_panels > C::kCachePanels;
      tma_load(shared.tile(at.stage()) + offset, &rows.map, full, params.policy, column, row,
               joined ? of_head * C::kCachePanels : 0, joined ? 0 : of_head, place);
    }
    __syncwarp();
  }

  // The scales of the rows that boxes have, a thread a key of each stream. Those of rows that are
  // not seen become 0.
  __device__ __forceinline__ void load_scales(const DecodeItem& item) {
    constexpr int kSlots = C::kStreams * kDecodeKeys / kThreadsOfScales;
    int thread = threadIdx.x % kThreadsOfScales;
    asm volatile("" : "+r"(thread));  // what follows from it takes no registers between items
    const CachePlaces places(params, item.batch);
    const int step = step_of(item), high = min(item.high, item.end[1] * kDecodeKeys);
    const auto row_of = [&](int block, int slot) {
      const bool in_turns = params.heads_of_block == 1;
      const int in_stage = slot * kThreadsOfScales + thread;
      return block * kDecodeKeys + (in_turns ? row_behind(item, in_stage) : in_stage % kDecodeKeys);
    };
#pragma unroll 1
    for (int block = item.begin[0]; block < item.end[0]; block += step) {
      int place[kSlots];  // looked up while the stages before are computed: no need to be ahead
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int row = row_of(block, i);
        place[i] = row >= item.low && row < high ? places.place(row) : -1;
      }
#pragma unroll 1
      for (int tile = 0; tile < 2; ++tile) {
        const DecodeRows& rows = tile == 0 ? params.k : params.v;
        mbarrier_wait(shared.empty(at.stage()), at.parity() ^ 1);
        if (rows.scales != nullptr) {
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            load_scale(rows, i * kThreadsOfScales + thread, place[i],
                       places.row_in_place(row_of(block, i)), place[i] >= 0);
          }
        }
        arrive_behind_loads();
        at.advance();
      }
    }
  }

  __device__ __forceinline__ void load_scale(const DecodeRows& rows, int slot, int place,
                                             int in_place, bool seen) {
    const int of_head = head + (params.heads_of_block == 1 ? 0 : slot / kDecodeKeys);
    const float* const scale = rows.scales + place * rows.scales_place_stride +
                               in_place * rows.scales_row_stride +
                               of_head * rows.scales_head_stride;
    const u32 there = shared_address(shared.scales(at.stage(), 0) + slot);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(there),
                 "l"(seen ? scale : rows.scales), "r"(seen ? 4 : 0)
                 : "memory");
  }

  // This thread arrives when all that it has asked for is there.
  __device__ __forceinline__ void arrive_behind_loads() {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared.full(at.stage()))
        : "memory");
  }

  // All producer threads: kThreadsOfRow of them a row, 16 bytes each. A warp has kRowsOfWarp rows
  // of a stage, whose places its lanes know.
  static constexpr int kThreadsOfRow = C::kHeadDim * C::kCacheBytes / 16;
  static constexpr int kRowsAtOnce = 32 / kThreadsOfRow;  // of a warp
  static constexpr int kRowsOfWarp = C::kStreams * kDecodeKeys / 4;
  static constexpr int kPasses = kRowsOfWarp / kRowsAtOnce;
  static constexpr int kUnrolled = C::kMixed ? 4 : 8;  // as many as registers allow
  static_assert(kRowsOfWarp <= 32, "a lane knows one row");

  // This lane's row of a stage whose first block is `block`: its block there, and its row in it.
  __device__ __forceinline__ int lane_row(const DecodeItem& item, int block) const {
    const int in_stage = threadIdx.x / 32 * kRowsOfWarp + threadIdx.x % 32;
    const int in_block =
        params.heads_of_block == 1 ? row_behind(item, in_stage) : in_stage % kDecodeKeys;
    return block * kDecodeKeys + in_block;
  }
  __device__ __forceinline__ int find_row(const DecodeItem& item, const CachePlaces& places,
                                          int block) const {
    const int row = lane_row(item, block);
    const bool seen = row >= item.low && row < min(item.high, item.end[1] * kDecodeKeys);
    return seen && threadIdx.x % 32 < kRowsOfWarp ? places.place(row) : -1;
  }

  // `offset`: where this lane's row begins, in bytes; `seen`: whether it is loaded at all.
  __device__ __forceinline__ void load_rows(const DecodeRows& rows, int columns, u64 offset,
                                            bool seen) {
    const int lane = threadIdx.x % 32, piece = lane % kThreadsOfRow;
    const u32 all_seen = __ballot_sync(0xffffffffu, seen);
    const bool filled = piece * 16 < columns * C::kCacheBytes;
    const char* const data = static_cast<const char*>(rows.data) + (filled ? piece * 16 : 0);
    const int of_lane = lane / kThreadsOfRow;  // of the rows of a pass
    constexpr int kPieces = C::kPanelBytes / 16;
    const u32 first_row = threadIdx.x / 32 * kRowsOfWarp + of_lane;
    const u32 tile = shared.tile(at.stage()) + piece / kPieces * (kDecodeKeys * C::kPanelBytes) +
                     first_row / kDecodeKeys * C::kBytesOfStream +
                     first_row % kDecodeKeys * C::kPanelBytes;
    mbarrier_wait(shared.empty(at.stage()), at.parity() ^ 1);
#pragma unroll kUnrolled
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsAtOnce + of_lane;  // of this warp
      const u64 begins = __shfl_sync(0xffffffffu, offset, row);
      const u32 destination = tile + pass * kRowsAtOnce * C::kPanelBytes +
                              ((piece ^ (kPieces == 8 ? row : row / 2)) & (kPieces - 1)) * 16;
      asm volatile(
          "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n"
          "@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(destination),
          "l"(data + begins), "r"(filled ? 16 : 0), "r"(all_seen >> row & 1)
          : "memory");
    }
  }

  // Where this lane's row begins, in bytes: a page of all layers' keys may be 64 GiB from another.
  __device__ __forceinline__ u64 offset_of(const DecodeRows& rows, int place, int in_place) const {
    const int of_head =
        head + (params.heads_of_block == 1
                    ? 0
                    : (threadIdx.x / 32 * kRowsOfWarp + threadIdx.x % 32) / kDecodeKeys);
    return static_cast<u64>(place * rows.place_stride + in_place * rows.row_stride +
                            of_head * rows.head_stride) *
           C::kCacheBytes;
  }

  // The rows of two stages are found ahead.
  __device__ __forceinline__ void load_each_row(const DecodeItem& item) {
    const CachePlaces places(params, item.batch);
    const int step = step_of(item);
    int place = find_row(item, places, item.begin[0]);
    int next = find_row(item, places, item.begin[0] + step);
#pragma unroll 1
    for (int block = item.begin[0]; block < item.end[0]; block += step) {
      const int after = find_row(item, places, block + 2 * step);
      const int in_place = places.row_in_place(lane_row(item, block));
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const DecodeRows& rows = i == 0 ? params.k : params.v;
        load_rows(rows, i == 0 ? params.head_dim : params.head_dim_v,
                  offset_of(rows, place, in_place), place >= 0);
        if constexpr (C::kMixed) {
          const int slot = threadIdx.x / 32 * kRowsOfWarp + threadIdx.x % 32;
          if (rows.scales != nullptr && threadIdx.x % 32 < kRowsOfWarp) {
            load_scale(rows, slot, place, in_place, place >= 0);
          }
        }
        arrive_behind_loads();
        at.advance();
      }
      place = next;
      next = after;
    }
  }
};

// The next item from where the second warp has left it; false when there are no more.
template <class C>
__device__ __forceinline__ bool take_item(const DecodeShared<C>& shared,
                                          RingPosition<kDecodeItemSlots>& at, DecodeItem& item,
                                          int& place) {
  mbarrier_wait(shared.item_full(at.stage()), at.parity());
  item = *shared.item(at.stage());
  place = shared.places(at.stage())[threadIdx.x % 32];
  __syncwarp();
  mbarrier_arrive_if(shared.item_empty(at.stage()), threadIdx.x == 0);
  at.advance();
  return item.batch >= 0;
}

// An item, or that there is none, to the consumers, and with its first places to the first warp.
template <class C>
__device__ __forceinline__ void hand_over(const DecodeShared<C>& shared,
                                          RingPosition<kDecodeItemSlots>& at, DecodeItem& item,
                                          bool found, int place) {
  mbarrier_wait(shared.item_empty(at.stage()), at.parity() ^ 1);
  if (C::kFindsAhead) shared.places(at.stage())[threadIdx.x % 32] = place;
  if (threadIdx.x == 32) {
    if (!found) item.batch = -1;
    *shared.item(at.stage()) = item;
  }
  __syncwarp();
  mbarrier_arrive_if(shared.item_full(at.stage()), threadIdx.x == 32);
  at.advance();
}

// A producer warp; the second one hands the items over, while the first one loads.
template <class C>
__device__ __forceinline__ void produce_items(const DecodeParams& params,
                                              const DecodeShared<C>& shared,
                                              DecodeSchedule& schedule, DecodeItem& item,
                                              bool found, int head, const EarlyPlaces& early) {
  DecodeProducer<C> producer{params, shared, head, early};
  RingPosition<kDecodeItemSlots> at;
  const bool is_ahead = finds_ahead<C>(params);
  const bool by_boxes = params.box_rows > 0;
  const int warp = uniform(threadIdx.x / 32);
  const bool loads_boxes = by_boxes && warp < params.copy_warps, takes = is_ahead && warp == 0;
  int place = 0;
  bool is_first = true;
  if (takes) {  // the first item, which it has found itself
    mbarrier_arrive_if(shared.item_empty(0), threadIdx.x == 0);
    at.advance();
  }
#pragma unroll 1
  while (true) {
    if (warp == 1) hand_over<C>(shared, at, item, found, place);
    if (!found) return;
    if (__builtin_expect(loads_boxes, 1)) {
      producer.load_boxes(item, place, takes && !is_first);
    } else if (!by_boxes) {
      producer.load_each_row(item);
    } else if (C::kMixed && threadIdx.x >= kFirstOfScales && has_scales(params)) {
      producer.load_scales(item);
    }
    if (takes) {
      found = take_item<C>(shared, at, item, place);
      is_first = false;
    } else {
      found = !params.in_clusters && schedule.next(item);
      if (found && is_ahead) place = producer.first_place(item);
    }
  }
}

}  // namespace jit_kernel::hopper
