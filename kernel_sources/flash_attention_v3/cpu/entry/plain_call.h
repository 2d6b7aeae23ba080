// Whether a call is a plain one: without a mistake, and without rarely used arguments.
//
// Python checks every argument and says what is wrong with it. After a call that has driven Python
// from the caches this saves 22 us of that, 3 to 4 % of a call of 512 tokens and 8 heads. It may
// decline any call: then Python checks, and forward() computes.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/entry/arguments.h"
#include "jit_kernel/cpu/element.h"
#include "jit_kernel/host/plain_tensor.h"

namespace jit_kernel {

constexpr int64_t kMostHeadDim = 512;  // as fa3/cpu has it; a test compares them
constexpr DLDevice kOnCpu = {kDLCPU, 0};

template <class Element>
constexpr DLDataType dtype_of() {
  constexpr auto kBits = static_cast<uint8_t>(8 * sizeof(Element));
  if (std::is_same<Element, bf16>::value) return {kDLBfloat, kBits, 1};
  if (std::is_same<Element, e4m3>::value) return {kDLFloat8_e4m3fn, kBits, 1};
  return {kDLFloat, kBits, 1};
}

inline bool is_index(const MaybeTensor& t, uintptr_t lowest, int32_t dims, int64_t size) {
  return is_dense(*t, kOnCpu, lowest, kIndexType, dims) && t->IsContiguous() && t->size(0) == size;
}

// Whether out has memory of its own. Ranges that meet may still be slices of one buffer: Python
// looks at those.
inline bool is_written_freely(const PlainArguments& a) {
  const Extent out = extent_of(a.out);
  auto is_apart = [&](const Extent& x) { return are_apart(x, out); };
  auto is_index_apart = [&](const MaybeTensor& t) {
    return !t.has_value() || is_apart(extent_of(*t));
  };
  return !may_overlap_itself(a.out) && is_apart(extent_of(a.q)) && is_apart(extent_of(a.k)) &&
         is_apart(extent_of(a.v)) && is_index_apart(a.page_table) &&
         is_index_apart(a.cu_seqlens_q) && is_index_apart(a.cu_seqlens_k) &&
         is_index_apart(a.seqused_k);
}

// Types and shapes, and no address below `low`.
template <class Element>
inline bool shapes_fit(const PlainArguments& a, uintptr_t low) {
  constexpr DLDataType in = dtype_of<Element>(), out = dtype_of<typename OutputOf<Element>::type>();
  const int32_t dims = a.cu_seqlens_q.has_value() ? 3 : 4,
                dims_k = a.cu_seqlens_k.has_value() ? 3 : 4;
  if (!is_dense(a.q, kOnCpu, low, in, dims) || !is_dense(a.k, kOnCpu, low, in, dims_k) ||
      !is_dense(a.v, kOnCpu, low, in, dims_k) || !is_dense(a.out, kOnCpu, low, out, dims)) {
    return false;
  }
  const int64_t d = a.q.size(dims - 1), dv = a.v.size(dims_k - 1);
  if (a.k.size(dims_k - 1) != d || a.out.size(dims - 1) != dv || std::max(d, dv) > kMostHeadDim ||
      a.q.size(dims - 2) % a.k.size(dims_k - 2) != 0 || !have_same_rows(a.v, a.k) ||
      !have_same_rows(a.out, a.q) || !is_written_freely(a)) {
    return false;
  }
  if (a.cu_seqlens_q.has_value() &&
      (a.cu_seqlens_q->ndim() != 1 || !is_index(a.cu_seqlens_q, low, 1, a.cu_seqlens_q->size(0)))) {
    return false;
  }
  const int64_t batch = a.batch();
  if (batch < 1) return false;
  if (a.page_table.has_value()) {
    if (dims_k != 4 || !a.seqused_k.has_value() || !is_index(a.page_table, low, 2, batch))
      return false;
  } else if (dims_k == 4) {
    if (a.k.size(0) != batch) return false;
  } else if (!is_index(a.cu_seqlens_k, low, 1, batch + 1)) {
    return false;
  }
  return !a.seqused_k.has_value() || is_index(a.seqused_k, low, 1, batch);
}

inline bool numbers_fit(const PlainArguments& a) {
  return is_number(a.scale()) && (a.softcap == 0.0 || is_number(a.softcap)) &&
         a.attention_chunk >= 0 && a.attention_chunk <= kMostIndex && a.num_splits >= 0 &&
         a.num_splits <= kMostSplits;
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
inline bool lengths_fit(const Params& p, const PlainArguments& a) {
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
    longest_q = std::max(longest_q, s.sq);
    longest_k = std::max(longest_k, s.sk);
  }
  auto fits = [](std::optional<int64_t> given, int64_t least) {
    return !given.has_value() || (*given >= least && *given <= kMostIndex);
  };
  return fits(a.max_seqlen_q, longest_q) && fits(a.max_seqlen_k, longest_k);
}

}  // namespace jit_kernel
