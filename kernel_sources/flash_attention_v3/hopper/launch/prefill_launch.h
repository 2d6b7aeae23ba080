// Launches the prefill kernels: their variants, and one call's arguments as the kernel takes them.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "flash_attention_v3/hopper/launch/progress.h"
#include "flash_attention_v3/hopper/launch/tensor_map.h"
#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/kernel_table.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::hopper {

using cuda::data_of;
using tvm::ffi::Bytes;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kUnbounded = 1 << 30;
constexpr double kLog2E = 1.4426950408889634;

// What the host must know of a variant.
struct Shape {
  int head_dim, head_dim_v;
  bool masked, cached, fp8, prepared;
  int rows, keys, threads, shared_bytes, panel, panel_v;
};

template <class C>
constexpr Shape shape_of() {
  return {C::kHeadDim, C::kHeadDimV, C::kMasked,  C::kCached,      C::kFp8,   C::kPrepared,
          C::kRows,    C::kKeys,     C::kThreads, C::kSharedBytes, C::kPanel, C::kPanelV};
}

template <int kHeadDim, int kHeadDimV, bool kMasked, bool kCached>
constexpr Shape shape_of() {
  return shape_of<Config<void, kHeadDim, kHeadDimV, kMasked, kCached,
                         TileFor<kHeadDim, kHeadDimV, kMasked>, kCached>>();
}

template <int kHeadDim, bool kMasked, bool kPrepared>
constexpr Shape fp8_shape_of() {
  return shape_of<
      Config<e4m3, kHeadDim, kHeadDim, kMasked, true, Fp8TileFor<kHeadDim, kMasked, kPrepared>>>();
}

constexpr Shape kShapes[] = {
#define JIT_KERNEL_TILE(head_dim, head_dim_v, ...)                                               \
  shape_of<head_dim, head_dim_v, false, false>(), shape_of<head_dim, head_dim_v, true, false>(), \
      shape_of<head_dim, head_dim_v, true, true>(),
#include "flash_attention_v3/hopper/prefill/tile_table.inc"
#define JIT_KERNEL_FP8_TILE(head_dim, ...) \
  fp8_shape_of<head_dim, false, false>(), fp8_shape_of<head_dim, true, false>(),
#define JIT_KERNEL_FP8_PREPARED_TILE(head_dim, ...) \
  fp8_shape_of<head_dim, false, true>(), fp8_shape_of<head_dim, true, true>(),
#include "flash_attention_v3/hopper/prefill/fp8_tile_table.inc"
};

inline const char* name_of(const Shape& shape) {
  if (shape.fp8) return "forward_fp8";
  return shape.cached ? "forward_cached" : "forward";
}

struct Variant {
  Variant(const Shape& shape, std::string image)
      : shape(shape),
        kernel(std::move(image), name_of(shape), static_cast<unsigned>(shape.threads),
               static_cast<unsigned>(shape.shared_bytes)) {}
  const Shape& shape;
  cuda::Kernel kernel;
};

inline int64_t load_kernel(Bytes image, int64_t head_dim, int64_t head_dim_v, bool masked,
                           bool cached, bool fp8, bool prepared) {
  for (const Shape& shape : kShapes) {
    if (shape.head_dim == head_dim && shape.head_dim_v == head_dim_v && shape.masked == masked &&
        shape.cached == cached && shape.fp8 == fp8 && shape.prepared == prepared) {
      return cuda::KernelTable<Variant>::get().add(
          std::make_unique<Variant>(shape, std::string(image)));
    }
  }
  TVM_FFI_THROW(ValueError) << "no Hopper kernel has head sizes " << head_dim << "/" << head_dim_v;
}

// The call's index tensors, each absent for a dense tensor.
struct Lengths {
  const int *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k;
};

// With a mask the order is by length of tile, which wants many heads at a time; without, few heads
// at a time are read from memory once (647 MB in place of 201 with 32 MB, 16 x 4096 tokens).
inline int l2_tokens_of(const Shape& shape, int64_t columns) {
  const int budget = shape.masked ? 32 << 20 : 8 << 20;
  return budget / static_cast<int>(columns * (shape.fp8 ? 1 : 2));
}

