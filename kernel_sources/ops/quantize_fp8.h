// Rows to e4m3 and a scale each, largest |x| / 448, or to e4m3 by one scale of the whole tensor.
// A row here is what shares a scale: a token, or a group of 128 of its numbers.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"
#else
#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"
#endif

namespace jit_kernel {

constexpr float kLargestE4m3 = 448.0f;
// What a row of smaller numbers counts as, so that a scale is never zero, nor its inverse infinite.
constexpr float kSmallestLargest = 1e-12f;

}  // namespace jit_kernel

#ifdef __CUDACC__
namespace jit_kernel {

template <class T>
__device__ __forceinline__ float largest_of(const unsigned (&words)[4]) {
  float x[kPiece<T>], largest = 0.0f;
  unpack<T>(words, x);
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) largest = fmaxf(largest, fabsf(x[j]));
  return largest;
}

template <class T, bool kWide>
__device__ __forceinline__ void give_e4m3(const unsigned (&words)[4], float factor, e4m3* row,
                                          Index begin, Index size) {
  float x[kPiece<T>];
  unpack<T>(words, x);
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) x[j] *= factor;
  store_floats<e4m3, kWide, kPiece<T>>(row, begin, size, x);
}

// kKept pieces of a row for each thread stay in registers; the rest of a longer row is read again.
template <class T, bool kWide, int kKept>
__global__ void __launch_bounds__(kMostThreads)
    quantize_rows(const T* x, e4m3* out, float* scales, Index rows, int inner, Index size,
                  Index x_outer, Index x_inner, Index out_outer, Index out_inner, Index scale_outer,
                  Index scale_inner) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const Index row = own_row(), step = static_cast<Index>(blockDim.x) * kCount;
  const Index begin = static_cast<Index>(threadIdx.x) * kCount, end = row < rows ? size : 0;
  const T* from = nested_row(x, row, inner, x_outer, x_inner);
  e4m3* to = nested_row(out, row, inner, out_outer, out_inner);
  unsigned kept[kKept][4];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    load_packed<T, kWide, kCount>(from, begin + k * step, end, kept[k]);
  }
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kKept; ++k) largest = fmaxf(largest, largest_of<T>(kept[k]));
  for (Index i = begin + kKept * step; i < end; i += step) {
    unsigned words[4];
    load_packed<T, kWide, kCount>(from, i, end, words);
    largest = fmaxf(largest, largest_of<T>(words));
  }
  largest = fmaxf(over_row<Largest>(largest), kSmallestLargest);
  const float factor = kLargestE4m3 / largest;
#pragma unroll
  for (int k = 0; k < kKept; ++k) give_e4m3<T, kWide>(kept[k], factor, to, begin + k * step, end);
  for (Index i = begin + kKept * step; i < end; i += step) {
    unsigned words[4];
    load_packed<T, kWide, kCount>(from, i, end, words);
    give_e4m3<T, kWide>(words, factor, to, i, end);
  }
  if (threadIdx.x == 0 && row < rows) {
    *nested_row(scales, row, inner, scale_outer, scale_inner) = largest / kLargestE4m3;
  }
}

// The largest |x| of the rows that a block takes, one number a block.
template <class T, bool kWide>
__global__ void __launch_bounds__(kMostThreads)
    largest_parts(const T* x, float* parts, Index rows, int inner, Index size, Index x_outer,
                  Index x_inner) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const Index step = static_cast<Index>(blockDim.x) * kCount;
  float largest = 0.0f;
  for (Index row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = nested_row(x, row, inner, x_outer, x_inner);
    for (Index i = static_cast<Index>(threadIdx.x) * kCount; i < size; i += 2 * step) {
      unsigned first[4], second[4];
      load_packed<T, kWide, kCount>(from, i, size, first);
      load_packed<T, kWide, kCount>(from, i + step, size, second);
      largest = fmaxf(largest, fmaxf(largest_of<T>(first), largest_of<T>(second)));
    }
  }
  largest = over_row<Largest>(largest);
  if (threadIdx.x == 0) parts[blockIdx.x] = largest;
}

// By one scale: *scale as it is where there are no parts, else their largest / 448, which is
// written.
template <class T, bool kWide, int kPieces>
__global__ void __launch_bounds__(kMostThreads)
    quantize_tensor(const T* x, e4m3* out, float* scale, const float* parts, int part_count,
                    Index rows, int inner, Index size, Index x_outer, Index x_inner,
                    Index out_outer, Index out_inner) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const Index row = own_row(), step = static_cast<Index>(blockDim.x) * kCount;
  const Index begin = blockIdx.y * step * kPieces + threadIdx.x * kCount;
  const Index end = row < rows ? size : 0;
  const T* from = nested_row(x, row, inner, x_outer, x_inner);
  e4m3* to = nested_row(out, row, inner, out_outer, out_inner);
  unsigned words[kPieces][4];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    load_packed<T, kWide, kCount>(from, begin + k * step, end, words[k]);
  }
  float factor;
  if (parts) {
    float largest = kSmallestLargest;
    for (int i = static_cast<int>(threadIdx.x); i < part_count; i += static_cast<int>(blockDim.x)) {
      largest = fmaxf(largest, parts[i]);
    }
    largest = over_row<Largest>(largest);
    factor = kLargestE4m3 / largest;
    if (threadIdx.x + threadIdx.y + blockIdx.x + blockIdx.y == 0) *scale = largest / kLargestE4m3;
  } else {
    factor = 1.0f / *scale;
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    give_e4m3<T, kWide>(words[k], factor, to, begin + k * step, end);
  }
}

}  // namespace jit_kernel

