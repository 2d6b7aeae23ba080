// The entry of the combine library: parts of attention over disjoint keys to the whole.
//
// out = sum_i exp(lse_i - lse) out_i and lse = log(sum_i exp(lse_i)); rows that no part saw give 0
// and -inf. Any floating dtype, any strides with a unit last one; lse has out's shape without its
// last dimension, float32.
#pragma once

#include <cmath>
#include <vector>

#include "jit_kernel/cpu/element.h"
#include "jit_kernel/cpu/ffi_arguments.h"

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

// Part i of a row: where its values lie and what they weigh.
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

// out_partial (splits, ..., dv), lse_partial (splits, ...), out (..., dv), lse (...).
inline void combine(FfiArguments& a) {
  TensorView out_partial = a.tensor(), lse_partial = a.tensor(), out = a.tensor(), lse = a.tensor();
  int64_t dv = out.size(out.ndim() - 1), splits = out_partial.size(0), rows = lse.numel();
  RowWalk values{out_partial, 1, 1}, weights{lse_partial, 1, 0}, to{out, 0, 1}, to_lse{lse, 0, 0};
  std::vector<Part> parts(static_cast<size_t>(splits));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < splits; ++i) {
      float weight = *reinterpret_cast<const float*>(weights.at(i, r));
      parts[static_cast<size_t>(i)] = {values.at(i, r), out_partial.dtype(), weight, 0.0};
    }
    combine_row(parts.data(), splits, to.at(0, r), out.dtype(), dv,
                reinterpret_cast<float*>(to_lse.at(0, r)));
  }
}

// Two parts in tensors of their own; each out (..., dv) and lse (...).
inline void merge_state(FfiArguments& arguments) {
  TensorView out_a = arguments.tensor(), lse_a = arguments.tensor(), out_b = arguments.tensor();
  TensorView lse_b = arguments.tensor(), out = arguments.tensor(), lse = arguments.tensor();
  int64_t dv = out.size(out.ndim() - 1), rows = lse.numel();
  RowWalk a{out_a, 0, 1}, b{out_b, 0, 1}, weight_a{lse_a, 0, 0}, weight_b{lse_b, 0, 0};
  RowWalk to{out, 0, 1}, to_lse{lse, 0, 0};
  for (int64_t r = 0; r < rows; ++r) {
    Part parts[2] = {
        {a.at(0, r), out_a.dtype(), *reinterpret_cast<const float*>(weight_a.at(0, r)), 0.0},
        {b.at(0, r), out_b.dtype(), *reinterpret_cast<const float*>(weight_b.at(0, r)), 0.0}};
    combine_row(parts, 2, to.at(0, r), out.dtype(), dv, reinterpret_cast<float*>(to_lse.at(0, r)));
  }
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_COMBINE()                    \
  JIT_KERNEL_EXPORT(combine, 4, ::jit_kernel::combine) \
  JIT_KERNEL_EXPORT(merge_state, 6, ::jit_kernel::merge_state)
