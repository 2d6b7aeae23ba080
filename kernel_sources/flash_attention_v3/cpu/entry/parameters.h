// Arguments to parameters: tensors become pointers and strides, and sizes are read from them.
#pragma once

#include <type_traits>
#include <vector>

#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/entry/arguments.h"
#include "jit_kernel/cpu/element.h"
#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

template <class Element>
inline Element* data_of(const TensorView& t) {
  return reinterpret_cast<Element*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

inline const int32_t* indices_or_null(const MaybeTensor& t) {
  return t.has_value() ? data_of<const int32_t>(*t) : nullptr;
}

// (batch, rows, heads, n), or ragged (rows, heads, n).
template <class Element>
inline Rows<Element> rows_of(const TensorView& t) {
  int32_t n = t.ndim();
  return {data_of<Element>(t), n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
}

template <class Element>
inline Rows<const Element> rows_or_null(const MaybeTensor& t) {
  return t.has_value() ? rows_of<const Element>(*t) : Rows<const Element>();
}

// A rotary table (positions, rotary_dim / 2), or nothing.
template <class Element>
inline Rows<const Element> table_or_null(const MaybeTensor& t) {
  Rows<const Element> table;
  if (t.has_value()) {
    table.data = data_of<const Element>(*t);
    table.row = t->stride(0);
  }
  return table;
}

// lse is (heads, rows) or (batch, heads, rows).
inline Rows<float> lse_or_null(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  int32_t n = t->ndim();
  return {data_of<float>(*t), n == 3 ? t->stride(0) : 0, t->stride(n - 1), t->stride(n - 2)};
}

inline Descale descale_of(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  return {data_of<const float>(*t), t->stride(0), t->stride(1)};
}

// (batch, rows, heads), or ragged (rows, heads): a factor each.
inline Rows<const float> factors_of(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  int32_t n = t->ndim();
  return {data_of<const float>(*t), n == 3 ? t->stride(0) : 0, t->stride(n - 2), t->stride(n - 1)};
}

// New keys or values: in the queries' type, or in the cache's where that is another one.
template <class Params>
inline void set_new(const ForwardArguments& a, Params& p) {
  using Query = typename Params::Query;
  using Key = typename Params::Key;
  if (!a.k_new.has_value()) return;
  p.rows_new = a.k_new->size(a.k_new->ndim() - 3);
  if (a.k_new->dtype().bits == 8 * sizeof(Query)) {
    p.k_new = rows_of<const Query>(*a.k_new);
    p.v_new = rows_of<const Query>(*a.v_new);
  } else {
    p.k_stored = rows_of<const Key>(*a.k_new);
    p.v_stored = rows_of<const Key>(*a.v_new);
  }
}

// Sinks come as float32 or in the inputs' dtype.
template <class Element>
inline const float* sinks_as_float(const MaybeTensor& sinks, std::vector<float>& storage) {
  if (!sinks.has_value()) return nullptr;
  int64_t heads = sinks->size(0), stride = sinks->stride(0);
  bool is_float = sinks->dtype().bits == 32;
  for (int64_t h = 0; h < heads; ++h) {
    storage.push_back(is_float ? data_of<const float>(*sinks)[h * stride]
                               : to_float(data_of<const Element>(*sinks)[h * stride]));
  }
  return storage.data();
}

// From this size on (half of a large L2) out would leave the caches before it is read, and drive
// needed lines out: it is written past them. 9 % of a call of 512 tokens and 8 heads with two
// threads, 4 % of a causal one of 2048; with a product of out after it 1 to 3 % and nothing.
constexpr int64_t kStreamBytes = 1 << 20;

// Whether out is written past the caches: it is large, and every row of it is a number of whole
// cache lines.
template <class Output>
inline bool is_streamed(const TensorView& out, const Rows<Output>& rows) {
  constexpr int64_t kLine = kCacheLine / sizeof(Output);
  bool whole = out.size(out.ndim() - 1) % kLine == 0 && rows.batch % kLine == 0 &&
               rows.row % kLine == 0 && rows.head % kLine == 0 &&
               reinterpret_cast<uintptr_t>(rows.data) % kCacheLine == 0;
  int64_t bytes = sizeof(Output);
  for (int32_t i = 0; i < out.ndim(); ++i) bytes *= out.size(i);
  return whole && bytes >= kStreamBytes;
}

// What the tensors of both entries say.
template <class Element>
inline void set_tensors(const CallTensors& a, ForwardParams<Element>& p) {
  p.q = rows_of<const QueryOf<Element>>(a.q);
  p.k = rows_of<KeyOf<Element>>(a.k);
  p.v = rows_of<KeyOf<Element>>(a.v);
  p.out = rows_of<typename OutputOf<Element>::type>(a.out);
  p.stream_out = is_streamed(a.out, p.out);
  p.lse = lse_or_null(a.lse);
  p.batch = a.q.size(0);
  p.heads = a.q.size(a.q.ndim() - 2);
  p.heads_k = a.k.size(a.k.ndim() - 2);
  p.group = p.heads / p.heads_k;
  p.d = a.q.size(a.q.ndim() - 1);
  p.dv = a.v.size(a.v.ndim() - 1);
  p.rows_q = a.q.size(a.q.ndim() - 3);
  p.rows_k = a.k.size(a.k.ndim() - 3);
}

// The other parameters that both entries have arguments for, but for softmax_scale.
template <class Element, class Arguments>
inline void set_common(const Arguments& a, ForwardParams<Element>& p) {
  p.page_table = indices_or_null(a.page_table);
  p.page_size = a.page_table.has_value() ? a.k.size(1) : 0;
  p.table_width = a.page_table.has_value() ? a.page_table->size(1) : 0;
  p.cu_seqlens_q = indices_or_null(a.cu_seqlens_q);
  if (a.cu_seqlens_q.has_value()) p.batch = a.cu_seqlens_q->size(0) - 1;
  p.cu_seqlens_k = indices_or_null(a.cu_seqlens_k);
  p.seqused_k = indices_or_null(a.seqused_k);
  p.window_left = a.window_left;
  p.window_right = a.causal ? 0 : a.window_right;
  p.attention_chunk = a.attention_chunk;
  p.softcap = static_cast<float>(a.softcap);
  p.num_splits = a.num_splits;
  p.num_threads = a.num_threads;
}

// The parameters of a call of forward(); sinks lie in `sink_memory`.
template <class Element>
inline ForwardParams<Element> forward_params(const ForwardArguments& a,
                                             std::vector<float>& sink_memory) {
  ForwardParams<Element> p;
  set_tensors(a, p);
  set_common(a, p);
  using Query = QueryOf<Element>;
  p.qv = rows_or_null<Query>(a.qv);
  set_new(a, p);
  p.cu_seqlens_k_new = indices_or_null(a.cu_seqlens_k_new);
  p.seqused_q = indices_or_null(a.seqused_q);
  p.cache_batch_idx = indices_or_null(a.cache_batch_idx);
  p.cache_leftpad = indices_or_null(a.cache_leftpad);
  p.rotary_cos = table_or_null<Query>(a.rotary_cos);
  p.rotary_sin = table_or_null<Query>(a.rotary_sin);
  p.rotary_dim = a.rotary_cos.has_value() ? 2 * a.rotary_cos->size(1) : 0;
  p.rotary_seqlens = indices_or_null(a.rotary_seqlens);
  p.rotary_interleaved = a.rotary_interleaved;
  p.q_descale = descale_of(a.q_descale);
  p.k_descale = descale_of(a.k_descale);
  p.v_descale = descale_of(a.v_descale);
  p.k_scale = factors_of(a.k_scale);
  p.v_scale = factors_of(a.v_scale);
  p.sinks = sinks_as_float<Query>(a.sinks, sink_memory);
  if (a.draft_mask.has_value()) {
    p.draft_mask.rows = data_of<const int32_t>(*a.draft_mask);
    p.draft_mask.words = a.draft_mask->size(1);
    p.draft_mask.stride = a.draft_mask->stride(0);
  }
  p.softmax_scale = static_cast<float>(a.softmax_scale);
  p.only_qv = a.only_qv;
  return p;
}

// The parameters of a call of plain_forward().
template <class Element>
inline ForwardParams<Element> plain_params(const PlainArguments& a) {
  ForwardParams<Element> p;
  set_tensors(a, p);
  set_common(a, p);
  p.softmax_scale = static_cast<float>(a.scale());
  return p;
}

}  // namespace jit_kernel
