// Whether a call is a plain one: without a mistake, and without what few calls ask for.
//
// Python checks every argument and says what is wrong with it. After a call that has driven Python
// from the caches this saves 22 us of that, 3 to 4 % of a call of 512 tokens and 8 heads. It may
// say no to anything: then Python checks, and forward() computes.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "flash_attention_v3/cpu/common/params.h"
#include "jit_kernel/cpu/element.h"
#include "jit_kernel/cpu/ffi_arguments.h"

namespace jit_kernel {

using MaybeTensor = std::optional<TensorView>;

// What Python's checks allow (argument_shapes.py).
constexpr double kLargestNumber = 3.4e38, kSmallestNumber = 1.2e-38;
constexpr int64_t kMostSplits = 256, kMostHeadDim = 512;
constexpr int64_t kMostIndex = std::numeric_limits<int32_t>::max();

template <class Element>
constexpr DLDataType dtype_of() {
  constexpr auto kBits = static_cast<uint8_t>(8 * sizeof(Element));
  if (std::is_same<Element, bf16>::value) return {kDLBfloat, kBits, 1};
  if (std::is_same<Element, e4m3>::value) return {kDLFloat8_e4m3fn, kBits, 1};
  return {kDLFloat, kBits, 1};
}

struct PlainTensors {
  TensorView q, k, v, out;
  MaybeTensor page_table, cu_seqlens_q, cu_seqlens_k, seqused_k;

  int64_t batch() const { return cu_seqlens_q.has_value() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
};

struct PlainNumbers {
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
  double softmax_scale, softcap;
  int64_t attention_chunk, num_splits;
};

// On the CPU, of this type and number of dimensions, none of them empty; unit stride in the last.
inline bool is_dense(const TensorView& t, DLDataType dtype, int32_t dims) {
  if (t.device().device_type != kDLCPU || t.ndim() != dims) return false;
  if (t.dtype().code != dtype.code || t.dtype().bits != dtype.bits || t.dtype().lanes != 1) {
    return false;
  }
  for (int32_t i = 0; i < dims; ++i) {
    if (t.size(i) < 1 || t.size(i) > kMostIndex) return false;
  }
  return t.stride(dims - 1) == 1 || t.size(dims - 1) == 1;
}

inline bool is_index(const MaybeTensor& t, int32_t dims, int64_t size) {
  return is_dense(*t, {kDLInt, 32, 1}, dims) && t->IsContiguous() && t->size(0) == size;
}

// The same sizes in all dimensions but the last.
inline bool have_same_rows(const TensorView& a, const TensorView& b) {
  for (int32_t i = 0; i + 1 < b.ndim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline bool is_written_freely(const PlainTensors& t) {
  for (int32_t i = 0; i < t.out.ndim(); ++i) {
    if (t.out.stride(i) == 0 && t.out.size(i) > 1) return false;
  }
  auto begin = [](const TensorView& x) {
    return static_cast<char*>(x.data_ptr()) + x.byte_offset();
  };
  char* out = begin(t.out);
  return out != begin(t.q) && out != begin(t.k) && out != begin(t.v);
}

// Types and shapes; `in` is the dtype of q, k and v.
inline bool shapes_fit(const PlainTensors& t, DLDataType in, DLDataType out) {
  const int32_t dims = t.cu_seqlens_q.has_value() ? 3 : 4,
                dims_k = t.cu_seqlens_k.has_value() ? 3 : 4;
  if (!is_dense(t.q, in, dims) || !is_dense(t.k, in, dims_k) || !is_dense(t.v, in, dims_k) ||
      !is_dense(t.out, out, dims)) {
    return false;
  }
  const int64_t d = t.q.size(dims - 1), dv = t.v.size(dims_k - 1);
  if (t.k.size(dims_k - 1) != d || t.out.size(dims - 1) != dv || std::max(d, dv) > kMostHeadDim ||
      t.q.size(dims - 2) % t.k.size(dims_k - 2) != 0 || !have_same_rows(t.v, t.k) ||
      !have_same_rows(t.out, t.q) || !is_written_freely(t)) {
    return false;
  }
  if (t.cu_seqlens_q.has_value() && !is_index(t.cu_seqlens_q, 1, t.cu_seqlens_q->size(0))) {
    return false;
  }
  const int64_t batch = t.batch();
  if (batch < 1) return false;
  if (t.page_table.has_value()) {
    if (dims_k != 4 || !t.seqused_k.has_value() || !is_index(t.page_table, 2, batch)) return false;
  } else if (dims_k == 4) {
    if (t.k.size(0) != batch) return false;
  } else if (!is_index(t.cu_seqlens_k, 1, batch + 1)) {
    return false;
  }
  return !t.seqused_k.has_value() || is_index(t.seqused_k, 1, batch);
}

inline bool is_number(double x) { return x >= kSmallestNumber && x <= kLargestNumber; }

inline bool numbers_fit(const PlainNumbers& n) {
  return is_number(n.softmax_scale) && (n.softcap == 0.0 || is_number(n.softcap)) &&
         n.attention_chunk >= 0 && n.attention_chunk <= kMostIndex && n.num_splits >= 0 &&
         n.num_splits <= kMostSplits;
}

// Offsets of `batch` sequences in so many rows.
inline bool are_offsets(const int32_t* at, int64_t batch, int64_t rows) {
  if (at[0] != 0 || at[batch] > rows) return false;
  for (int64_t b = 0; b < batch; ++b) {
    if (at[b + 1] < at[b]) return false;
  }
  return true;
}

// Each sequence's lengths; every row of q must be one's, as the others' results are Python's.
template <class Params>
inline bool lengths_fit(const Params& p, const PlainNumbers& n) {
  if (p.cu_seqlens_q &&
      (!are_offsets(p.cu_seqlens_q, p.batch, p.rows_q) || p.cu_seqlens_q[p.batch] != p.rows_q)) {
    return false;
  }
  if (p.cu_seqlens_k && !are_offsets(p.cu_seqlens_k, p.batch, p.rows_k)) return false;
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t room = p.page_size      ? p.table_width * p.page_size
                   : p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]
                                    : p.rows_k;
    const Sequence s = sequence_of(p, b);
    if (s.sk < 0 || s.sk > room) return false;
    longest_q = std::max(longest_q, s.sq), longest_k = std::max(longest_k, s.sk);
  }
  auto fits = [](std::optional<int64_t> given, int64_t least) {
    return !given.has_value() || (*given >= least && *given <= kMostIndex);
  };
  return fits(n.max_seqlen_q, longest_q) && fits(n.max_seqlen_k, longest_k);
}

}  // namespace jit_kernel
