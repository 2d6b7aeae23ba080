// Rows of fp16 as 16-bit integers and factors, for prefill_i16.h.
#pragma once

#include <algorithm>

#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"
#include "flash_attention_v3/cpu/prefill/prefill_tiles.h"

#ifdef JIT_KERNEL_I16_DOT

namespace jit_kernel {

constexpr float kLargestI16 = 32767.0f, kNormI16 = 46000.0f, kLargestValue = 10900.0f;

// Of kLanes rows, lane by lane. The norm is not less than infinity where an element is not finite.
struct RowSizes {
  simd::Vec norm, largest;
};

// load(j, i) gives the elements i .. i + 15 of row j.
template <class Load>
inline RowSizes sizes_of(Load&& load, int64_t n) {
  using simd::Vec, simd::kLanes;
  Vec squares[kLanes], tops[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    Vec square = simd::zero(), top = simd::zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec x = load(j, i);
      square = simd::fma(x, x, square);
      top = simd::max(top, simd::abs(x));
    }
    squares[j] = square;
    tops[j] = top;
  }
  return {_mm512_sqrt_ps(simd::reduce_each(squares)), simd::reduce_max_each(tops)};
}

// What rows are multiplied by to become integers: nothing where they are zeros, or not finite.
inline simd::Vec to_integers(simd::Vec by, const RowSizes& sizes) {
  by = simd::where_less(sizes.norm, simd::set1(kInfinity), by, simd::zero());
  return simd::where_less(simd::zero(), sizes.norm, by, simd::zero());
}

// kLanes rows of queries or keys of n elements (a multiple of 32) to integers. In every row the
// elements stand in the same order, that of VPACKSSDW. Returns their norms, infinite for rows
// that are not finite. A factor makes the integers' norm that of the row, so no score is off by
// rounding along it: elements that are all the same are all rounded the same way.
template <class Load>
inline simd::Vec rows_to_integers(Load&& load, int64_t n, i16* to, float* factors) {
  using simd::Vec, simd::kLanes;
  const RowSizes sizes = sizes_of(load, n);
  Vec by = simd::set1(kNormI16) / sizes.norm, most = simd::set1(kLargestI16) / sizes.largest;
  alignas(64) float to_integer[kLanes];
  simd::store(to_integer, to_integers(simd::where_less(by, most, by, most), sizes));
  Vec squares[kLanes];
  for (int64_t j = 0; j < kLanes; ++j, to += n) {
    by = simd::set1(to_integer[j]);
    __m512i square = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
      __m512i low = _mm512_cvtps_epi32(load(j, i) * by);
      __m512i high = _mm512_cvtps_epi32(load(j, i + kLanes) * by);
      __m512i x = _mm512_packs_epi32(low, high);
      square = Dot<i16>::add(square, x, x);
      _mm512_storeu_si512(to + i, x);
    }
    squares[j] = _mm512_cvtepi32_ps(square);
  }
  const Vec rounded = _mm512_sqrt_ps(simd::reduce_each(squares));
  simd::store(factors, simd::where_less(simd::zero(), rounded, sizes.norm / rounded, simd::zero()));
  return simd::where_less(sizes.norm, simd::set1(kInfinity), sizes.norm, simd::set1(kInfinity));
}

// Numbers of 32 keys, paired as store_probabilities() pairs bf16.
inline __m512i join_i16(simd::Vec a, simd::Vec b) {
  __m512i low = _mm512_cvtps_epi32(a), high = _mm512_slli_epi32(_mm512_cvtps_epi32(b), 16);
  __m512i low_words = _mm512_set1_epi32(0xffff);
  return _mm512_ternarylogic_epi32(low_words, low, high, 0xca);
}

// An element of a value outweighs the others when it is so many times their root mean square, or
// its square has this share of the norm's.
constexpr float kOutlier = 7.0f, kLargestShare = 0.7f;

// kDepth rows of values of n elements (a multiple of kLanes) to panels of kLanes columns, as
// pack_values() packs pairs. Their keys' norms become infinite where a value does not suit
// integers: it is not finite, or an element outweighs the others, which would lose their
// precision.
inline void values_to_integers(const fp16* const* rows, int64_t n, i16* out, int64_t panel,
                               float* factors, float* norms) {
  using simd::Vec, simd::kLanes;
  // The largest share of a norm's square that one element may have.
  const float outlier = kOutlier * kOutlier / static_cast<float>(n);
  const Vec most = simd::set1(std::min(outlier, kLargestShare));
  alignas(64) float to_integer[kDepth];
  for (int64_t first = 0; first < kDepth; first += kLanes) {
    auto load = [&](int64_t j, int64_t i) { return simd::load_as_float(rows[first + j] + i); };
    const RowSizes sizes = sizes_of(load, n);
    const Vec top = sizes.largest, limit = most * sizes.norm * sizes.norm;
    simd::store(to_integer + first, to_integers(simd::set1(kLargestValue) / top, sizes));
    // 0 for rows that are not finite, as queries that do not see them are multiplied by it.
    const Vec infinity = simd::set1(kInfinity), factor = top * simd::set1(1.0f / kLargestValue);
    simd::store(factors + first, simd::where_less(sizes.norm, infinity, factor, simd::zero()));
    Vec norm = simd::where_less(limit, top * top, infinity, simd::load(norms + first));
    simd::store(norms + first, simd::where_less(sizes.norm, infinity, norm, infinity));
  }
  for (int64_t j = 0; j < kLanes; ++j, out += 2 * kLanes) {
    Vec by = simd::set1(to_integer[j]), by_second = simd::set1(to_integer[j + kLanes]);
    i16* to = out;
    for (int64_t i = 0; i < n; i += kLanes, to += panel) {
      _mm512_storeu_si512(to, join_i16(simd::load_as_float(rows[j] + i) * by,
                                       simd::load_as_float(rows[j + kLanes] + i) * by_second));
    }
  }
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_I16_DOT
