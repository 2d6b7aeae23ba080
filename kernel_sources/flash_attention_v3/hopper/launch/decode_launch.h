// The host side of the decode kernels.
//
//   load_decode(image, is_bf16, mixed, head_dim, rows, device) -> handle; mixed: of an e4m3 cache
//   partial_floats(handle, device, heads_k, tiles, rows_k, sm_margin, fixed_ranges) -> room for
//   partial results; tiles: of all sequences
//   decode(handle, tensors..., scalars...) -> kLaunched, or why it was not
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "flash_attention_v3/hopper/decode/config.h"
#include "flash_attention_v3/hopper/decode/params.h"
#include "flash_attention_v3/hopper/launch/decode_scales.h"
#include "flash_attention_v3/hopper/launch/exports.h"
#include "flash_attention_v3/hopper/launch/prefill_launch.h"
#include "flash_attention_v3/hopper/launch/tensor_map.h"
#include "flash_attention_v3/hopper/launch/workspace.h"
#include "jit_kernel/cuda/kernel_table.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::hopper {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// Policies of the L2 cache, as createpolicy.fractional encodes them.
constexpr unsigned long long kReadOnce = 0x12F0000000000000ull;
constexpr unsigned long long kReadNormally = 0x1000000000000000ull;

// What the host must know of a variant.
struct DecodeShape {
  int head_dim, rows;
  bool mixed;  // of an e4m3 cache
  int streams, threads, shared_bytes, partial_floats;
  int panels, panel_columns, panel_bytes;  // of a row of the cache
  int shared_levels;                       // of ranges' results that are kept
};

template <int kHeadDim, int kRows, bool kMixed>
constexpr DecodeShape shape_of_decode() {
  using C = DecodeConfig<void, kHeadDim, kRows, kMixed>;
  return {kHeadDim,          kRows,           kMixed,
          C::kStreams,       C::kThreads,     C::kSharedBytes,
          C::kPartialFloats, C::kCachePanels, C::kCachePanel,
          C::kPanelBytes,    C::kSharedLevels};
}

constexpr DecodeShape kDecodeShapes[] = {
#define JIT_KERNEL_DECODE_SHAPE(head_dim, rows) \
  shape_of_decode<head_dim, rows, false>(), shape_of_decode<head_dim, rows, true>(),
    JIT_KERNEL_DECODE_TILES(JIT_KERNEL_DECODE_SHAPE)
#undef JIT_KERNEL_DECODE_SHAPE
};

struct DecodeVariant {
  DecodeVariant(const DecodeShape& shape, std::string image)
      : shape(shape),
        kernel(std::move(image), "decode", static_cast<unsigned>(shape.threads),
               static_cast<unsigned>(shape.shared_bytes)) {}
  const DecodeShape& shape;
  cuda::Kernel kernel;
};

// The variants that were loaded, for calls which no handle comes with: by device, dtype and shape.
class LoadedDecodes {
 public:
  // Null where none is loaded.
  static std::atomic<DecodeVariant*>& at(int device, bool is_bf16, const DecodeShape& shape) {
    static std::array<std::atomic<DecodeVariant*>, cuda::kMaxDevices * 2 * kShapes> all{};
    const auto place = static_cast<size_t>(&shape - kDecodeShapes);
    return all[(static_cast<size_t>(cuda::checked_device(device)) * 2 + is_bf16) * kShapes + place];
  }

 private:
  static constexpr size_t kShapes = std::size(kDecodeShapes);
};

inline int64_t load_decode(tvm::ffi::Bytes image, bool is_bf16, bool mixed, int64_t head_dim,
                           int64_t rows, int64_t device) {
  for (const DecodeShape& shape : kDecodeShapes) {
    if (shape.head_dim == head_dim && shape.rows == rows && shape.mixed == mixed) {
      auto variant = std::make_unique<DecodeVariant>(shape, std::string(image));
      DecodeVariant* const known = variant.get();
      const int64_t handle = cuda::KernelTable<DecodeVariant>::get().add(std::move(variant));
      LoadedDecodes::at(static_cast<int>(device), is_bf16, shape)
          .store(known, std::memory_order_release);
      return handle;
    }
  }
  TVM_FFI_THROW(ValueError) << "no decode kernel has head size " << head_dim << " and " << rows
                            << " rows";
}

