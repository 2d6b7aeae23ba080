// Rows of a tensor as products want them: converted and padded, or transposed word by word.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "jit_kernel/cpu/simd.h"

namespace jit_kernel {

// n elements of a row to the math's type, then zeros up to `padded`.
template <class Math, class Element>
inline void convert_row(const Element* from, Math* to, int64_t n, int64_t padded,
                        float factor = 1.0f) {
  int64_t i = 0;
  if (std::is_same<Math, Element>::value && factor == 1.0f) {
    constexpr int64_t kPiece = 2 * simd::kLanes;  // of a fixed size: instructions, not calls
    for (; i + kPiece <= n; i += kPiece) {
      std::memcpy(static_cast<void*>(to + i), from + i, kPiece * sizeof(Element));
    }
    if (i < n) {
      std::memcpy(static_cast<void*>(to + i), from + i,
                  static_cast<size_t>(n - i) * sizeof(Element));
    }
    i = n;
  }
#ifdef JIT_KERNEL_CONVERTS_TWO
  if constexpr (std::is_same<Math, float>::value && std::is_same<Element, e4m3>::value) {
    for (; i + 2 * simd::kLanes <= n; i += 2 * simd::kLanes) {
      simd::convert_two(from + i, to + i, factor);
    }
  }
#endif
  for (; i + simd::kLanes <= n; i += simd::kLanes) {
    simd::store_as(to + i, simd::load_as_float(from + i) * simd::set1(factor));
  }
  for (; i < n; ++i) to[i] = from_float<Math>(to_float(from[i]) * factor);
  for (; i < padded; ++i) to[i] = from_float<Math>(0.0f);
}

#ifdef JIT_KERNEL_AVX512
// out[i][j] = rows[j][i] for 16 x 16 words of 32 bits.
inline void transpose_words(const char* const* rows, int64_t offset, char* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + offset);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 i + c]: column 4 q + c of rows 4 i .. 4 i + 3 in quarter q
    a[4 * i + 0] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);       // quarters 0 2 of rows 0..7
    __m512i high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);      // quarters 1 3
    __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);  // the same of rows 8..15
    __m512i high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + 64 * c, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(out + 64 * (4 + c), _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(out + 64 * (8 + c), _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(out + 64 * (12 + c), _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
}
#endif

}  // namespace jit_kernel
