// Launches the backward kernels: rows first, then keys' gradients and the sums of the queries',
// then those rounded.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "flash_attention_v3/hopper/backward/config.h"
#include "flash_attention_v3/hopper/launch/prefill_launch.h"

namespace jit_kernel::hopper {

// What the host must know of a variant.
struct BackwardShape {
  int head_dim, queries, keys, parts, threads, shared_bytes;
};

template <int kHeadDim>
constexpr BackwardShape backward_shape_of() {
  using C = BackwardConfig<void, kHeadDim, false>;
  return {kHeadDim, C::kQueries, C::kKeys, C::kParts, C::kThreads, C::kSharedBytes};
}

constexpr BackwardShape kBackwardShapes[] = {backward_shape_of<64>(), backward_shape_of<128>(),
                                             backward_shape_of<256>()};

struct BackwardVariant {
  BackwardVariant(const BackwardShape& shape, const std::string& image)
      : shape(shape),
        prepare(image, "backward_prepare", kPrepareThreads, 0),
        main(image, "backward", static_cast<unsigned>(shape.threads),
             static_cast<unsigned>(shape.shared_bytes)),
        finish(image, "backward_finish", kFinishThreads, 0) {}
  const BackwardShape& shape;
  cuda::Kernel prepare, main, finish;
};

inline int64_t load_backward(Bytes image, int64_t head_dim) {
  for (const BackwardShape& shape : kBackwardShapes) {
    if (shape.head_dim == head_dim) {
      return cuda::KernelTable<BackwardVariant>::get().add(
          std::make_unique<BackwardVariant>(shape, std::string(image)));
    }
  }
  TVM_FFI_THROW(ValueError) << "no backward kernel has head size " << head_dim;
}

inline int64_t tiles_of(int64_t length, int64_t batch, bool ragged, int64_t rows) {
  return ragged ? length / rows + batch : batch * ((length + rows - 1) / rows);
}

// How many tiles of queries a launch has room for; `work` has for each query head and tile the
// rows' two numbers and the tile's sums.
inline int64_t backward_tiles(int64_t handle, int64_t length, int64_t batch, bool ragged) {
  return tiles_of(length, batch, ragged,
                  cuda::KernelTable<BackwardVariant>::get().at(handle).shape.queries);
}

// Of one tile: 0 the numbers that it needs, 1 its rows, 2 its parts.
inline int64_t backward_tile(int64_t handle, int64_t what) {
  const BackwardShape& shape = cuda::KernelTable<BackwardVariant>::get().at(handle).shape;
  if (what == 1) return shape.queries;
  return what == 2 ? shape.parts : 2 * shape.queries + shape.parts * kPartFloats;
}

inline GradientRows rows_of(const TensorView& x) {
  return {data_of(x), x.ndim() == 4 ? x.stride(0) : 0, x.stride(x.ndim() - 3),
          x.stride(x.ndim() - 2)};
}

inline void set_backward_tensors(BackwardParams& params, const BackwardShape& shape,
                                 const TensorView& grad_out, const TensorView& q,
                                 const TensorView& k, const TensorView& v) {
  const bool ragged_q = params.cu_seqlens_q != nullptr, ragged_k = params.cu_seqlens_k != nullptr;
  params.seqlen_q = static_cast<int>(q.size(q.ndim() - 3));
  params.seqlen_k = static_cast<int>(k.size(k.ndim() - 3));
  params.heads_q = static_cast<int>(q.size(q.ndim() - 2));
  params.heads_k = static_cast<int>(k.size(k.ndim() - 2));
  params.group = params.heads_q / params.heads_k;
  params.head_dim = static_cast<int>(q.size(q.ndim() - 1));
  params.head_dim_v = static_cast<int>(v.size(v.ndim() - 1));
  const bool bounded_q = ragged_q || params.seqused_q != nullptr;
  const bool bounded_k = ragged_k || params.seqused_k != nullptr || params.seqlen_k == 0;
  encode_map(params.q, "q", q, 64, shape.queries, bounded_q, q);
  encode_map(params.grad_out, "grad_out", grad_out, 64, shape.queries, bounded_q, q);
  encode_map(params.k, "k", k, 64, shape.keys, bounded_k, q);
  encode_map(params.v, "v", v, 64, shape.keys, bounded_k, q);
  params.tiles_q =
      static_cast<int>(tiles_of(params.seqlen_q, params.batch, ragged_q, shape.queries));
  params.tiles_k = static_cast<int>(tiles_of(params.seqlen_k, params.batch, ragged_k, shape.keys));
  params.tiles_per_q = ragged_q ? 0 : params.tiles_q / params.batch;
  params.tiles_per_k = ragged_k ? 0 : params.tiles_k / params.batch;
}

// Key heads, of a dense call in all sequences, whose queries, gradients and sums are in the L2
// cache together: 32 MB of it.
inline int heads_at_a_time(const BackwardParams& params, const BackwardShape& shape) {
  const int64_t bytes = static_cast<int64_t>(params.seqlen_q) * shape.head_dim * 8;
  const int64_t units =
      params.heads_k * (params.cu_seqlens_k != nullptr ? int64_t{1} : params.batch);
  return static_cast<int>(std::clamp<int64_t>((32 << 20) / std::max<int64_t>(bytes, 1), 1, units));
}

inline void set_backward_scores(BackwardParams& params, double softmax_scale, double softcap,
                                int64_t left, int64_t right, int64_t chunk) {
  ForwardParams scores = {};
  set_scores(scores, softmax_scale, softcap, left, right, chunk);
  params.scale_log2 = scores.scale_log2;
  params.softcap_scale = scores.softcap_scale;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.window_left = scores.window_left;
  params.window_right = scores.window_right;
  params.chunk = scores.chunk;
  params.chunk_multiplier = scores.chunk_multiplier;
  params.chunk_shift = scores.chunk_shift;
}

inline void set_lse(BackwardParams& params, const TensorView& lse,
                    const Optional<TensorView>& grad_lse) {
  params.lse = static_cast<const float*>(data_of(lse));
  params.lse_batch_stride = lse.ndim() == 3 ? lse.stride(0) : 0;
  params.lse_head_stride = lse.stride(lse.ndim() - 2);
  params.grad_lse = data_of<float>(grad_lse);
  if (!grad_lse.has_value()) return;
  const TensorView& grad = grad_lse.value();
  params.grad_lse_batch_stride = grad.ndim() == 3 ? grad.stride(0) : 0;
  params.grad_lse_head_stride = grad.stride(grad.ndim() - 2);
  params.grad_lse_row_stride = grad.stride(grad.ndim() - 1);
}

// Shapes, dtypes and devices have been checked; every address and stride is a multiple of 16 bytes,
// there is a query, and lse has one number after the other. work: as backward_tiles and
// backward_tile say, lse and D of all first. added: zeros, one for each query head, tile and
// part, where sums are to be made in order.
inline bool backward(int64_t handle, TensorView grad_out, TensorView q, TensorView k, TensorView v,
                     TensorView out, TensorView lse, Optional<TensorView> grad_lse,
                     Optional<TensorView> cu_seqlens_q, Optional<TensorView> cu_seqlens_k,
                     Optional<TensorView> seqused_q, Optional<TensorView> seqused_k,
                     TensorView grad_q, TensorView grad_k, TensorView grad_v, TensorView work,
                     Optional<TensorView> added, double softmax_scale, double softcap, int64_t left,
                     int64_t right, int64_t chunk) {
  BackwardVariant& variant = cuda::KernelTable<BackwardVariant>::get().at(handle);
  const int device = cuda::checked_device(q.device().device_id);
  const cuda::ContextGuard context(device);
  BackwardParams params = {};
  params.cu_seqlens_q = data_of<int>(cu_seqlens_q);
  params.cu_seqlens_k = data_of<int>(cu_seqlens_k);
  params.seqused_q = data_of<int>(seqused_q);
  params.seqused_k = data_of<int>(seqused_k);
  params.batch =
      static_cast<int>(cu_seqlens_q.has_value() ? cu_seqlens_q.value().size(0) - 1 : q.size(0));
  set_backward_tensors(params, variant.shape, grad_out, q, k, v);
  set_backward_scores(params, softmax_scale, softcap, left, right, chunk);
  set_lse(params, lse, grad_lse);
  params.grad_q = rows_of(grad_q);
  params.grad_k = rows_of(grad_k);
  params.grad_v = rows_of(grad_v);
  params.rows_out = rows_of(out);
  params.rows_grad_out = rows_of(grad_out);
  params.heads_at_a_time = heads_at_a_time(params, variant.shape);
  const int64_t rows =
      static_cast<int64_t>(params.heads_q) * params.tiles_q * variant.shape.queries;
  params.lse_log2 = static_cast<float*>(data_of(work));
  params.delta = params.lse_log2 + rows;
  params.sums = params.delta + rows;
  params.added = data_of<int>(added);
  void* arguments[] = {&params};
  const auto tiles = static_cast<unsigned>(params.tiles_q);
  const auto heads = static_cast<unsigned>(params.heads_q);
  variant.prepare.launch(device, {tiles, heads}, arguments);
  if (params.tiles_k > 0) {
    variant.main.launch(
        device, {static_cast<unsigned>(params.tiles_k) * static_cast<unsigned>(params.heads_k)},
        arguments);
  }
  variant.finish.launch(device, {tiles, heads, static_cast<unsigned>(variant.shape.parts)},
                        arguments);
  return true;
}

}  // namespace jit_kernel::hopper