// floor(value / n) for 0 <= value < 2^31 is 2 value * multiplier / 2^(32 + shift).
struct Division {
  explicit Division(int64_t n) {
    while (int64_t{1} << shift < n) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier =
        static_cast<unsigned>((power + static_cast<uint64_t>(n) - 1) / static_cast<uint64_t>(n));
  }
  unsigned multiplier, shift = 0;
};

// How the work is laid out: key heads of a thread block, and thread blocks for each of them.
struct DecodeGrid {
  int heads_of_block, parts;
  bool in_clusters;
};

// A longer table's rest is never reached: lengths are 32-bit numbers.
constexpr int64_t kMostRows = 1 << 30;

// A cluster is worth it up to so many rows of the cache for each one: 1 x 32k with 8 heads took 46
// us in 8 clusters and 50 without.
constexpr int64_t kRowsOfCluster = 4096;

// The ranges that sequences are cut into where a call asks for the same bits whatever else is in
// the batch: by what every call of a model has in common.
struct DecodeRanges {
  int most_log2 = 0;  // of a short sequence, to base 2; 0: the call did not ask
  int blocks = 1;     // a range has at least so many, but for the halves of a short sequence

  DecodeRanges() = default;
  DecodeRanges(const DecodeShape& shape, int64_t heads_k) {
    // A short sequence that is alone gives 64 blocks of two heads each a range, a long one 128.
    most_log2 = heads_k >= 8 ? 4 : heads_k >= 4 ? 5 : 6;
    blocks = shape.head_dim <= 128 ? 2 : 1;  // of 128, 1 costs lognormal lengths 1.2 % more
  }
  // Of a sequence of the longest cache: how many, to base 2.
  int log2_of(int64_t rows_k) const {
    const int64_t longest = (rows_k + kDecodeKeys - 1) / kDecodeKeys;
    const int64_t most = std::max(longest / blocks, std::min<int64_t>(longest, 2));
    int log2 = 0;
    while (log2 < most_log2 + (longest > kBlocksOfShort) && int64_t{2} << log2 <= most) ++log2;
    return log2;
  }
};

// Runs that the work of all sequences is cut into: up to 4 % less than `parts` where sequences of
// one length are then not cut, or cut evenly.
inline int even_parts(int64_t parts, int64_t batch) {
  int64_t even = parts;
  if (batch >= parts) {
    while (batch % even != 0) --even;
  } else if (batch > 0) {
    even = parts / batch * batch;
  }
  return static_cast<int>(even * 100 >= parts * 96 ? even : parts);
}

// As many thread blocks as run at the same time, but up to 4 % less where sequences of one length
// are then not cut: to write and merge partial results costs more. Two heads a block read longer
// rows of memory; of little work each head's blocks are many, and fewer parts are merged sooner.
inline DecodeGrid decode_grid(const DecodeShape& shape, int device, int64_t heads_k, int64_t batch,
                              int64_t rows_k, int64_t sm_margin, bool fixed_ranges) {
  // Of 132 multiprocessors 15 clusters of 8 run at the same time. One that has long to read would
  // leave most of the machine idle.
  const int64_t clusters = heads_k * batch;
  const bool pairs = shape.streams == 2 && heads_k % 2 == 0;
  // A cluster's streams have a range each, and a block joins two of a tree, but not two of a chain.
  const int of_block = shape.rows > kRowsOfTree ? 1 : shape.streams;
  const bool fits = !fixed_ranges ||
                    1 << DecodeRanges(shape, heads_k).log2_of(rows_k) <= of_block * kClusterParts;
  if (fits && clusters >= 4 &&
      clusters * (kClusterParts + 1) <= cuda::multiprocessors(device) - sm_margin &&
      rows_k <= clusters * kRowsOfCluster) {
    return {1, kClusterParts, true};
  }
  const int64_t most = std::max<int64_t>(1, cuda::multiprocessors(device) - sm_margin);
  const bool two = pairs && 2 * batch * heads_k >= 3 * most;
  const int64_t groups = two ? heads_k / 2 : heads_k;
  const int64_t parts = std::max<int64_t>(1, most / groups);
  return {two ? 2 : 1, even_parts(parts, batch), false};
}

// Fixed ranges in memory: slots of a sequence, whether streams have halves, and the levels that
// each stream keeps there.
struct RangeRoom {
  int slots = 0;
  bool halves = false;
  int kept_levels = 0;

