// The host side of the MLA kernels.
//
//   load_mla(image, mixed, head_dim_v, rows) -> handle; mixed: of an e4m3 cache
//   mla_partial_floats(handle, device, row_tiles, batch, sm_margin) -> room for partial results
//   mla(handle, tensors..., scalars...) -> kLaunched, or why it was not
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "flash_attention_v3/hopper/launch/decode_launch.h"
#include "flash_attention_v3/hopper/launch/exports.h"
#include "flash_attention_v3/hopper/mla/config.h"
#include "flash_attention_v3/hopper/mla/params.h"

namespace jit_kernel::hopper {

struct MlaShape {
  int head_dim_v, rows;
  bool mixed;  // of an e4m3 cache
  int shared_bytes, partial_floats;
};

template <int kHeadDimV, int kRows, bool kMixed>
constexpr MlaShape shape_of_mla() {
  using C = MlaConfig<void, kHeadDimV, kRows, kMixed>;
  return {kHeadDimV, kRows, kMixed, C::kSharedBytes, C::kPartialFloats};
}

constexpr MlaShape kMlaShapes[] = {
#define JIT_KERNEL_MLA_SHAPE(head_dim_v, rows) \
  shape_of_mla<head_dim_v, rows, false>(), shape_of_mla<head_dim_v, rows, true>(),
    JIT_KERNEL_MLA_TILES(JIT_KERNEL_MLA_SHAPE)
#undef JIT_KERNEL_MLA_SHAPE
};

struct MlaVariant {
  MlaVariant(const MlaShape& shape, std::string image)
      : shape(shape),
        kernel(std::move(image), "mla", kMlaThreads, static_cast<unsigned>(shape.shared_bytes)) {}
  const MlaShape& shape;
  cuda::Kernel kernel;
};

inline int64_t load_mla(tvm::ffi::Bytes image, bool mixed, int64_t head_dim_v, int64_t rows) {
  for (const MlaShape& shape : kMlaShapes) {
    if (shape.head_dim_v == head_dim_v && shape.rows == rows && shape.mixed == mixed) {
      return cuda::KernelTable<MlaVariant>::get().add(
          std::make_unique<MlaVariant>(shape, std::string(image)));
    }
  }
  TVM_FFI_THROW(ValueError) << "no MLA kernel has values of head size " << head_dim_v << " and "
                            << rows << " rows";
}

// Thread blocks for each tile of query rows of each key head, `tiles` of them together: as many as
// run at the same time, one a multiprocessor.
inline int mla_parts(int device, int64_t tiles, int64_t batch, int64_t sm_margin) {
  const int64_t most = std::max<int64_t>(1, cuda::multiprocessors(device) - sm_margin);
  return even_parts(std::max<int64_t>(1, most / std::max<int64_t>(1, tiles)), batch);
}

inline int64_t mla_partial_floats(int64_t handle, int64_t device, int64_t tiles, int64_t batch,
                                  int64_t sm_margin) {
  const MlaShape& shape = cuda::KernelTable<MlaVariant>::get().at(handle).shape;
  return kPartialsPerBlock * mla_parts(static_cast<int>(device), tiles, batch, sm_margin) * tiles *
         shape.partial_floats;
}

// qv beside what decode takes.
struct MlaCall {
  DecodeCall decode;
  TensorView qv;
  int64_t row_tiles;
  bool only_qv, is_whole;
};

// As decode/ moves keys: a box holds one panel of 64 columns, or of 128 in e4m3.
constexpr DecodeShape mla_panels(bool mixed) {
  const int columns = mixed ? 2 * kDecodePanel : kDecodePanel;
  return {columns, 0, mixed, 0, 0, 0, 0, 1, columns, 2 * kDecodePanel, 0};
}

inline void set_mla_tensors(MlaParams& params, const MlaCall& call) {
  const DecodeCall& decode = call.decode;
  const TensorView &q = decode.q, &qv = call.qv, &k = decode.k, &v = decode.v, &out = decode.out;
  const bool ragged = decode.cu_seqlens_q.has_value();
  params.q = cuda::data_of(q);
  params.qv = cuda::data_of(qv);
  params.out = cuda::data_of(out);
  params.q_batch_stride = ragged ? 0 : q.stride(0);
  params.qv_batch_stride = ragged ? 0 : qv.stride(0);
  params.out_batch_stride = ragged ? 0 : out.stride(0);
  params.q_row_stride = q.stride(q.ndim() - 3);
  params.qv_row_stride = qv.stride(qv.ndim() - 3);
  params.out_row_stride = out.stride(out.ndim() - 3);
  params.q_head_stride = q.stride(q.ndim() - 2);
  params.qv_head_stride = qv.stride(qv.ndim() - 2);
  params.out_head_stride = out.stride(out.ndim() - 2);
  params.seqlen_q = static_cast<int>(q.size(q.ndim() - 3));
  params.heads_k = static_cast<int>(v.size(2));
  params.group = static_cast<int>(q.size(q.ndim() - 2)) / params.heads_k;
  params.head_dim = static_cast<int>(q.size(q.ndim() - 1));
  params.head_dim_v = static_cast<int>(v.size(3));
  params.place_rows = static_cast<int>(v.size(1));
  const Division group(params.group), place(std::max(1, params.place_rows));
  params.group_multiplier = group.multiplier;
  params.group_shift = group.shift;
  params.place_multiplier = place.multiplier;
  params.place_shift = place.shift;
  const bool empty = v.size(0) * v.size(1) == 0;  // no tensor map has such sizes
  params.box_rows = empty ? 0 : box_rows_of(params.place_rows, decode.page_table.has_value());
  if (params.box_rows > 0) {
    while (params.box_rows << params.boxes_log2 < kMlaKeys) ++params.boxes_log2;
  }
  const DecodeShape panels = mla_panels(v.dtype().bits == 8);
  set_cache_rows(params.k, k, params.box_rows, 1, panels);
  set_cache_rows(params.v, v, params.box_rows, 1, panels);
  params.e4m3_q = q.dtype().bits == 8;
  params.bf16_q = q.dtype().code == kDLBfloat;
  params.bf16_out = out.dtype().code == kDLBfloat;
  set_scales(params.k, decode.k_descale, {});
  set_scales(params.v, decode.v_descale, {});
  set_q_descale(params, decode.q_descale);
}

inline void set_mla_grid(MlaParams& params, const MlaCall& call, int device) {
  const DecodeCall& decode = call.decode;
  const bool ragged = decode.cu_seqlens_q.has_value();
  params.batch =
      static_cast<int>(ragged ? decode.cu_seqlens_q.value().size(0) - 1 : decode.q.size(0));
  params.tiles = 1;  // as decode/ counts them; those of rows are neighbouring blocks
  params.all_tiles = params.batch;
  int64_t rows_k = decode.v.size(1);
  if (decode.page_table.has_value()) {
    params.page_table_stride = decode.page_table.value().stride(0);
    rows_k *= decode.page_table.value().size(1);
  }
  params.rows_k = static_cast<int>(std::min(rows_k, kMostRows));
  params.row_tiles = static_cast<int>(call.row_tiles);
  params.only_qv = call.only_qv;
  params.parts =
      mla_parts(device, decode.v.size(2) * call.row_tiles, params.batch, decode.sm_margin);
  // Ranges that hold a sequence: it is one part's.
  params.ranges_log2 = call.is_whole ? 1 : 0;
  params.policy = kReadNormally;
  const Division parts(params.parts);
  params.parts_multiplier = parts.multiplier;
  params.parts_shift = parts.shift;
}

// Shapes, dtypes, devices and alignment have been checked. `tiles`: of 64 packed query rows, of the
// longest sequence. kLaunched or kNeedsRoom.
inline int64_t launch_mla(MlaVariant& variant, const MlaCall& call) {
  const DecodeCall& decode = call.decode;
  const int device = cuda::checked_device(decode.q.device().device_id);
  const cuda::ContextGuard context(device);
  MlaParams params = {};
  set_mla_grid(params, call, device);
  set_mla_tensors(params, call);
  set_decode_scores(params, decode.softmax_scale, decode.softcap, decode.left, decode.right,
                    decode.chunk);
  set_decode_indices(params, decode);
  const int tiles = params.heads_k * params.row_tiles;
  if (params.parts > 1 && !call.is_whole) {
    const int64_t floats =
        int64_t{kPartialsPerBlock} * params.parts * tiles * variant.shape.partial_floats;
    const Workspace::Memory memory = Workspace::of(device).memory(
        cuda::current_stream(device), kMlaCounters * params.parts * tiles, floats,
        decode.partials.has_value());
    params.counters = memory.counters;
    params.partials =
        decode.partials.has_value() ? cuda::data_of<float>(decode.partials) : memory.partials;
    if (params.partials == nullptr) return kNeedsRoom;
  }
  void* arguments[] = {&params};
  const cuda::Grid grid{static_cast<unsigned>(tiles), static_cast<unsigned>(params.parts)};
  variant.kernel.launch_overlapped(device, grid, 1u, arguments);
  return kLaunched;
}

inline int64_t mla(int64_t handle, TensorView q, TensorView k, TensorView v, TensorView out,
                   Optional<TensorView> lse, Optional<TensorView> cu_seqlens_q,
                   Optional<TensorView> seqused_q, Optional<TensorView> seqused_k,
                   Optional<TensorView> cu_seqlens_k_new, Optional<TensorView> page_table,
                   Optional<TensorView> cache_batch_idx, Optional<TensorView> cache_leftpad,
                   Optional<TensorView> sinks, Optional<TensorView> draft_mask, TensorView qv,
                   Optional<TensorView> q_descale, Optional<TensorView> k_descale,
                   Optional<TensorView> v_descale, Optional<TensorView> partials, int64_t new_rows,
                   double softmax_scale, double softcap, int64_t left, int64_t right, int64_t chunk,
                   int64_t sm_margin, bool clear_rest, int64_t row_tiles, bool only_qv,
                   bool is_whole, bool if_aligned) {
  const MlaCall call = {{q,
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
                         {},
                         {},  // tokens have no factors
                         new_rows,
                         softmax_scale,
                         softcap,
                         left,
                         right,
                         chunk,
                         sm_margin,
                         clear_rest,
                         false,
                         1},
                        qv,
                        row_tiles,
                        only_qv,
                        is_whole};
  if (if_aligned && !(call.decode.is_aligned() && is_aligned(qv))) return kUnaligned;
  return launch_mla(cuda::KernelTable<MlaVariant>::get().at(handle), call);
}

}  // namespace jit_kernel::hopper

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_mla, jit_kernel::hopper::load_mla);
JIT_KERNEL_EXPORT_CALL(mla_partial_floats, jit_kernel::hopper::mla_partial_floats)
JIT_KERNEL_EXPORT_CALL(mla, jit_kernel::hopper::mla)
