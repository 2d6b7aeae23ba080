// Vectors of 8 floats: AVX2, FMA and F16C. The interface is that of simd.h.
#pragma once

#include <immintrin.h>

#include "jit_kernel/cpu/element.h"

namespace jit_kernel {
namespace simd {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }

inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// The elements of `yes` where a < b, else those of `no`.
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(sign, set1(-0.0f)));
}

// 2^x for x below 128; below -126 it is 0. Relative error: 7.5e-8.
template <int kDegree>
inline Vec exp2(Vec x) {
  Vec bounded = max(set1(-126.0f), x);  // in this order a NaN stays one: it is the second operand
  Vec n = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec f = _mm256_sub_ps(bounded, n);
  Vec y = fma(set1(0.00132764668f), f, set1(0.00967554129f));
  y = fma(y, f, set1(0.0555071329f));
  y = fma(y, f, set1(0.240221197f));
  y = fma(y, f, set1(0.693146967f));
  y = fma(y, f, set1(1.0f));
  __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ), y);
}

inline Vec load_as_float(const f32* p) { return load(p); }
inline Vec load_as_float(const bf16* p) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load_as_float(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// e4m3 numbers, extended to 16 bits, as fp16 numbers of a 256th: the bits of one, shifted, are
// those of the other, subnormal numbers included.
inline __m256i as_halves(__m256i x) {
  __m256i h = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(int16_t(0xbf80)));
  __m256i magnitude = _mm256_and_si256(h, _mm256_set1_epi16(0x3f80));
  __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
  return _mm256_or_si256(h, _mm256_srli_epi16(nan, 1));
}
inline Vec load_as_float(const e4m3* p) {
  __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  __m128i h = _mm256_castsi256_si128(as_halves(_mm256_castsi128_si256(x)));
  return _mm256_mul_ps(_mm256_cvtph_ps(h), set1(256.0f));
}

// to[i] = from[i] * factor of 2 kLanes numbers: together they take two thirds of the time.
inline void convert_two(const e4m3* from, float* to, float factor) {
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  __m256i h = as_halves(_mm256_cvtepi8_epi16(x));
  Vec by = set1(256.0f * factor);
  store(to, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), by));
  store(to + kLanes, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), by));
}

inline void store_as(f32* p, Vec x) { store(p, x); }
inline void store_as(fp16* p, Vec x) {
  __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
inline void store_as(bf16* p, Vec x) {  // to nearest even; a NaN stays one
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// As from_float() does it, for 8 numbers; larger ones than 448 become 448.
#define JIT_KERNEL_STORES_E4M3 1
inline void store_as(e4m3* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x), all = _mm256_castps_si256(abs(x));
  const __m256i magnitude = _mm256_min_epi32(all, _mm256_set1_epi32(0x43e00000));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  // 0x7ffff - 0x3c000000: half of the last bit that stays, less one, and the exponents' distance
  const __m256i up = _mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7ffff - 0x3c000000));
  const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(up, odd), 20);
  const Vec sum = _mm256_add_ps(_mm256_castsi256_ps(magnitude), set1(16384.0f));
  const __m256i small = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_set1_epi32(0x46800000));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude);
  __m256i code = _mm256_blendv_epi8(normal, small, is_small);
  const __m256i is_nan = _mm256_cmpgt_epi32(all, _mm256_set1_epi32(0x7f800000));
  code = _mm256_or_si256(code, _mm256_and_si256(is_nan, _mm256_set1_epi32(0x7f)));
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 31), 7);
  code = _mm256_or_si256(code, sign);
  const __m256i words = _mm256_packus_epi32(code, code), bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}

// y[i] = the sum of x[i]'s lanes.
inline Vec reduce_each(const Vec (&x)[8]) {
  Vec a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  Vec b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// y[i] = the largest of x[i]'s lanes.
inline Vec reduce_max_each(const Vec (&x)[8]) {
  float largest[kLanes];
  for (int i = 0; i < kLanes; ++i) largest[i] = reduce_max(x[i]);
  return load(largest);
}

}  // namespace simd
}  // namespace jit_kernel