  static RangeRoom of(const DecodeShape& shape, const DecodeGrid& grid, int64_t heads_k,
                      int64_t rows_k) {
    const int log2 = DecodeRanges(shape, heads_k).log2_of(rows_k);
    const bool halves = shape.streams == 2 && grid.heads_of_block == 1 && !grid.in_clusters;
    return {1 << log2, halves, std::max(0, log2 - halves - shape.shared_levels)};
  }
  // Of each key head: two for a part, or, of fixed ranges, one for each of a sequence that several
  // parts share, of which no more than one begins in a part, and what the parts' streams keep.
  int64_t partials_of_head(int64_t parts, int64_t batch) const {
    if (slots == 0) return kPartialsPerBlock * parts;
    return std::min(batch, parts) * slots + parts * (halves ? 2 : 1) * kept_levels;
  }
};

inline int64_t partial_floats(int64_t handle, int64_t device, int64_t heads_k, int64_t tiles,
                              int64_t rows_k, int64_t sm_margin, bool fixed_ranges) {
  const DecodeShape& shape = cuda::KernelTable<DecodeVariant>::get().at(handle).shape;
  const DecodeGrid grid =
      decode_grid(shape, static_cast<int>(device), heads_k, tiles, rows_k, sm_margin, fixed_ranges);
  const RangeRoom room =
      fixed_ranges ? RangeRoom::of(shape, grid, heads_k, std::min(rows_k, kMostRows)) : RangeRoom{};
  return room.partials_of_head(grid.parts, tiles) * heads_k * shape.partial_floats;
}

// Rows that the copy engine takes at a time: the most that divide a page and a block, at least the
// 8 of a swizzle; 0 where there are none.
inline int box_rows_of(int64_t place_rows, bool paged) {
  if (!paged) return kDecodeKeys;
  const int64_t rows = std::gcd<int64_t>(place_rows, kDecodeKeys);
  return rows >= 8 ? static_cast<int>(rows) : 0;
}

// Panels of a box: of both heads of a block, of one, or one alone. More than one only where a box
// is a block and the head size is whole panels.
inline int box_panels_of(const TensorView& x, const DecodeShape& shape, int box_rows,
                         int heads_of_block) {
  if (box_rows != kDecodeKeys || x.size(3) != shape.head_dim) return 1;
  const bool both = heads_of_block == 2 && x.stride(2) == shape.head_dim;
  return both ? 2 * shape.panels : shape.panels;
}

// Keys or values of a cache (place, row, head, column).
inline void set_cache_rows(DecodeRows& rows, const TensorView& x, int box_rows, int box_panels,
                           const DecodeShape& shape) {
  rows.data = cuda::data_of(x);
  rows.place_stride = x.stride(0);
  rows.row_stride = x.stride(1);
  rows.head_stride = x.stride(2);
  if (box_rows == 0) return;
  static EncodeTiled* const encode = cuda::driver_function<EncodeTiled>("cuTensorMapEncodeTiled");
  const ByteStrides strides(x);
  const bool whole = box_panels > 1, joined = box_panels > shape.panels;
  const uint64_t columns = static_cast<uint64_t>(x.size(3)),
                 heads = static_cast<uint64_t>(x.size(2));
  const uint64_t of_head = whole ? static_cast<uint64_t>(shape.panels) : 1;
  const uint64_t of_panel = static_cast<uint64_t>(shape.panel_columns);
  const uint64_t sizes[kRank] = {whole ? of_panel : columns, static_cast<uint64_t>(x.size(1)),
                                 joined ? of_head * heads : of_head, joined ? 1 : heads,
                                 static_cast<uint64_t>(x.size(0))};
  const uint64_t steps[kRank - 1] = {
      static_cast<uint64_t>(strides.row), static_cast<uint64_t>(shape.panel_bytes),
      static_cast<uint64_t>(strides.head), static_cast<uint64_t>(strides.batch)};
  const uint32_t box[kRank] = {static_cast<uint32_t>(of_panel), static_cast<uint32_t>(box_rows),
                               static_cast<uint32_t>(box_panels), 1, 1};
  const uint32_t every[kRank] = {1, 1, 1, 1, 1};
  const int type = shape.mixed ? kUint8 : x.dtype().code == kDLBfloat ? kBfloat16 : kFloat16;
  cuda::check(encode(&rows.map, type, kRank, cuda::data_of(x), sizes, steps, box, every, 0,
                     shape.panel_bytes == 128 ? kSwizzle128 : kSwizzle64, kPromote128, 0),
              "cuTensorMapEncodeTiled");
}