inline void set_tensors(ForwardParams& params, const Shape& shape, const TensorView& q,
                        const TensorView& k, const TensorView& v, const TensorView& out,
                        const Lengths& lengths) {
  const bool ragged_q = lengths.cu_seqlens_q != nullptr;
  const bool ragged_k = lengths.cu_seqlens_k != nullptr;
  params.seqlen_q = static_cast<int>(q.size(q.ndim() - 3));
  params.seqlen_k = static_cast<int>(k.size(k.ndim() - 3));
  params.heads_q = static_cast<int>(q.size(q.ndim() - 2));
  params.group = params.heads_q / static_cast<int>(k.size(k.ndim() - 2));
  params.head_dim_v = static_cast<int>(v.size(v.ndim() - 1));
  // Lengths on the device, or no key at all, need the map that bounds each sequence by itself.
  const bool bounded_q = ragged_q || lengths.seqused_q != nullptr;
  const bool bounded_k = ragged_k || lengths.seqused_k != nullptr || params.seqlen_k == 0;
  // With a mask each tile of queries bounds the values that it sees. Of a dense tensor whose
  // strides do not allow it, a tile's last block holds values that later queries alone see.
  const bool bounded_v = bounded_k || (shape.masked && Places(v).reach_all);
  encode_map(params.q, "q", q, shape.panel, kRowsPerWarpgroup, bounded_q, q);
  encode_map(params.k, "k", k, shape.panel, shape.keys, bounded_k, q);
  encode_map(params.v, "v", v, shape.panel_v, shape.keys, bounded_v, q);
  params.out = data_of(out);
  params.out_batch_stride = ragged_q ? 0 : out.stride(0);
  params.out_row_stride = out.stride(out.ndim() - 3);
  params.out_head_stride = out.stride(out.ndim() - 2);
  params.cu_seqlens_q = lengths.cu_seqlens_q;
  params.cu_seqlens_k = lengths.cu_seqlens_k;
  params.seqused_q = lengths.seqused_q;
  params.seqused_k = lengths.seqused_k;
  params.l2_tokens = l2_tokens_of(shape, q.size(q.ndim() - 1) + params.head_dim_v);
}

inline void set_lse(ForwardParams& params, const Optional<TensorView>& lse) {
  params.lse = data_of<float>(lse);
  if (params.lse == nullptr) return;
  const TensorView& tensor = lse.value();
  params.lse_batch_stride = tensor.ndim() == 3 ? tensor.stride(0) : 0;
  params.lse_head_stride = tensor.stride(tensor.ndim() - 2);
}

inline void set_sinks(ForwardParams& params, const Optional<TensorView>& sinks) {
  params.sinks = data_of<void>(sinks);
  params.sinks_are_elements = sinks.has_value() && sinks.value().dtype().bits < 32;
}

// Numbers with floor(p / divisor) = 2 p multiplier / 2^(32 + shift) for 0 <= p < 2^31.
inline void set_divisor(int divisor, unsigned& multiplier, unsigned& shift) {
  shift = 0;
  while (int64_t{1} << shift < divisor) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  multiplier = static_cast<unsigned>((power + divisor - 1) / divisor);
}

inline void set_scores(ForwardParams& params, double softmax_scale, double softcap, int64_t left,
                       int64_t right, int64_t chunk) {
  // Finite factors: 0 times infinity would be NaN.
  auto finite = [](double x) {
    return static_cast<float>(std::min<double>(x, std::numeric_limits<float>::max()));
  };
  params.scale_log2 = finite((softcap > 0 ? softcap : softmax_scale) * kLog2E);
  params.softcap_scale = softcap > 0 ? finite(softmax_scale / softcap) : 0.f;
  params.window_left = left < 0 || left > kUnbounded ? kUnbounded : static_cast<int>(left);
  params.window_right = right < 0 || right > kUnbounded ? kUnbounded : static_cast<int>(right);
  if (chunk <= 0) return;
  params.chunk = static_cast<int>(std::min<int64_t>(chunk, kUnbounded));
  set_divisor(params.chunk, params.chunk_multiplier, params.chunk_shift);
}

