// The host side of the append kernel: tensors become parts, parts become blocks.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>

#include "flash_attention_v3/hopper/append/params.h"
#include "jit_kernel/cuda/driver.h"
#include "jit_kernel/cuda/kernel_table.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::hopper {

using MaybeTensor = tvm::ffi::Optional<tvm::ffi::TensorView>;

// Items are counted in 31 bits, those of the last block's lanes included.
constexpr int64_t kMostItems = (int64_t{1} << 31) - (1 << 16);

// multiplier < 2^32 because 2^(shift - 1) < divisor <= 2^shift.
inline Divisor divisor_of(int64_t number) {
  Divisor divisor = {static_cast<unsigned>(std::max<int64_t>(number, 1)), 0, 0};
  while (int64_t{1} << divisor.shift < divisor.divisor) ++divisor.shift;
  const uint64_t power = uint64_t{1} << (31 + divisor.shift);
  divisor.multiplier = static_cast<unsigned>((power + divisor.divisor - 1) / divisor.divisor);
  return divisor;
}

// Of an element.
inline int64_t bytes_of(const tvm::ffi::TensorView& x) { return x.dtype().bits / 8; }

// Whether every row begins at a multiple of 16 bytes; the stride of a dimension of one element
// moves nothing.
inline bool has_wide_rows(const tvm::ffi::TensorView& x) {
  auto bits = reinterpret_cast<uint64_t>(cuda::data_of(x));
  for (int i = 0; i + 1 < x.ndim(); ++i) {
    if (x.size(i) > 1) bits |= static_cast<uint64_t>(x.stride(i) * bytes_of(x));
  }
  return bits % kChunkBytes == 0;
}

// The rows of a (batch, tokens, heads, d) or (tokens, heads, d) tensor; `destination` has batch,
// tokens and heads of its own.
inline AppendPart part_of(const char* name, const tvm::ffi::TensorView& source,
                          const tvm::ffi::TensorView& destination, const int* cu_seqlens,
                          bool rotates) {
  const int n = source.ndim(), m = destination.ndim();
  const int64_t tokens = source.size(n - 3), heads = source.size(n - 2);
  const int64_t items = (n == 4 ? source.size(0) : 1) * tokens * heads;
  if (items > kMostItems) {
    TVM_FFI_THROW(ValueError) << name << " has " << items << " rows of a token and head; it must "
                              << "have at most " << kMostItems;
  }
  AppendPart part = {};
  part.source = static_cast<const char*>(cuda::data_of(source));
  part.destination = static_cast<char*>(cuda::data_of(destination));
  const int64_t own_bytes = bytes_of(source), bytes = bytes_of(destination);
  part.source_batch = n == 4 ? source.stride(0) * own_bytes : 0;
  part.source_token = source.stride(n - 3) * own_bytes;
  part.source_head = source.stride(n - 2) * own_bytes;
  part.destination_batch = m == 4 ? destination.stride(0) * bytes : 0;
  part.destination_token = destination.stride(m - 3) * bytes;
  part.destination_head = destination.stride(m - 2) * bytes;
  part.cu_seqlens = cu_seqlens;
  part.items = static_cast<unsigned>(items);
  part.heads = divisor_of(heads);
  part.tokens = divisor_of(tokens);
  part.chunks = static_cast<int>(source.size(n - 1) / kChunkElements);
  while (1 << part.lanes_shift < part.chunks) ++part.lanes_shift;
  part.wide = has_wide_rows(source);
  part.rotates = rotates;
  return part;
}

// What rows that go to a cache in e4m3 are divided by.
inline void set_factors(AppendPart& part, const MaybeTensor& descale, const MaybeTensor& scales) {
  part.descale = cuda::data_of<const float>(descale);
  if (descale.has_value()) {
    part.descale_batch = descale.value().stride(0);
    part.descale_head = descale.value().stride(1);
  }
  part.scales = cuda::data_of<const float>(scales);
  if (!scales.has_value()) return;
  part.scales_batch = scales.value().stride(0);
  part.scales_token = scales.value().stride(1);
  part.scales_head = scales.value().stride(2);
}

// How many blocks a part takes.
inline unsigned blocks_of(const AppendPart& part) {
  const unsigned rows = (kAppendThreads >> part.lanes_shift) * kAppendRows;
  return (part.items + rows - 1) / rows;
}