inline void set_decode_tensors(DecodeParams& params, const DecodeShape& shape, const TensorView& q,
                               const TensorView& k, const TensorView& v, const TensorView& out,
                               bool ragged, bool paged) {
  params.q = cuda::data_of(q);
  params.q_is_e4m3 = q.dtype().bits == 8;
  params.out = cuda::data_of(out);
  params.q_batch_stride = ragged ? 0 : q.stride(0);
  params.out_batch_stride = ragged ? 0 : out.stride(0);
  params.q_row_stride = q.stride(q.ndim() - 3);
  params.out_row_stride = out.stride(out.ndim() - 3);
  params.q_head_stride = q.stride(q.ndim() - 2);
  params.out_head_stride = out.stride(out.ndim() - 2);
  params.seqlen_q = static_cast<int>(q.size(q.ndim() - 3));
  params.heads_k = static_cast<int>(k.size(2));
  params.group = static_cast<int>(q.size(q.ndim() - 2)) / params.heads_k;
  params.head_dim = static_cast<int>(q.size(q.ndim() - 1));
  params.head_dim_v = static_cast<int>(v.size(3));
  params.place_rows = static_cast<int>(k.size(1));
  const Division group(params.group), place(std::max(1, params.place_rows));
  params.group_multiplier = group.multiplier;
  params.group_shift = group.shift;
  params.place_multiplier = place.multiplier;
  params.place_shift = place.shift;
  const bool empty = k.size(0) * k.size(1) == 0;  // no tensor map has such sizes
  params.box_rows = empty ? 0 : box_rows_of(params.place_rows, paged);
  // One number for both: a head size is padded in both or in neither, or panel by panel.
  params.box_panels = std::min(box_panels_of(k, shape, params.box_rows, params.heads_of_block),
                               box_panels_of(v, shape, params.box_rows, params.heads_of_block));
  if (params.box_rows > 0) {
    const int blocks = params.heads_of_block == 1 ? shape.streams : 1;
    while (params.box_rows << params.boxes_log2 < blocks * kDecodeKeys) ++params.boxes_log2;
    params.copies = (shape.panels * params.heads_of_block / params.box_panels) << params.boxes_log2;
    // Scales of tokens take two of the producer's four warps.
    params.copy_warps = params.copies <= 4 ? 1 : params.k.scales || params.v.scales ? 2 : 4;
  }
  set_cache_rows(params.k, k, params.box_rows, params.box_panels, shape);
  set_cache_rows(params.v, v, params.box_rows, params.box_panels, shape);
}

// An infinite factor would make no number of a difference of 0.
inline float as_finite(double factor) {
  return static_cast<float>(std::min<double>(factor, std::numeric_limits<float>::max()));
}

inline void set_decode_scores(DecodeParams& params, double softmax_scale, double softcap,
                              int64_t left, int64_t right, int64_t chunk) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr int kUnbounded = 1 << 30;
  params.scale_log2 = as_finite((softcap > 0 ? softcap : softmax_scale) * kLog2E);
  params.softcap_scale = softcap > 0 ? as_finite(softmax_scale / softcap) : 0.f;
  params.window_left = left < 0 || left > kUnbounded ? kUnbounded : static_cast<int>(left);
  params.window_right = right < 0 || right > kUnbounded ? kUnbounded : static_cast<int>(right);
  if (chunk <= 0) return;
  params.chunk = static_cast<int>(std::min<int64_t>(chunk, kUnbounded));
  const Division division(params.chunk);
  params.chunk_multiplier = division.multiplier;
  params.chunk_shift = division.shift;
}

// What decode answers: not launched where a row does not start at a multiple of 16 bytes, and not
// without room for partial results where the stream is being captured.
constexpr int64_t kUnaligned = 0, kLaunched = 1, kNeedsRoom = 2;