#else
namespace jit_kernel {

// In two maxima that do not wait for each other.
template <class T>
inline float largest_of(const T* x, int64_t size) {
  simd::Vec even = simd::zero(), odd = simd::zero();
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    const simd::Vec a = simd::abs(read(x + i, size - i));
    std::swap(even, odd);
    even = simd::where_less(even, a, a, even);  // a NaN is not larger
  }
  return simd::reduce_max(simd::max(even, odd));
}

struct QuantizeCall {
  int64_t rows, size, threads;
  Nesting x, out, scales;
};

inline QuantizeCall read_call(TensorArguments& from, bool with_scales) {
  QuantizeCall call{};
  call.rows = from.integer();
  const int64_t inner = from.integer();
  call.size = from.integer();
  call.x = {inner, 0, 0}, call.out = {inner, 0, 0}, call.scales = {inner, 0, 0};
  for (Nesting* each : {&call.x, &call.out, &call.scales}) {
    if (each == &call.scales && !with_scales) break;
    each->outer_stride = from.integer();
    each->inner_stride = from.integer();
  }
  call.threads = from.integer();
  return call;
}

template <class T>
inline void give_e4m3(const T* from, e4m3* to, int64_t size, float factor, bool past) {
  const simd::Vec by = simd::set1(factor);
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    write(to + i, read(from + i, size - i) * by, size - i, past);
  }
}

inline void quantize_rows(TensorArguments& from) {
  const DLTensor &x = from.tensor(), &out = from.tensor(), &scales = from.tensor();
  const QuantizeCall call = read_call(from, true);
  e4m3* results = data_of<e4m3>(out);
  const bool past = streams(results, call.rows, call.size, call.out);
  with_element<f32, bf16, fp16>(x, "x", [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = call.size * static_cast<int64_t>(sizeof(T) + 1);
    parallel_rows(call.rows, bytes, call.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = data_of<T>(x) + call.x.at(r);
        const float largest = std::max(largest_of(row, call.size), kSmallestLargest);
        give_e4m3(row, results + call.out.at(r), call.size, kLargestE4m3 / largest, past);
        data_of<float>(scales)[call.scales.at(r)] = largest / kLargestE4m3;
      }
    });
  });
}

// The last argument but the call's: whether the scale is the tensor's largest / 448, and is
// written.
inline void quantize_tensor(TensorArguments& from) {
  const DLTensor &x = from.tensor(), &out = from.tensor(), &scale = from.tensor();
  const bool finds_scale = from.boolean();
  const QuantizeCall call = read_call(from, false);
  e4m3* results = data_of<e4m3>(out);
  const bool past = streams(results, call.rows, call.size, call.out);
  with_element<f32, bf16, fp16>(x, "x", [&](auto element) {
    using T = decltype(element);
    const T* numbers = data_of<T>(x);
    if (finds_scale) {
      std::mutex joining;
      float largest = kSmallestLargest;
      const int64_t bytes = call.size * static_cast<int64_t>(sizeof(T));
      parallel_rows(call.rows, bytes, call.threads, [&](int64_t begin, int64_t end) {
        float mine = 0.0f;
        for (int64_t r = begin; r < end; ++r) {
          mine = std::max(mine, largest_of(numbers + call.x.at(r), call.size));
        }
        const std::lock_guard<std::mutex> lock(joining);
        largest = std::max(largest, mine);
      });
      *data_of<float>(scale) = largest / kLargestE4m3;
    }
    const float factor = 1.0f / *data_of<float>(scale);
    const int64_t bytes = call.size * static_cast<int64_t>(sizeof(T) + 1);
    parallel_rows(call.rows, bytes, call.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        give_e4m3(numbers + call.x.at(r), results + call.out.at(r), call.size, factor, past);
      }
    });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_QUANTIZE_FP8()                                  \
  JIT_KERNEL_EXPORT_PLAIN(quantize_rows, 13, ::jit_kernel::quantize_rows) \
  JIT_KERNEL_EXPORT_PLAIN(quantize_tensor, 12, ::jit_kernel::quantize_tensor)
#endif
