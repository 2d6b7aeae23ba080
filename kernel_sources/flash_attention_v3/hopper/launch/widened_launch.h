// Launches prefill on a cache in e4m3: a kernel that widens the rows of the call's sequences, and
// the prefill kernel on what it wrote.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>

#include "flash_attention_v3/hopper/launch/append_launch.h"
#include "flash_attention_v3/hopper/launch/cached_launch.h"
#include "flash_attention_v3/hopper/widen/params.h"

namespace jit_kernel::hopper {

inline WidenPart widen_part(const TensorView& cache, const TensorView& wide) {
  return {cache_rows(cache), static_cast<char*>(data_of(wide)),
          divisor_of(cache.size(3) / kWidenPieceElements)};
}

// `widen` becomes what the kernel that widens takes; of `attention`, on the widened rows.
inline void set_widen(WidenParams& widen, const CachedParams& attention, const TensorView& k,
                      const CacheIndices& indices) {
  static_cast<CachedParams&>(widen) = attention;
  widen.page_table = data_of<int>(indices.page_table);
  widen.cache_batch_idx = data_of<int>(indices.cache_batch_idx);
  widen.heads = divisor_of(k.size(2));
  widen.pages = static_cast<int>(k.size(1) > 0 ? k.size(0) : 0);
  widen.page_size = static_cast<int>(k.size(1));
  if (widen.page_table == nullptr) return;
  widen.table_stride = indices.page_table.value().stride(0);
  set_divisor(widen.page_size, widen.page_multiplier, widen.page_shift);
}

inline void launch_widen(int64_t handle, WidenParams& widen, int device) {
  int64_t pieces = 0;
  for (const WidenPart& part : widen.parts) {
    pieces = std::max<int64_t>(pieces, part.pieces.divisor);
  }
  pieces *= static_cast<int64_t>(widen.capacity) * widen.heads.divisor;
  if (pieces > kMostItems) {
    TVM_FFI_THROW(ValueError) << "a sequence of the cache has " << pieces << " pieces of "
                              << kWidenPieceElements << " elements; it must have at most "
                              << kMostItems;
  }
  constexpr int64_t kOfBlock = kWidenThreads * kWidenPieces;
  const auto blocks =
      static_cast<unsigned>(std::max<int64_t>(1, (pieces + kOfBlock - 1) / kOfBlock));
  void* arguments[] = {&widen};
  cuda::KernelTable<cuda::Kernel>::get().at(handle).launch_overlapped(
      device, {blocks, static_cast<unsigned>(widen.batch), 2}, 1, arguments);
}

// As `forward_cached`, with k and v in e4m3 and q in 16 bits. wide_k, wide_v: (batch, rows, heads,
// columns) without gaps, of q's dtype, where a sequence's rows up to its last key have room; table:
// room for TileFactors of each sequence and key head. Sequences have at least one query token.
inline bool forward_widened(int64_t handle, int64_t widen_handle, TensorView q, TensorView k,
                            TensorView v, TensorView out, Optional<TensorView> lse,
                            Optional<TensorView> cu_seqlens_q, Optional<TensorView> seqused_q,
                            Optional<TensorView> seqused_k, Optional<TensorView> cu_seqlens_k_new,
                            Optional<TensorView> page_table, Optional<TensorView> cache_batch_idx,
                            Optional<TensorView> cache_leftpad, Optional<TensorView> sinks,
                            Optional<TensorView> draft_mask, Optional<TensorView> q_descale,
                            Optional<TensorView> k_descale, Optional<TensorView> v_descale,
                            TensorView wide_k, TensorView wide_v, TensorView table,
                            Optional<TensorView> scratch, int64_t num_splits, int64_t new_rows,
                            double softmax_scale, double softcap, int64_t left, int64_t right,
                            int64_t chunk, int64_t sm_margin, bool clear_rest, bool if_aligned) {
  if (if_aligned && !(is_aligned(q) && is_aligned(k) && is_aligned(v) && is_aligned(out))) {
    return false;
  }
  Variant& variant = cuda::KernelTable<Variant>::get().at(handle);
  const int device = cuda::checked_device(q.device().device_id);
  const cuda::ContextGuard context(device);
  CacheIndices indices = {std::nullopt,     cu_seqlens_q, seqused_q,    seqused_k,
                          cu_seqlens_k_new, std::nullopt, cache_leftpad};
  const CachedScalars scalars = {
      num_splits, new_rows, {softmax_scale, softcap, left, right, chunk, sm_margin, clear_rest}};
  CachedParams params = {};
  set_arguments(params, variant.shape, q, wide_k, wide_v, out, lse, indices, sinks, draft_mask,
                scalars);
  params.factors = static_cast<const TileFactors*>(data_of(table));
  indices.page_table = page_table;
  indices.cache_batch_idx = cache_batch_idx;
  WidenParams widen = {};
  set_widen(widen, params, k, indices);
  widen.q_descale = descale_of(q_descale);
  widen.k_descale = descale_of(k_descale);
  widen.v_descale = descale_of(v_descale);
  widen.parts[0] = widen_part(k, wide_k);
  widen.parts[1] = widen_part(v, wide_v);
  widen.table = static_cast<TileFactors*>(data_of(table));
  widen.to_bf16 = q.dtype().code == kDLBfloat;
  launch_widen(widen_handle, widen, device);
  launch_cached(variant, params, scratch, scalars, device, true);
  return true;
}

}  // namespace jit_kernel::hopper
