// Vectors of 16 floats: AVX-512 F, BW, DQ and VL. The interface is that of simd.h.
#pragma once

#include <immintrin.h>

#include "jit_kernel/cpu/element.h"

namespace jit_kernel {
namespace simd {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }

// The elements of `yes` where a < b, else those of `no`.
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

inline Vec copy_sign(Vec magnitude, Vec sign) {
  __m512i top = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), top));
}

// 2^x; -inf gives 0. One reduction (x - floor(x)) and one scaling, so one degree more than a
// reduction to [-1/2, 1/2] would want. Relative error: degree 3: 1.03e-4, degree 6: 2e-9. Degree 3
// is exact at 0 and 1, as a row that sees one key has an exponent of 0 but for its rounding;
// without these two conditions its error would be 7.5e-5, there, too.
template <int kDegree>
inline Vec exp2(Vec x) {
  static_assert(kDegree == 3 || kDegree == 6, "degrees with coefficients");
  constexpr float kThird[] = {1.0f, 0.69542435f, 0.22630768f, 0.07826797f};
  constexpr float kSixth[] = {1.0f,           0.693146984f,   0.240229836f,   0.0554833421f,
                              0.00967884079f, 0.00124396897f, 0.000217022491f};
  const float* c = kDegree == 3 ? kThird : kSixth;
  Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec y = set1(c[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) y = fma(y, f, set1(c[i]));
  return _mm512_scalef_ps(y, x);
}

inline Vec load_as_float(const f32* p) { return load(p); }
inline Vec load_as_float(const bf16* p) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load_as_float(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_as_float(const e4m3* p) {
  __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7f));
  __m512i sign = _mm512_slli_epi32(_mm512_sub_epi32(x, magnitude), 24);
  __m512i normal =
      _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(0x3c000000));
  Vec subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), set1(0x1p-9f));
  __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  __m512i y = _mm512_mask_mov_epi32(normal, small, _mm512_castps_si512(subnormal));
  y = _mm512_mask_mov_epi32(y, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(_mm512_or_si512(y, sign));
}

inline __m256i rounded_to(fp16, Vec x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i rounded_to(bf16, Vec x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

// As from_float() does it, for 16 numbers; larger ones than 448 become 448.
#define JIT_KERNEL_STORES_E4M3 1
inline __m128i rounded_to(e4m3, Vec x) {
  const __m512i bits = _mm512_castps_si512(x), all = _mm512_castps_si512(abs(x));
  const __m512i magnitude = _mm512_min_epi32(all, _mm512_set1_epi32(0x43e00000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7ffff - 0x3c000000));
  __m512i code = _mm512_srli_epi32(_mm512_add_epi32(up, odd), 20);
  const Vec sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), set1(16384.0f));
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
  code =
      _mm512_mask_sub_epi32(code, small, _mm512_castps_si512(sum), _mm512_set1_epi32(0x46800000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(bits, 31), 7);
  return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

inline void store_as(e4m3* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded_to(e4m3(), x));
}
inline void store_as(f32* p, Vec x) { store(p, x); }
template <class Element>
inline void store_as(Element* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_to(Element(), x));
}

// Past the caches, to a multiple of the vector's size; see simd.h.
inline void stream_as(f32* p, Vec x) { _mm512_stream_ps(p, x); }
template <class Element>
inline void stream_as(Element* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_to(Element(), x));
}
inline void stream_end() { _mm_sfence(); }

#ifdef __AVX512BF16__
inline __m512bh load_pairs(const bf16* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline __m512bh set1_pair(const bf16* p) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(
      bit_cast<int32_t>(*reinterpret_cast<const uint32_t __attribute__((may_alias))*>(p))));
}
inline Vec dot_pairs(Vec sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

// y[i] = what `join` makes of x[i]'s lanes. Four rounds halve the number of vectors, 2 shuffles
// each.
template <class Join>
inline Vec reduce_each(const Vec (&x)[16], Join join) {
  Vec a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // lanes of 32 bits: pairs (2i, 2i + 1)
    a[i] = join(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // after it each quarter holds four vectors' results, in order
    Vec low = _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0));
    Vec high = _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2));
    b[i] = join(low, high);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    Vec low = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], _MM_SHUFFLE(2, 0, 2, 0));
    Vec high = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], _MM_SHUFFLE(3, 1, 3, 1));
    c[i] = join(low, high);
  }
  Vec low = _mm512_shuffle_f32x4(c[0], c[1], _MM_SHUFFLE(2, 0, 2, 0));
  Vec high = _mm512_shuffle_f32x4(c[0], c[1], _MM_SHUFFLE(3, 1, 3, 1));
  return join(low, high);
}
inline Vec reduce_each(const Vec (&x)[16]) {
  return reduce_each(x, [](Vec a, Vec b) { return _mm512_add_ps(a, b); });
}
inline Vec reduce_max_each(const Vec (&x)[16]) {
  return reduce_each(x, [](Vec a, Vec b) { return _mm512_max_ps(a, b); });
}

}  // namespace simd
}  // namespace jit_kernel