// A checked call, as `decode` takes it.
struct DecodeCall {
  TensorView q, k, v, out;
  Optional<TensorView> lse, cu_seqlens_q, seqused_q, seqused_k, cu_seqlens_k_new, page_table,
      cache_batch_idx, cache_leftpad, draft_mask, sinks, partials;
  Optional<TensorView> q_descale, k_descale, v_descale, k_scale, v_scale;  // of what is in e4m3
  int64_t new_rows;
  double softmax_scale, softcap;
  int64_t left, right, chunk, sm_margin;
  bool clear_rest, fixed_ranges;
  int64_t tiles;  // of query tokens that a sequence is cut into

  bool is_aligned() const {
    return hopper::is_aligned(q) && hopper::is_aligned(k) && hopper::is_aligned(v) &&
           hopper::is_aligned(out);
  }
};

inline void set_decode_grid(DecodeParams& params, const DecodeShape& shape, const DecodeCall& call,
                            int device) {
  const bool ragged = call.cu_seqlens_q.has_value();
  params.batch = static_cast<int>(ragged ? call.cu_seqlens_q.value().size(0) - 1 : call.q.size(0));
  params.tiles = static_cast<int>(call.tiles);
  params.all_tiles = params.batch * params.tiles;
  const int64_t group = call.q.size(call.q.ndim() - 2) / call.k.size(2);
  params.tile_tokens = static_cast<int>(shape.rows / std::max<int64_t>(1, group));
  const Division tiles(params.tiles);
  params.tiles_multiplier = tiles.multiplier;
  params.tiles_shift = tiles.shift;
  int64_t rows_k = call.k.size(1);
  if (call.page_table.has_value()) {
    params.page_table_stride = call.page_table.value().stride(0);
    rows_k *= call.page_table.value().size(1);
  }
  params.rows_k = static_cast<int>(std::min(rows_k, kMostRows));
  const int64_t heads_k = call.k.size(2);
  const DecodeGrid grid = decode_grid(shape, device, heads_k, params.all_tiles, params.rows_k,
                                      call.sm_margin, call.fixed_ranges);
  params.heads_of_block = grid.heads_of_block;
  params.parts = grid.parts;
  params.in_clusters = grid.in_clusters;
  if (call.fixed_ranges) {
    const DecodeRanges ranges(shape, heads_k);
    params.ranges_log2 = ranges.most_log2;
    params.range_blocks = ranges.blocks;
    const RangeRoom room = RangeRoom::of(shape, grid, heads_k, params.rows_k);
    params.range_slots = room.slots;
    params.halves = room.halves;
    params.kept_levels = room.kept_levels;
    params.first_kept = std::min(params.all_tiles, params.parts) * room.slots;
  }
  // What a short launch reads should not push out what others wrote: 1 to 2 us of 1 x 8k. It costs
  // long ones 2 to 3 %.
  params.policy = grid.in_clusters ? kReadOnce : kReadNormally;
  const Division parts(grid.parts);
  params.parts_multiplier = parts.multiplier;
  params.parts_shift = parts.shift;
}

inline void set_decode_indices(DecodeParams& params, const DecodeCall& call) {
  params.lse = cuda::data_of<float>(call.lse);
  if (params.lse != nullptr) {
    const TensorView& tensor = call.lse.value();
    params.lse_batch_stride = tensor.ndim() == 3 ? tensor.stride(0) : 0;
    params.lse_head_stride = tensor.stride(tensor.ndim() - 2);
  }
  params.sinks = cuda::data_of<void>(call.sinks);
  params.sinks_are_elements = call.sinks.has_value() && call.sinks.value().dtype().bits == 16;
  params.cu_seqlens_q = cuda::data_of<int>(call.cu_seqlens_q);
  params.seqused_q = cuda::data_of<int>(call.seqused_q);
  params.seqused_k = cuda::data_of<int>(call.seqused_k);
  params.cu_seqlens_k_new = cuda::data_of<int>(call.cu_seqlens_k_new);
  params.page_table = cuda::data_of<int>(call.page_table);
  params.cache_batch_idx = cuda::data_of<int>(call.cache_batch_idx);
  params.cache_leftpad = cuda::data_of<int>(call.cache_leftpad);
  params.draft_mask = cuda::data_of<int>(call.draft_mask);
  if (call.draft_mask.has_value()) {
    params.draft_mask_stride = call.draft_mask.value().stride(0);
    params.draft_words = static_cast<int>(call.draft_mask.value().size(1));
  }
  params.new_rows = static_cast<int>(call.new_rows);
  params.clear_rest = call.clear_rest;
}

