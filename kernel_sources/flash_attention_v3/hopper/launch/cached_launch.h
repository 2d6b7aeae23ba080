// Launches the prefill kernels on cached keys, in pages or dense; cached_params.h says how rows of
// a cache are numbered.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "flash_attention_v3/hopper/launch/arrivals.h"
#include "flash_attention_v3/hopper/launch/prefill_launch.h"
#include "flash_attention_v3/hopper/prefill/cached_params.h"

namespace jit_kernel::hopper {

constexpr int kRowsOfWarp = 16;
constexpr int kSwizzleRows = 8;  // a box begins and ends at a multiple of the swizzle's period

// The call's index tensors, each absent where the call has none.
struct CacheIndices {
  Optional<TensorView> page_table, cu_seqlens_q, seqused_q, seqused_k, cu_seqlens_k_new,
      cache_batch_idx, cache_leftpad;
};

// The query heads of a group lie in one tile, token by token, where a warpgroup's rows are a whole
// number of tokens. Not by the lengths: the bits of a sequence must not depend on its neighbours.
inline int pack_shift_of(int group) {
  int shift = 0;
  while (1 << shift < group) ++shift;
  return 1 << shift == group && group <= kRowsPerWarpgroup ? shift : 0;
}

// Dimensions (column, head of the tile, token, tile of heads, batch entry).
inline void encode_queries(CachedParams& params, const Shape& shape, const TensorView& q) {
  const ByteStrides strides(q);
  const int64_t pack = int64_t{1} << params.pack_shift;
  const uint64_t sizes[kRank] = {
      static_cast<uint64_t>(q.size(q.ndim() - 1)), static_cast<uint64_t>(pack),
      static_cast<uint64_t>(params.seqlen_q), static_cast<uint64_t>(params.heads_q / pack),
      static_cast<uint64_t>(q.ndim() == 4 ? q.size(0) : 1)};
  const uint64_t steps[kRank - 1] = {static_cast<uint64_t>(strides.head),
                                     static_cast<uint64_t>(strides.row),
                                     static_cast<uint64_t>(strides.head * pack),
                                     static_cast<uint64_t>(q.ndim() == 4 ? strides.batch : 16)};
  const uint32_t box[kRank] = {static_cast<uint32_t>(shape.panel), static_cast<uint32_t>(pack),
                               static_cast<uint32_t>(kRowsPerWarpgroup / pack), 1, 1};
  encode_tiled(params.q.map, q, data_of(q), sizes, steps, box);
}

// Dimensions (column, row of a page, head, page, one more). An empty cache has no row that is read.
inline void encode_pages(TensorMap& map, const TensorView& x, int panel, int box_rows,
                         const TensorView& stand_in) {
  const ByteStrides strides(x);
  const auto size = [&](int i) { return static_cast<uint64_t>(std::max<int64_t>(1, x.size(i))); };
  const uint64_t sizes[kRank] = {size(3), size(1), size(2), size(0), 1};
  const uint64_t steps[kRank - 1] = {static_cast<uint64_t>(strides.row),
                                     static_cast<uint64_t>(strides.head),
                                     static_cast<uint64_t>(strides.batch), 16};
  const uint32_t box[kRank] = {static_cast<uint32_t>(panel), static_cast<uint32_t>(box_rows), 1, 1,
                               1};
  const bool empty = x.size(0) * x.size(1) == 0;
  encode_tiled(map, x, empty ? data_of(stand_in) : data_of(x), sizes, steps, box);
}

inline CacheRows cache_rows(const TensorView& x) {
  const ByteStrides strides(x);
  return {static_cast<const char*>(data_of(x)), strides.batch, strides.row, strides.head,
          static_cast<int>(x.size(3))};
}

inline void set_cache(CachedParams& params, const Shape& shape, const TensorView& q,
                      const TensorView& k, const TensorView& v, const CacheIndices& indices) {
  params.page_table = data_of<int>(indices.page_table);
  params.page_size = static_cast<int>(k.size(1));
  int64_t capacity = k.size(0) > 0 ? k.size(1) : 0;
  if (params.page_table != nullptr) {
    const TensorView& table = indices.page_table.value();
    params.table_stride = table.stride(0);
    capacity *= table.size(1);
    set_divisor(params.page_size, params.page_multiplier, params.page_shift);
    params.box_rows = std::gcd(params.page_size, shape.keys);
    if (params.box_rows % kSwizzleRows != 0) params.box_rows = 0;
  } else {
    params.box_rows = shape.keys;
  }
  params.capacity = static_cast<int>(std::min<int64_t>(capacity, kUnbounded));
  if (params.box_rows == 0) {
    params.k_rows = cache_rows(k);
    params.v_rows = cache_rows(v);
    return;
  }
  params.boxes = shape.keys / params.box_rows;
  encode_pages(params.k.map, k, shape.panel, params.box_rows, q);
  encode_pages(params.v.map, v, shape.panel_v, params.box_rows, q);
}

inline void set_call(CachedParams& params, const Shape& shape, const TensorView& q,
                     const TensorView& k, const TensorView& v, const TensorView& out,
                     const CacheIndices& indices) {
  const bool ragged = indices.cu_seqlens_q.has_value();
  params.batch = static_cast<int>(ragged ? indices.cu_seqlens_q.value().size(0) - 1 : q.size(0));
  params.seqlen_q = static_cast<int>(q.size(q.ndim() - 3));
  params.heads_q = static_cast<int>(q.size(q.ndim() - 2));
  params.group = params.heads_q / static_cast<int>(k.size(2));
  params.pack_shift = pack_shift_of(params.group);
  params.head_dim_v = static_cast<int>(v.size(3));
  params.out = data_of(out);
  params.out_batch_stride = ragged ? 0 : out.stride(0);
  params.out_row_stride = out.stride(out.ndim() - 3);
  params.out_head_stride = out.stride(out.ndim() - 2);
  params.cu_seqlens_q = data_of<int>(indices.cu_seqlens_q);
  params.seqused_q = data_of<int>(indices.seqused_q);
  params.seqused_k = data_of<int>(indices.seqused_k);
  params.cu_seqlens_k_new = data_of<int>(indices.cu_seqlens_k_new);
  params.cache_batch_idx = data_of<int>(indices.cache_batch_idx);
  params.cache_leftpad = data_of<int>(indices.cache_leftpad);
  params.l2_tokens = l2_tokens_of(shape, q.size(q.ndim() - 1) + params.head_dim_v);
  encode_queries(params, shape, q);
}

inline void set_drafts(CachedParams& params, const Optional<TensorView>& draft_mask) {
  if (!draft_mask.has_value()) return;
  params.draft_mask = data_of<int>(draft_mask);
  params.draft_mask_stride = draft_mask.value().stride(0);
  params.draft_words = static_cast<int>(draft_mask.value().size(1));
}

// The memory of parts that keys are cut into, where the caller gave some, and counters for them.
// Returns how many parts a tile may have.
inline int64_t set_parts(CachedParams& params, const Shape& shape, int64_t num_splits,
                         const Optional<TensorView>& scratch, int device) {
  if (num_splits == 1 || !scratch.has_value()) {
    params.num_splits = 1;
    return 1;
  }
  const int64_t columns = (shape.head_dim_v + kPartStateColumns) * static_cast<int64_t>(shape.rows);
  params.num_splits = static_cast<int>(num_splits);
  params.parts = data_of<float>(scratch);
  params.most_parts =
      static_cast<int>(std::min<int64_t>(scratch.value().size(0) / columns, kUnbounded));
  // Tiles that do not fit into the memory with all of their parts are not cut.
  const int64_t tiles = params.most_parts / std::max<int64_t>(2, num_splits) + 1;
  params.arrivals = ArrivalPool::of(device).counters(cuda::current_stream(device),
                                                     tiles * shape.rows / kRowsOfWarp);
  return num_splits > 0 ? num_splits : std::max<int64_t>(1, params.capacity / kLeastKeysOfPart);
}

// What a call on a cache has beside its tensors.
struct CachedScalars {
  int64_t num_splits, new_rows;
  CallScalars call;
};

// The kernel's arguments but for what belongs to the launch itself.
inline void set_arguments(CachedParams& params, const Shape& shape, const TensorView& q,
                          const TensorView& k, const TensorView& v, const TensorView& out,
                          const Optional<TensorView>& lse, const CacheIndices& indices,
                          const Optional<TensorView>& sinks, const Optional<TensorView>& draft_mask,
                          const CachedScalars& scalars) {
  const CallScalars& call = scalars.call;
  set_call(params, shape, q, k, v, out, indices);
  set_cache(params, shape, q, k, v, indices);
  set_drafts(params, draft_mask);
  set_lse(params, lse);
  set_scores(params, call.softmax_scale, call.softcap, call.left, call.right, call.chunk);
  params.seqlen_k_new = static_cast<int>(scalars.new_rows);
  set_sinks(params, sinks);
  params.clear_rest = call.clear_rest;
}

// overlapped: the kernel before is one that lets this one start early.
inline void launch_cached(Variant& variant, CachedParams& params,
                          const Optional<TensorView>& scratch, const CachedScalars& scalars,
                          int device, bool overlapped) {
  params.progress = ProgressPool::of(device).counters(cuda::current_stream(device));
  void* arguments[] = {&params};
  const int64_t parts = set_parts(params, variant.shape, scalars.num_splits, scratch, device);
  const unsigned grid =
      grid_of(params, variant.shape, params.pack_shift, parts, device, scalars.call.sm_margin);
  if (overlapped) {
    variant.kernel.launch_overlapped(device, {grid}, 1, arguments);
  } else {
    variant.kernel.launch(device, {grid}, arguments);
  }
}

// As `forward`, on a cache: k and v are (pages, page_size, heads, columns) with page_table, else
// one page a batch entry. New keys of new_rows tokens, or of cu_seqlens_k_new, lie in it
// already.
inline bool forward_cached(int64_t handle, TensorView q, TensorView k, TensorView v, TensorView out,
                           Optional<TensorView> lse, Optional<TensorView> cu_seqlens_q,
                           Optional<TensorView> seqused_q, Optional<TensorView> seqused_k,
                           Optional<TensorView> cu_seqlens_k_new, Optional<TensorView> page_table,
                           Optional<TensorView> cache_batch_idx, Optional<TensorView> cache_leftpad,
                           Optional<TensorView> sinks, Optional<TensorView> draft_mask,
                           Optional<TensorView> scratch, int64_t num_splits, int64_t new_rows,
                           double softmax_scale, double softcap, int64_t left, int64_t right,
                           int64_t chunk, int64_t sm_margin, bool clear_rest, bool if_aligned) {
  if (if_aligned && !(is_aligned(q) && is_aligned(k) && is_aligned(v) && is_aligned(out))) {
    return false;
  }
  Variant& variant = cuda::KernelTable<Variant>::get().at(handle);
  const int device = cuda::checked_device(q.device().device_id);
  const cuda::ContextGuard context(device);
  const CacheIndices indices = {page_table,       cu_seqlens_q,    seqused_q,    seqused_k,
                                cu_seqlens_k_new, cache_batch_idx, cache_leftpad};
  const CachedScalars scalars = {
      num_splits, new_rows, {softmax_scale, softcap, left, right, chunk, sm_margin, clear_rest}};
  CachedParams params = {};
  set_arguments(params, variant.shape, q, k, v, out, lse, indices, sinks, draft_mask, scalars);
  launch_cached(variant, params, scratch, scalars, device, false);
  return true;
}

}  // namespace jit_kernel::hopper
