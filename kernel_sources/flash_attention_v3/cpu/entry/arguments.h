// The arguments of the exported functions by their names, in the order in which Python passes them.
//
// Members are initialised in the order of their declaration, a base's before them, so the order of
// the lines is the order of the call: one line declares an argument and reads it.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "jit_kernel/host/ffi_arguments.h"

namespace jit_kernel {

using MaybeTensor = std::optional<TensorView>;

// The first arguments of both forward() and plain_forward().
struct CallTensors {
  explicit CallTensors(FfiArguments& arguments) : from(arguments) {}

  FfiArguments& from;
  TensorView q = from.tensor();
  TensorView k = from.tensor();
  TensorView v = from.tensor();
  TensorView out = from.tensor();
  MaybeTensor lse = from.maybe_tensor();
};

// What forward() takes: a call that Python has checked.
struct ForwardArguments : CallTensors {
  static constexpr int32_t kCount = 36;
  using CallTensors::CallTensors;

  MaybeTensor qv = from.maybe_tensor();
  MaybeTensor k_new = from.maybe_tensor();
  MaybeTensor v_new = from.maybe_tensor();
  MaybeTensor page_table = from.maybe_tensor();
  MaybeTensor cu_seqlens_q = from.maybe_tensor();
  MaybeTensor cu_seqlens_k = from.maybe_tensor();
  MaybeTensor cu_seqlens_k_new = from.maybe_tensor();
  MaybeTensor seqused_q = from.maybe_tensor();
  MaybeTensor seqused_k = from.maybe_tensor();
  MaybeTensor cache_batch_idx = from.maybe_tensor();
  MaybeTensor cache_leftpad = from.maybe_tensor();
  MaybeTensor rotary_cos = from.maybe_tensor();
  MaybeTensor rotary_sin = from.maybe_tensor();
  MaybeTensor rotary_seqlens = from.maybe_tensor();
  MaybeTensor q_descale = from.maybe_tensor();
  MaybeTensor k_descale = from.maybe_tensor();
  MaybeTensor v_descale = from.maybe_tensor();
  MaybeTensor k_scale = from.maybe_tensor();
  MaybeTensor v_scale = from.maybe_tensor();
  MaybeTensor sinks = from.maybe_tensor();
  MaybeTensor draft_mask = from.maybe_tensor();
  double softmax_scale = from.number();
  bool causal = from.boolean();
  int64_t window_left = from.integer();
  int64_t window_right = from.integer();
  int64_t attention_chunk = from.integer();
  double softcap = from.number();
  bool rotary_interleaved = from.boolean();
  bool only_qv = from.boolean();
  int64_t num_splits = from.integer();
  int64_t num_threads = from.integer();
};

// What plain_forward() takes: a call without any check yet.
struct PlainArguments : CallTensors {
  static constexpr int32_t kCount = 19;
  using CallTensors::CallTensors;

  MaybeTensor page_table = from.maybe_tensor();
  MaybeTensor cu_seqlens_q = from.maybe_tensor();
  MaybeTensor cu_seqlens_k = from.maybe_tensor();
  MaybeTensor seqused_k = from.maybe_tensor();
  std::optional<int64_t> max_seqlen_q = from.maybe_exact_integer();
  std::optional<int64_t> max_seqlen_k = from.maybe_exact_integer();
  std::optional<double> softmax_scale = from.maybe_exact_number();
  bool causal = from.exact_boolean();
  int64_t window_left = from.integer();
  int64_t window_right = from.integer();
  int64_t attention_chunk = from.exact_integer();
  double softcap = from.exact_number();
  int64_t num_splits = from.exact_integer();
  int64_t num_threads = from.integer();

  int64_t batch() const { return cu_seqlens_q.has_value() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  double scale() const {
    const auto head_dim = static_cast<double>(q.size(q.ndim() - 1));
    return softmax_scale.value_or(1.0 / std::sqrt(head_dim));
  }
};

// What combine() takes: parts (splits, ..., dv) and (splits, ...), results (..., dv) and (...).
struct CombineArguments {
  static constexpr int32_t kCount = 4;
  explicit CombineArguments(FfiArguments& arguments) : from(arguments) {}

  FfiArguments& from;
  TensorView out_partial = from.tensor();
  TensorView lse_partial = from.tensor();
  TensorView out = from.tensor();
  TensorView lse = from.tensor();
};

// What merge_state() takes: two parts and their result, each out (..., dv) and lse (...).
struct MergeArguments {
  static constexpr int32_t kCount = 6;
  explicit MergeArguments(FfiArguments& arguments) : from(arguments) {}

  FfiArguments& from;
  TensorView out_a = from.tensor();
  TensorView lse_a = from.tensor();
  TensorView out_b = from.tensor();
  TensorView lse_b = from.tensor();
  TensorView out = from.tensor();
  TensorView lse = from.tensor();
};

}  // namespace jit_kernel
