// Vectors of floats of the width that the target's instruction set has.
//
// Vec, kLanes and kRegisters; zero, set1, load, store, fma (a * b + c), max, abs, where_less,
// copy_sign, reduce_add, reduce_max, reduce_each, exp2; load_as_float and store_as for every
// element type. max(a, b) is b where either is a NaN, as x86's instruction has it. With
// __AVX512BF16__ also load_pairs, set1_pair and dot_pairs: 16 sums of pairs of bf16.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define JIT_KERNEL_AVX512 1
#include "jit_kernel/cpu/simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define JIT_KERNEL_CONVERTS_TWO 1
#include "jit_kernel/cpu/simd_avx2.h"
#else
#include "jit_kernel/cpu/simd_generic.h"
#endif

#if defined(JIT_KERNEL_AVX512) && defined(__AVX512VNNI__)
#define JIT_KERNEL_I16_DOT 1
#endif
#if defined(JIT_KERNEL_AVX512) && defined(__AVX512BF16__)
#define JIT_KERNEL_BF16_DOT 1
#endif
#if defined(JIT_KERNEL_BF16_DOT) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define JIT_KERNEL_AMX 1
#endif

namespace jit_kernel {
namespace simd {

#ifndef JIT_KERNEL_STORES_E4M3
inline void store_as(e4m3* p, Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<e4m3>(lanes[i]);
}
#endif

// tanh(x): an odd polynomial below 0.625, so that small values keep their relative precision
// (Cephes' tanhf), else 1 - 2 / (exp(2 |x|) + 1). Absolute error below 3e-7.
inline Vec tanh(Vec x) {
  Vec a = abs(x), square = x * x;
  Vec p = fma(set1(-5.70498872745e-3f), square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  Vec small = fma(p * square, x, x);
  // 2 log2(e) = 2.885...; from 9 on tanh is 1 in float32, and exp2 must not overflow
  Vec bounded = where_less(a, set1(10.0f), a, set1(10.0f));
  Vec large = set1(1.0f) - set1(2.0f) / (exp2<6>(bounded * set1(2.8853900818f)) + set1(1.0f));
  return where_less(a, set1(0.625f), small, copy_sign(large, x));
}

// n elements to floats; reads and writes nothing past them.
template <class Element>
inline void convert_to_float(const Element* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_as_float(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

#ifndef JIT_KERNEL_AVX512
template <class Element>
inline void stream_as(Element* p, Vec x) {
  store_as(p, x);
}
inline void stream_end() {}
#endif

// convert_from_float() past the caches: a line that is written whole is not read first. `to` is at
// a multiple of 64 bytes, n elements are such a multiple; stream_end() before others may read them.
template <class Element>
inline void stream_from_float(const float* from, Element* to, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) stream_as(to + i, load(from + i) * set1(factor));
}

// n floats times a factor to elements; reads and writes nothing past them.
template <class Element>
inline void convert_from_float(const float* from, Element* to, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_as(to + i, load(from + i) * set1(factor));
  for (; i < n; ++i) to[i] = from_float<Element>(from[i] * factor);
}

// n floats, a multiple of kLanes, times a factor.
inline void scale_floats(float* row, int64_t n, float factor) {
  Vec by = set1(factor);
  for (int64_t j = 0; j < n; j += kLanes) store(row + j, load(row + j) * by);
}

}  // namespace simd
}  // namespace jit_kernel
