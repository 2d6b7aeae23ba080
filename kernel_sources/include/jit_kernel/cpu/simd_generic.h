// Vectors of 4 floats through the vector extensions of GCC and clang: any target, aarch64 included.
// The interface is that of simd.h.
#pragma once

#include "jit_kernel/cpu/element.h"

namespace jit_kernel {
namespace simd {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
#ifdef __aarch64__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // contracted where there is an FMA
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
inline Vec max(Vec a, Vec b) { return where_less(b, a, a, b); }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & INT32_MAX); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(magnitude) |
                               (reinterpret_cast<IntVec>(sign) & INT32_MIN));
}
inline float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float reduce_max(Vec a) {
  float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

// 2^x for x below 128; below -126 it is 0. Relative error: 7.5e-8.
template <int kDegree>
inline Vec exp2(Vec x) {
  const Vec lowest = set1(-126.0f), shift = set1(12582912.0f);  // 1.5 * 2^23 rounds to an integer
  // In this order a NaN stays one: it is the second operand.
  Vec bounded = max(lowest, x), shifted = bounded + shift;
  Vec f = bounded - (shifted - shift);
  Vec y = fma(set1(0.00132764668f), f, set1(0.00967554129f));
  y = fma(y, f, set1(0.0555071329f));
  y = fma(y, f, set1(0.240221197f));
  y = fma(y, f, set1(0.693146967f));
  y = fma(y, f, set1(1.0f));
  IntVec power = reinterpret_cast<IntVec>(shifted) << 23;
  y = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) + power);
  return where_less(x, lowest, zero(), y);
}

template <class Element>
inline Vec load_as_float(const Element* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class Element>
inline void store_as(Element* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Element>(x[i]);
}

// y[i] = the sum of x[i]'s lanes.
inline Vec reduce_each(const Vec (&x)[4]) {
  return Vec{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])};
}

// y[i] = the largest of x[i]'s lanes.
inline Vec reduce_max_each(const Vec (&x)[4]) {
  float largest[kLanes];
  for (int i = 0; i < kLanes; ++i) largest[i] = reduce_max(x[i]);
  return load(largest);
}

}  // namespace simd
}  // namespace jit_kernel
