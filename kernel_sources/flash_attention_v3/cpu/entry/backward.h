// The entry of a backward library: backward(), for tensors that Python has settled.
#pragma once

#include <vector>

#include "flash_attention_v3/cpu/backward/mainloop_backward.h"
#include "flash_attention_v3/cpu/entry/arguments.h"
#include "flash_attention_v3/cpu/entry/parameters.h"

namespace jit_kernel {

// What backward() takes. The gradients hold zeros where nothing is written: rows outside of every
// sequence, keys that no query sees. Both sides are dense or both are ragged.
struct BackwardArguments {
  static constexpr int32_t kCount = 24;
  explicit BackwardArguments(FfiArguments& arguments) : from(arguments) {}

  FfiArguments& from;
  TensorView grad_out = from.tensor();
  TensorView q = from.tensor();
  TensorView k = from.tensor();
  TensorView v = from.tensor();
  TensorView out = from.tensor();
  TensorView lse = from.tensor();
  TensorView grad_q = from.tensor();
  TensorView grad_k = from.tensor();
  TensorView grad_v = from.tensor();
  TensorView sums = from.tensor();  // (heads, rows, n) float32, n at least d in whole vectors
  TensorView rows = from.tensor();  // (2, heads, rows) float32
  MaybeTensor grad_lse = from.maybe_tensor();
  MaybeTensor sinks = from.maybe_tensor();
  MaybeTensor grad_sinks = from.maybe_tensor();
  MaybeTensor cu_seqlens_q = from.maybe_tensor();
  MaybeTensor cu_seqlens_k = from.maybe_tensor();
  MaybeTensor seqused_q = from.maybe_tensor();
  MaybeTensor seqused_k = from.maybe_tensor();
  double softmax_scale = from.number();
  int64_t window_left = from.integer();
  int64_t window_right = from.integer();
  int64_t attention_chunk = from.integer();
  double softcap = from.number();
  int64_t num_threads = from.integer();
};

template <class Element>
inline BackwardParams<Element> backward_params(const BackwardArguments& a,
                                               std::vector<float>& sink_memory) {
  BackwardParams<Element> p;
  p.q = rows_of<const Element>(a.q);
  p.k = rows_of<Element>(a.k);
  p.v = rows_of<Element>(a.v);
  p.grad_out = rows_of<const Element>(a.grad_out);
  p.result = rows_of<const Element>(a.out);
  p.grad_q = rows_of<Element>(a.grad_q);
  p.grad_k = rows_of<Element>(a.grad_k);
  p.grad_v = rows_of<Element>(a.grad_v);
  const auto of_rows = [](const MaybeTensor& t) {
    const Rows<float> rows = lse_or_null(t);
    return Rows<const float>{rows.data, rows.batch, rows.row, rows.head};
  };
  p.lse_of_rows = of_rows(a.lse);
  p.grad_lse = of_rows(a.grad_lse);
  const int32_t n = a.q.ndim();
  p.heads = a.q.size(n - 2);
  p.heads_k = a.k.size(n - 2);
  p.group = p.heads / p.heads_k;
  p.d = a.q.size(n - 1);
  p.dv = a.v.size(n - 1);
  p.rows_q = a.q.size(n - 3);
  p.rows_k = a.k.size(n - 3);
  p.cu_seqlens_q = indices_or_null(a.cu_seqlens_q);
  p.cu_seqlens_k = indices_or_null(a.cu_seqlens_k);
  p.seqused_q = indices_or_null(a.seqused_q);
  p.seqused_k = indices_or_null(a.seqused_k);
  p.batch = a.cu_seqlens_q.has_value() ? a.cu_seqlens_q->size(0) - 1 : a.q.size(0);
  p.all_rows = n == 4 ? p.batch * p.rows_q : p.rows_q;
  p.sums = data_of<float>(a.sums);
  p.row_of_sums = a.sums.size(2);
  p.deltas = data_of<float>(a.rows);
  p.shifts = p.deltas + p.heads * p.all_rows;
  p.sinks = sinks_as_float<Element>(a.sinks, sink_memory);
  if (a.grad_sinks.has_value()) p.grad_sinks = data_of<float>(*a.grad_sinks);
  p.softmax_scale = static_cast<float>(a.softmax_scale);
  p.window_left = a.window_left;
  p.window_right = a.window_right;
  p.attention_chunk = a.attention_chunk;
  p.softcap = static_cast<float>(a.softcap);
  p.num_threads = a.num_threads;
  return p;
}

template <class Element>
inline void backward(FfiArguments& from) {
  const BackwardArguments a(from);
  std::vector<float> sink_memory;
  const BackwardParams<Element> p = backward_params<Element>(a, sink_memory);
  BackwardPass<Element>(p).run();
}

}  // namespace jit_kernel

// The element type by its name in jit_kernel: f32, bf16 or fp16.
#define JIT_KERNEL_EXPORT_BACKWARD(element)                            \
  JIT_KERNEL_EXPORT(backward, ::jit_kernel::BackwardArguments::kCount, \
                    ::jit_kernel::backward<::jit_kernel::element>)