// kLaunched or kNeedsRoom.
inline int64_t launch_decode(DecodeVariant& variant, const DecodeCall& call) {
  const int device = cuda::checked_device(call.q.device().device_id);
  const cuda::ContextGuard context(device);
  DecodeParams params = {};
  set_decode_grid(params, variant.shape, call, device);
  set_q_descale(params, call.q_descale);
  set_scales(params.k, call.k_descale, call.k_scale);
  set_scales(params.v, call.v_descale, call.v_scale);
  set_decode_tensors(params, variant.shape, call.q, call.k, call.v, call.out,
                     call.cu_seqlens_q.has_value(), call.page_table.has_value());
  set_decode_scores(params, call.softmax_scale, call.softcap, call.left, call.right, call.chunk);
  set_decode_indices(params, call);
  if ((params.parts > 1 || params.kept_levels > 0) && !params.in_clusters) {
    const int counters = params.parts * params.heads_k;
    const RangeRoom room = {params.range_slots, params.halves, params.kept_levels};
    const int64_t floats = room.partials_of_head(params.parts, params.all_tiles) * params.heads_k *
                           variant.shape.partial_floats;
    const Workspace::Memory memory = Workspace::of(device).memory(
        cuda::current_stream(device), counters, floats, call.partials.has_value());
    params.counters = memory.counters;
    params.partials =
        call.partials.has_value() ? cuda::data_of<float>(call.partials) : memory.partials;
    if (params.partials == nullptr) return kNeedsRoom;
  }
  void* arguments[] = {&params};
  const unsigned groups = static_cast<unsigned>(params.heads_k / params.heads_of_block);
  const unsigned parts_of_head = static_cast<unsigned>(params.parts);
  const cuda::Grid grid = params.in_clusters ? cuda::Grid{parts_of_head, groups,
                                                          static_cast<unsigned>(params.all_tiles)}
                                             : cuda::Grid{groups, parts_of_head};
  variant.kernel.launch_overlapped(device, grid, params.in_clusters ? kClusterParts : 1u,
                                   arguments);
  return kLaunched;
}

// Shapes, dtypes and devices have been checked. if_aligned: addresses and strides have not.
inline int64_t decode(int64_t handle, TensorView q, TensorView k, TensorView v, TensorView out,
                      Optional<TensorView> lse, Optional<TensorView> cu_seqlens_q,
                      Optional<TensorView> seqused_q, Optional<TensorView> seqused_k,
                      Optional<TensorView> cu_seqlens_k_new, Optional<TensorView> page_table,
                      Optional<TensorView> cache_batch_idx, Optional<TensorView> cache_leftpad,
                      Optional<TensorView> sinks, Optional<TensorView> draft_mask,
                      Optional<TensorView> q_descale, Optional<TensorView> k_descale,
                      Optional<TensorView> v_descale, Optional<TensorView> k_scale,
                      Optional<TensorView> v_scale, Optional<TensorView> partials, int64_t new_rows,
                      double softmax_scale, double softcap, int64_t left, int64_t right,
                      int64_t chunk, int64_t sm_margin, bool clear_rest, bool fixed_ranges,
                      int64_t tiles, bool if_aligned) {
  const DecodeCall call = {q,
                           k,
                           v,
                           out,
                           lse,
                           cu_seqlens_q,
                           seqused_q,
                           seqused_k,
                           cu_seqlens_k_new,
                           page_table,
                           cache_batch_idx,
                           cache_leftpad,
                           draft_mask,
                           sinks,
                           partials,
                           q_descale,
                           k_descale,
                           v_descale,
                           k_scale,
                           v_scale,
                           new_rows,
                           softmax_scale,
                           softcap,
                           left,
                           right,
                           chunk,
                           sm_margin,
                           clear_rest,
                           fixed_ranges,
                           tiles};
  if (if_aligned && !call.is_aligned()) return kUnaligned;
  return launch_decode(cuda::KernelTable<DecodeVariant>::get().at(handle), call);
}

}  // namespace jit_kernel::hopper

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_decode, jit_kernel::hopper::load_decode);
JIT_KERNEL_EXPORT_CALL(partial_floats, jit_kernel::hopper::partial_floats)
JIT_KERNEL_EXPORT_CALL(decode, jit_kernel::hopper::decode)
