// The entry of the combine library: parts of attention over disjoint keys to the whole.
//
// out = sum_i exp(lse_i - lse) out_i and lse = log(sum_i exp(lse_i)); rows that no part saw give 0
// and -inf. A part that saw nothing has an lse of -inf, or of +inf as FlashAttention-2 marks it.
// Any floating dtype, any strides with a unit last one; lse has out's shape without its last
// dimension, float32.
#pragma once

#include <cmath>
#include <vector>

#include "flash_attention_v3/cpu/entry/arguments.h"
#include "jit_kernel/cpu/element.h"

namespace jit_kernel {

inline float load_any(const char* p, int64_t i, DLDataType dtype) {
  if (dtype.bits == 32) return reinterpret_cast<const float*>(p)[i];
  if (dtype.code == kDLBfloat) return to_float(reinterpret_cast<const bf16*>(p)[i]);
  return to_float(reinterpret_cast<const fp16*>(p)[i]);
}

inline void store_any(char* p, int64_t i, DLDataType dtype, float x) {
  if (dtype.bits == 32) {
    reinterpret_cast<float*>(p)[i] = x;
  } else if (dtype.code == kDLBfloat) {
    reinterpret_cast<bf16*>(p)[i] = from_float<bf16>(x);
  } else {
    reinterpret_cast<fp16*>(p)[i] = from_float<fp16>(x);
  }
}

// A tensor's rows in order: all dimensions but the `inner` last ones, and the first `skip`, in one
// count.
struct RowWalk {
  const TensorView& t;
  int32_t skip, inner;

  char* at(int64_t outer, int64_t row) const {
    int64_t offset = skip ? outer * t.stride(0) : 0;
    for (int32_t i = t.ndim() - inner - 1; i >= skip; --i) {
      offset += row % t.size(i) * t.stride(i);
      row /= t.size(i);
    }
    int64_t bytes = t.dtype().bits / 8;
    return static_cast<char*>(t.data_ptr()) + t.byte_offset() + offset * bytes;
  }
};

// Part i of a row: where its values lie, and their weight.
struct Part {
  const char* values;
  DLDataType dtype;
  double lse, weight;
};

inline void combine_row(Part* parts, int64_t count, char* out, DLDataType dtype, int64_t dv,
                        float* lse) {
  double maximum = -INFINITY, sum = 0.0;
  for (int64_t i = 0; i < count; ++i) maximum = std::fmax(maximum, parts[i].lse);
  for (int64_t i = 0; i < count; ++i) {
    parts[i].weight = parts[i].lse == -INFINITY ? 0.0 : std::exp(parts[i].lse - maximum);
    sum += parts[i].weight;
  }
  *lse = sum == 0.0 ? -INFINITY : static_cast<float>(maximum + std::log(sum));
  for (int64_t j = 0; j < dv; ++j) {
    double value = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      if (parts[i].weight == 0.0) continue;  // its values may be anything
      value += parts[i].weight / sum * load_any(parts[i].values, j, parts[i].dtype);
    }
    store_any(out, j, dtype, static_cast<float>(value));
  }
}

inline double lse_at(const RowWalk& lse, int64_t outer, int64_t row) {
  const float x = *reinterpret_cast<const float*>(lse.at(outer, row));
  return x == INFINITY ? -INFINITY : x;
}

inline void combine(FfiArguments& from) {
  const CombineArguments a(from);
  const int64_t dv = a.out.size(a.out.ndim() - 1), splits = a.out_partial.size(0);
  const RowWalk values{a.out_partial, 1, 1}, weights{a.lse_partial, 1, 0};
  const RowWalk to{a.out, 0, 1}, to_lse{a.lse, 0, 0};
  std::vector<Part> parts(static_cast<size_t>(splits));
  for (int64_t r = 0; r < a.lse.numel(); ++r) {
    for (int64_t i = 0; i < splits; ++i) {
      parts[static_cast<size_t>(i)] = {values.at(i, r), a.out_partial.dtype(),
                                       lse_at(weights, i, r), 0.0};
    }
    combine_row(parts.data(), splits, to.at(0, r), a.out.dtype(), dv,
                reinterpret_cast<float*>(to_lse.at(0, r)));
  }
}

inline void merge_state(FfiArguments& from) {
  const MergeArguments a(from);
  const int64_t dv = a.out.size(a.out.ndim() - 1);
  const RowWalk values_a{a.out_a, 0, 1}, weights_a{a.lse_a, 0, 0};
  const RowWalk values_b{a.out_b, 0, 1}, weights_b{a.lse_b, 0, 0};
  const RowWalk to{a.out, 0, 1}, to_lse{a.lse, 0, 0};
  for (int64_t r = 0; r < a.lse.numel(); ++r) {
    Part parts[2] = {{values_a.at(0, r), a.out_a.dtype(), lse_at(weights_a, 0, r), 0.0},
                     {values_b.at(0, r), a.out_b.dtype(), lse_at(weights_b, 0, r), 0.0}};
    combine_row(parts, 2, to.at(0, r), a.out.dtype(), dv,
                reinterpret_cast<float*>(to_lse.at(0, r)));
  }
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_COMBINE()                                                         \
  JIT_KERNEL_EXPORT(combine, ::jit_kernel::CombineArguments::kCount, ::jit_kernel::combine) \
  JIT_KERNEL_EXPORT(merge_state, ::jit_kernel::MergeArguments::kCount, ::jit_kernel::merge_state)
