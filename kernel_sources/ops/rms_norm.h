// Rows divided by their root mean square, times a weight: x / sqrt(mean(x^2) + eps) * (w + bias).
//
// With a residual, residual += x first, rounded to its type, and that sum is what is normed. e4m3
// out: divided by *scale and rounded once. One read and one write of each row: it stays in
// registers, or in the nearest cache of a CPU.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

// kKept pieces of a row for each thread stay in registers, with their weights, which are asked for
// before the sum is there; the rest of a longer row is read again.
template <class T, class Weight, class Out, bool kResidual, bool kWide, int kKept>
__global__ void __launch_bounds__(kMostThreads)
    rms_norm(const T* x, T* residual, const Weight* weight, Out* out, const float* scale,
             Index rows, int inner, Index size, Index x_outer, Index x_inner, Index residual_outer,
             Index residual_inner, Index out_outer, Index out_inner, float eps, float weight_bias) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const Index row = own_row(), step = static_cast<Index>(blockDim.x) * kCount;
  const Index begin = static_cast<Index>(threadIdx.x) * kCount, end = row < rows ? size : 0;
  const T* from = nested_row(x, row, inner, x_outer, x_inner);
  T* sums = kResidual ? nested_row(residual, row, inner, residual_outer, residual_inner) : nullptr;
  Out* to = nested_row(out, row, inner, out_outer, out_inner);

  float squares = 0.0f;
  auto add = [&](Index i, unsigned (&words)[4], const unsigned (&more)[4], bool store) {
    float a[kCount];
    unpack<T>(words, a);
    if constexpr (kResidual) {
      float b[kCount];
      unpack<T>(more, b);
#pragma unroll
      for (int j = 0; j < kCount; ++j) a[j] += b[j];
      pack<T>(a, words);
      if (store) store_packed<T, kWide, kCount>(sums, i, end, words);
      unpack<T>(words, a);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) squares += a[j] * a[j];
  };
  unsigned kept[kKept][4], other[kKept][4], weights[kKept][kWords<Weight, kCount>];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    load_packed<T, kWide, kCount>(from, begin + k * step, end, kept[k]);
    if (kResidual) load_packed<T, kWide, kCount>(sums, begin + k * step, end, other[k]);
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    load_packed<Weight, kWide, kCount>(weight, begin + k * step, end, weights[k]);
  }
  const float inverse = scale ? 1.0f / *scale : 1.0f, share = 1.0f / static_cast<float>(size);
#pragma unroll
  for (int k = 0; k < kKept; ++k) add(begin + k * step, kept[k], other[k], false);
  for (Index i = begin + kKept * step; i < end; i += step) {
    unsigned words[4], more[4];
    load_packed<T, kWide, kCount>(from, i, end, words);
    if (kResidual) load_packed<T, kWide, kCount>(sums, i, end, more);
    add(i, words, more, true);
  }

  const float factor = rsqrtf(over_row<Sum>(squares) * share + eps) * inverse;
  auto norm = [&](Index i, const unsigned (&words)[4],
                  const unsigned (&of_weight)[kWords<Weight, kCount>]) {
    float a[kCount], w[kCount];
    unpack<T>(words, a);
    unpack<Weight>(of_weight, w);
#pragma unroll
    for (int j = 0; j < kCount; ++j) a[j] = a[j] * factor * (w[j] + weight_bias);
    store_floats<Out, kWide, kCount>(to, i, end, a);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    // Behind all reads: 1 % less than before the sum.
    if (kResidual) store_packed<T, kWide, kCount>(sums, begin + k * step, end, kept[k]);
    norm(begin + k * step, kept[k], weights[k]);
  }
  for (Index i = begin + kKept * step; i < end; i += step) {
    unsigned words[4], of_weight[kWords<Weight, kCount>];
    load_packed<T, kWide, kCount>(kResidual ? sums : from, i, end, words);
    load_packed<Weight, kWide, kCount>(weight, i, end, of_weight);
    norm(i, words, of_weight);
  }
}

}  // namespace jit_kernel

#else
#include <cmath>
#include <vector>

#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

// residual += x, rounded to their type.
template <class T>
inline void add_row(const T* x, T* residual, int64_t size) {
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    write(residual + i, read(residual + i, size - i) + read(x + i, size - i), size - i);
  }
}

struct NormCall {
  int64_t rows, size;
  Nesting x, residual, out;
  float eps, scale;
  int64_t threads;
};

template <class T, class Out>
inline void norm_rows(const T* x, T* residual, const std::vector<float>& weight, Out* out,
                      const NormCall& call) {
  const int64_t size = call.size;
  const int64_t row_bytes =
      size * static_cast<int64_t>(sizeof(T) * (residual ? 3 : 1) + sizeof(Out));
  const bool past = streams(out, call.rows, size, call.out);
  parallel_rows(call.rows, row_bytes, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + call.x.at(r);
      T* sums = residual ? residual + call.residual.at(r) : nullptr;
      if (sums) add_row(row, sums, size);
      const T* from = sums ? sums : row;
      const float mean = sum_of_squares(from, size) / static_cast<float>(size);
      const simd::Vec factor = simd::set1(1.0f / (std::sqrt(mean + call.eps) * call.scale));
      Out* to = out + call.out.at(r);
      for (int64_t i = 0; i < size; i += simd::kLanes) {
        const simd::Vec by = simd::load(weight.data() + i) * factor;
        write(to + i, read(from + i, size - i) * by, size - i, past);
      }
    }
  });
}

inline void rms_norm(TensorArguments& from) {
  const DLTensor& x = from.tensor();
  const DLTensor* residual = from.maybe_tensor();
  const DLTensor &weight = from.tensor(), &out = from.tensor();
  const DLTensor* scale = from.maybe_tensor();
  NormCall call;
  call.rows = from.integer();
  const int64_t inner = from.integer();
  call.size = from.integer();
  for (Nesting* nesting : {&call.x, &call.residual, &call.out}) {
    nesting->inner = inner;
    nesting->outer_stride = from.integer();
    nesting->inner_stride = from.integer();
  }
  call.eps = from.number();
  const float bias = from.number();
  call.scale = scale ? *data_of<float>(*scale) : 1.0f;
  call.threads = from.integer();

  std::vector<float> factors(static_cast<size_t>(call.size + simd::kLanes), 0.0f);
  with_element<f32, bf16, fp16>(weight, "weight", [&](auto element) {
    simd::convert_to_float(data_of<decltype(element)>(weight), factors.data(), call.size);
  });
  for (float& factor : factors) factor += bias;
  with_element<f32, bf16, fp16>(x, "x", [&](auto element) {
    using T = decltype(element);
    with_element<T, e4m3>(out, "out", [&](auto result) {
      norm_rows(data_of<T>(x), data_of<T>(residual), factors, data_of<decltype(result)>(out), call);
    });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_RMS_NORM() JIT_KERNEL_EXPORT_PLAIN(rms_norm, 17, ::jit_kernel::rms_norm)
#endif
