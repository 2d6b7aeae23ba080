// silu(a) * b of rows that hold a, then b: a / (1 + exp(-a)) * b. e4m3 out: divided by *scale and
// rounded once.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

// A block's y: its part of the columns; kPieces a thread.
template <class T, class Out, bool kWide, int kPieces>
__global__ void __launch_bounds__(kMostThreads)
    silu_and_mul(const T* x, Out* out, const float* scale, Index rows, int inner, Index size,
                 Index x_outer, Index x_inner, Index out_outer, Index out_inner) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const Index row = own_row();
  if (row >= rows) return;
  const Index step = static_cast<Index>(blockDim.x) * kCount;
  const Index begin = blockIdx.y * step * kPieces + threadIdx.x * kCount;
  const T* gate = nested_row(x, row, inner, x_outer, x_inner);
  const T* up = reinterpret_cast<const T*>(address(gate, size));
  Out* to = nested_row(out, row, inner, out_outer, out_inner);
  unsigned gates[kPieces][4], ups[kPieces][4];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    load_packed<T, kWide, kCount>(gate, begin + k * step, size, gates[k]);
    load_packed<T, kWide, kCount>(up, begin + k * step, size, ups[k]);
  }
  const float factor = scale ? 1.0f / *scale : 1.0f;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    float a[kCount], b[kCount];
    unpack<T>(gates[k], a);
    unpack<T>(ups[k], b);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kElementBytes<T> == 4) {
        a[j] = a[j] / (1.0f + expf(-a[j])) * b[j] * factor;
      } else {
        a[j] = __fdividef(a[j], 1.0f + __expf(-a[j])) * b[j] * factor;
      }
    }
    store_floats<Out, kWide, kCount>(to, begin + k * step, size, a);
  }
}

}  // namespace jit_kernel

#else
#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

inline simd::Vec silu(simd::Vec a) {
  // Below -87.3, where exp(-a) would overflow, the result is within 1.1e-36 of nothing; a NaN is
  // not less, and stays.
  const simd::Vec least = simd::set1(-87.3f), bounded = simd::where_less(a, least, least, a);
  const simd::Vec power = simd::exp2<6>(bounded * simd::set1(-1.44269504f));
  return bounded / (simd::set1(1.0f) + power);
}

inline void silu_and_mul(TensorArguments& from) {
  const DLTensor &x = from.tensor(), &out = from.tensor();
  const DLTensor* scale = from.maybe_tensor();
  const int64_t rows = from.integer(), inner = from.integer(), size = from.integer();
  const int64_t x_outer = from.integer(), x_inner = from.integer();
  const int64_t out_outer = from.integer(), out_inner = from.integer();
  const int64_t threads = from.integer();
  const Nesting x_rows{inner, x_outer, x_inner}, out_rows{inner, out_outer, out_inner};
  const simd::Vec factor = simd::set1(scale ? 1.0f / *data_of<float>(scale) : 1.0f);

  auto run = [&](const auto* gates, auto* results) {
    const bool past = streams(results, rows, size, out_rows);
    const int64_t row_bytes = size * static_cast<int64_t>(2 * sizeof(*gates) + sizeof(*results));
    parallel_rows(rows, row_bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const auto* gate = gates + x_rows.at(r);
        auto* to = results + out_rows.at(r);
        for (int64_t i = 0; i < size; i += simd::kLanes) {
          const simd::Vec up = read(gate + size + i, size - i) * factor;
          write(to + i, silu(read(gate + i, size - i)) * up, size - i, past);
        }
      }
    });
  };
  with_element<f32, bf16, fp16>(x, "x", [&](auto element) {
    using T = decltype(element);
    with_element<T, e4m3>(out, "out",
                          [&](auto result) { run(data_of<T>(x), data_of<decltype(result)>(out)); });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_SILU_AND_MUL() \
  JIT_KERNEL_EXPORT_PLAIN(silu_and_mul, 11, ::jit_kernel::silu_and_mul)
#endif