// An upper bound of the tiles that a call has; pack_shift: as CachedParams has it, else 0.
inline int64_t most_tiles(const ForwardParams& params, const Shape& shape, int pack_shift) {
  const int64_t rows = static_cast<int64_t>(params.seqlen_q) << pack_shift;
  const int64_t dense = (rows + shape.rows - 1) / shape.rows;
  const int64_t tiles =
      params.cu_seqlens_q != nullptr ? dense + params.batch : dense * params.batch;
  return tiles * (params.heads_q >> pack_shift);
}

// Blocks that can have a tile, or a part of one, at the same time; more of them would only look and
// leave.
inline unsigned grid_of(const ForwardParams& params, const Shape& shape, int pack_shift,
                        int64_t parts, int device, int64_t sm_margin) {
  const int64_t most = std::max<int64_t>(1, cuda::multiprocessors(device) - sm_margin);
  const int64_t tiles = std::min(most, most_tiles(params, shape, pack_shift));
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(most, tiles * parts)));
}

// Every row starts at a multiple of the copy engine's 16 bytes.
inline bool is_aligned(const TensorView& x) {
  uint64_t bits = reinterpret_cast<uint64_t>(data_of(x));
  const uint64_t bytes = x.dtype().bits / 8;
  for (int i = 0; i + 1 < x.ndim(); ++i) bits |= static_cast<uint64_t>(x.stride(i)) * bytes;
  return bits % 16 == 0;
}

// What a call of `forward` has beside its tensors of sequences.
struct CallScalars {
  double softmax_scale, softcap;
  int64_t left, right, chunk, sm_margin;
  bool clear_rest;
};

// The parameters of a call, and the blocks that it takes.
inline unsigned set_forward(const Variant& variant, ForwardParams& params, const TensorView& q,
                            const TensorView& k, const TensorView& v, const TensorView& out,
                            const Optional<TensorView>& lse, const Lengths& lengths, int64_t batch,
                            const Optional<TensorView>& sinks, const CallScalars& call,
                            int device) {
  params.batch = static_cast<int>(batch);
  set_tensors(params, variant.shape, q, k, v, out, lengths);
  set_lse(params, lse);
  set_scores(params, call.softmax_scale, call.softcap, call.left, call.right, call.chunk);
  set_sinks(params, sinks);
  params.clear_rest = call.clear_rest;
  params.progress = ProgressPool::of(device).counters(cuda::current_stream(device));
  return grid_of(params, variant.shape, 0, 1, device, call.sm_margin);
}

// Shapes, dtypes and devices have been checked; every address and stride is a multiple of 16 bytes.
// left, right: -1 is unbounded. clear_rest: rows of out that hold no query become 0. if_aligned:
// addresses and strides have not been checked, and nothing is launched where they are none.
inline bool forward(int64_t handle, TensorView q, TensorView k, TensorView v, TensorView out,
                    Optional<TensorView> lse, Optional<TensorView> cu_seqlens_q,
                    Optional<TensorView> cu_seqlens_k, Optional<TensorView> seqused_q,
                    Optional<TensorView> seqused_k, Optional<TensorView> sinks,
                    double softmax_scale, double softcap, int64_t left, int64_t right,
                    int64_t chunk, int64_t sm_margin, bool clear_rest, bool if_aligned) {
  if (if_aligned && !(is_aligned(q) && is_aligned(k) && is_aligned(v) && is_aligned(out))) {
    return false;
  }
  const int device = cuda::checked_device(q.device().device_id);
  const cuda::ContextGuard context(device);
  Variant& variant = cuda::KernelTable<Variant>::get().at(handle);
  ForwardParams params = {};
  const unsigned blocks =
      set_forward(variant, params, q, k, v, out, lse,
                  {data_of<int>(cu_seqlens_q), data_of<int>(cu_seqlens_k), data_of<int>(seqused_q),
                   data_of<int>(seqused_k)},
                  cu_seqlens_q.has_value() ? cu_seqlens_q.value().size(0) - 1 : q.size(0), sinks,
                  {softmax_scale, softcap, left, right, chunk, sm_margin, clear_rest}, device);
  void* arguments[] = {&params};
  variant.kernel.launch(device, {blocks}, arguments);
  return true;
}

}  // namespace jit_kernel::hopper