inline void set_cache(AppendParams& params, const tvm::ffi::TensorView& k_cache,
                      const MaybeTensor& page_table) {
  int64_t capacity = k_cache.size(1);
  params.cache_rows = params.cache_blocks = static_cast<int>(k_cache.size(0));
  params.page_size = divisor_of(k_cache.size(1));
  params.page_table = cuda::data_of<const int>(page_table);
  if (page_table.has_value()) {
    capacity *= page_table.value().size(1);
    params.cache_rows = static_cast<int>(page_table.value().size(0));
    params.page_table_stride = page_table.value().stride(0);
  }
  params.capacity = static_cast<int>(std::min<int64_t>(capacity, INT32_MAX));
}

inline void set_tables(AppendParams& params, const MaybeTensor& cos, const MaybeTensor& sin) {
  if (!cos.has_value() || !sin.has_value()) return;
  params.rotary_cos = cuda::data_of<const char>(cos);
  params.rotary_sin = cuda::data_of<const char>(sin);
  params.cos_stride = cos.value().stride(0) * bytes_of(cos.value());
  params.sin_stride = sin.value().stride(0) * bytes_of(sin.value());
  params.rotary_positions = static_cast<int>(cos.value().size(0));
  params.rotary_chunks = static_cast<int>(2 * cos.value().size(1) / kChunkElements);
  const bool wide_tables = has_wide_rows(cos.value()) && has_wide_rows(sin.value());
  for (AppendPart& part : params.parts) part.wide &= !part.rotates || wide_tables;
}

// Shapes, dtypes and devices have been checked; the rotary tables come with `rotated`, which is
// shaped as q. false, and nothing is written, where a row of the caches or of `rotated` does not
// begin at a multiple of 16 bytes; new keys, values, q and tables may begin anywhere. The scales
// are read by the kernel for caches in e4m3 alone.
inline bool append(int64_t handle, tvm::ffi::TensorView q, MaybeTensor rotated,
                   tvm::ffi::TensorView k_new, tvm::ffi::TensorView v_new,
                   tvm::ffi::TensorView k_cache, tvm::ffi::TensorView v_cache,
                   MaybeTensor rotary_cos, MaybeTensor rotary_sin, MaybeTensor cu_seqlens_q,
                   MaybeTensor cu_seqlens_k_new, MaybeTensor cache_seqlens,
                   MaybeTensor rotary_seqlens, MaybeTensor cache_batch_idx, MaybeTensor page_table,
                   MaybeTensor k_descale, MaybeTensor v_descale, MaybeTensor k_scale,
                   MaybeTensor v_scale, bool interleaved, bool by_token) {
  if (!has_wide_rows(k_cache) || !has_wide_rows(v_cache)) return false;
  if (rotated.has_value() && !has_wide_rows(rotated.value())) return false;
  AppendParams params = {};
  const bool rotates = rotated.has_value();
  const int* new_starts = cuda::data_of<const int>(cu_seqlens_k_new);
  params.batch =
      static_cast<int>(cu_seqlens_q.has_value() ? cu_seqlens_q.value().size(0) - 1 : q.size(0));
  params.parts[kNewKeys] = part_of("k", k_new, k_cache, new_starts, rotates);
  params.parts[kNewValues] = part_of("v", v_new, v_cache, new_starts, false);
  set_factors(params.parts[kNewKeys], k_descale, k_scale);
  set_factors(params.parts[kNewValues], v_descale, v_scale);
  if (rotates) {
    params.parts[kQueries] =
        part_of("q", q, rotated.value(), cuda::data_of<const int>(cu_seqlens_q), true);
  }
  unsigned blocks = 0;
  for (AppendPart& part : params.parts) {
    part.first_block = blocks;
    blocks += blocks_of(part);
  }
  set_cache(params, k_cache, page_table);
  set_tables(params, rotary_cos, rotary_sin);
  params.cache_seqlens = cuda::data_of<const int>(cache_seqlens);
  params.rotary_seqlens = cuda::data_of<const int>(rotary_seqlens);
  params.cache_batch_idx = cuda::data_of<const int>(cache_batch_idx);
  params.interleaved = interleaved;
  params.by_token = by_token;
  if (blocks == 0) return true;
  void* arguments[] = {&params};
  cuda::KernelTable<cuda::Kernel>::get().at(handle).launch_overlapped(q.device().device_id,
                                                                      {blocks}, 1, arguments);
  return true;
}

}  // namespace jit_kernel::hopper
