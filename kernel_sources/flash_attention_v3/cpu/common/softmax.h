// The online softmax of one row: scores to probabilities, with the maximum and the sum so far.
//
// Raw scores s are products q·k, or capped scores: p = 2^((s - maximum) * to_log2).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "flash_attention_v3/cpu/common/head_sizes.h"
#include "flash_attention_v3/cpu/common/mask.h"

namespace jit_kernel {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargestFloat = std::numeric_limits<float>::max();

// P rounded to bf16 is off by 2^-9, to fp16 by 2^-12: beside that a polynomial of degree 3
// (2^-13.2) is hardly seen, and 3 % of an AMX prefill faster than one of degree 4.
template <class Math>
constexpr int kExpDegree = std::is_same<Math, float>::value ? 6 : 3;

struct ScoreScale {
  float softcap;   // 0: none
  float inner;     // scores are multiplied by it before the cap
  float natural;   // raw scores times this are in units of e; positive
  bool transform;  // whether scores need a pass of their own before the maximum is taken

  float to_log2() const { return std::min(natural * kLog2e, kLargestFloat); }
};

// The cap, or the sign of a scale that would turn the order round, is applied before the mask.
// Factors stay finite, as 0 times infinity is NaN.
inline ScoreScale score_scale(float scale, float softcap) {
  auto finite = [](float x) { return std::max(-kLargestFloat, std::min(x, kLargestFloat)); };
  scale = finite(scale);
  if (softcap > 0.0f) return {softcap, finite(scale / softcap), 1.0f, true};
  if (scale < 0.0f) return {0.0f, -1.0f, -scale, true};
  if (scale == 0.0f) return {0.0f, 0.0f, 1.0f, true};
  return {0.0f, 1.0f, scale, false};
}

inline void transform_scores(const ScoreScale& scale, float* s, int64_t n) {
  for (int64_t i = 0; i < n; i += simd::kLanes) {
    simd::Vec x = simd::load(s + i) * simd::set1(scale.inner);
    if (scale.softcap > 0.0f) x = simd::tanh(x) * simd::set1(scale.softcap);
    simd::store(s + i, x);
  }
}

inline void mask_scores(float* s, const Interval& seen, int64_t n) {
  const int64_t begin = std::min(n, std::max<int64_t>(0, seen.begin));
  for (int64_t i = 0; i < begin; ++i) s[i] = -kInfinity;
  for (int64_t i = std::max(begin, std::min(n, seen.end)); i < n; ++i) s[i] = -kInfinity;
}

// The scores of n keys from `first` on that a draft mask hides from a token.
inline void mask_drafts(const DraftMask& mask, int64_t token, int64_t first, float* s, int64_t n) {
  for (int64_t i = std::max<int64_t>(0, mask.begin - first); i < n; i += DraftMask::kKeys) {
    const uint32_t seen = mask.seen(token, first + i);
    for (int64_t j = 0; j < std::min(DraftMask::kKeys, n - i); ++j) {
      if (!(seen >> j & 1)) s[i + j] = -kInfinity;
    }
  }
}

inline void store_probabilities(float* p, simd::Vec a, simd::Vec b) {
  simd::store(p, a);
  simd::store(p + simd::kLanes, b);
}
#ifdef JIT_KERNEL_AVX512
inline void store_probabilities(fp16* p, simd::Vec a, simd::Vec b) {
  simd::store_as(p, a);
  simd::store_as(p + simd::kLanes, b);
}
#endif
#ifdef JIT_KERNEL_BF16_DOT
// Each of a's beside one of b's, the lower half of b's words, as pack.h pairs values. Probabilities
// are rounded to nearest by adding half a last place: all of it runs beside AMX on a port of its
// own, where VCVTNE2PS2BF16 takes the one for multiplications 2.4 times (0.76 ns).
inline void store_probabilities(bf16* p, simd::Vec a, simd::Vec b) {
  __m512i half = _mm512_set1_epi32(0x8000), low_words = _mm512_set1_epi32(0xffff);
  __m512i low = _mm512_add_epi32(_mm512_castps_si512(a), half);
  __m512i high = _mm512_add_epi32(_mm512_castps_si512(b), half);
  low = _mm512_bsrli_epi128(low, 2);
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(low_words, low, high, 0xca));
}
#endif

// The maximum so far of a row's raw scores, and the sum of its probabilities.
struct RowState {
  float maximum = -kInfinity, sum = 0.0f;
};

// (x - maximum) * to_log2. For floats the difference comes first: a product with a large maximum
// would lose its last bits. Beside P in 16 bits, bf16 or integers, the shorter product and sum do:
// what rounding the product adds is the same for all of a row, and at most 2^-5 where it is not
// larger than kLargestProduct. Where it is, difference_first() makes the differences beforehand.
template <class Math>
inline simd::Vec exponent(Math, simd::Vec x, simd::Vec maximum, simd::Vec to_log2) {
  return (x - maximum) * to_log2;
}
inline simd::Vec exponent(bf16, simd::Vec x, simd::Vec maximum, simd::Vec to_log2) {
  return simd::fma(x, to_log2, simd::zero() - maximum * to_log2);
}
inline simd::Vec exponent(i16, simd::Vec x, simd::Vec maximum, simd::Vec to_log2) {
  return exponent(bf16(), x, maximum, to_log2);
}

constexpr float kLargestProduct = 0x1p20f;

#ifdef JIT_KERNEL_AVX512
// Lanes, a bit each, whose products with to_log2 are too large for exponent() of 16-bit P.
inline unsigned far_lanes(simd::Vec shift, simd::Vec to_log2) {
  return _mm512_cmp_ps_mask(simd::abs(shift * to_log2), simd::set1(kLargestProduct), _CMP_NLE_UQ);
}
#endif

// Where the rows of softmax_rows lie: row j's scores and probabilities are j strides after the
// first's.
template <class Math>
struct SoftmaxArgs {
  float* scores;
  int64_t score_stride;
  Math* p;  // may be scores
  int64_t p_stride;
  int64_t columns;
  float *maxima, *sums;  // of the rows so far; kLanes of each are read and written
  float* factors;        // kLanes: earlier sums are to be multiplied by these
};

// Beside P in 16 bits: where a row's shift is too far from 0 for exponent(), its scores become
// their differences from it, and 0 its shift. So rare that it may cost a pass of its own.
template <class Math>
inline void difference_first(const SoftmaxArgs<Math>& a, simd::Vec to_log2, int64_t count,
                             float* shifts) {
#ifdef JIT_KERNEL_AVX512
  if (std::is_same<Math, float>::value) return;
  const unsigned far = far_lanes(simd::load(shifts), to_log2);
  for (int64_t j = 0; far >> j != 0 && j < count; ++j) {
    if ((far >> j & 1) == 0) continue;
    float* row = a.scores + j * a.score_stride;
    for (int64_t i = 0; i < a.columns; i += simd::kLanes) {
      simd::store(row + i, simd::load(row + i) - simd::set1(shifts[j]));
    }
    shifts[j] = 0.0f;
  }
#else
  static_assert(std::is_same<Math, float>::value, "P in 16 bits needs AVX-512");
#endif
}

// Probabilities are at most 2^kLargestExponent, as a maximum is kept while that holds.
constexpr float kLargestExponent = 8.0f, kLargestProbability = 256.0f;

// What a row's probabilities are made with after scores whose largest is `top`: the old maximum
// where that makes none larger than 2^8. Sums so far rarely have to be scaled then, and neither
// bf16, fp16 nor floats lose a bit by it.
inline simd::Vec kept_maximum(simd::Vec old, simd::Vec top, simd::Vec to_log2) {
  return simd::where_less(simd::set1(kLargestExponent), (top - old) * to_log2, top, old);
}

// Lane by lane, the largest of n scores (a multiple of kDepth).
inline simd::Vec largest_lanes(const float* s, int64_t n) {
  simd::Vec a = simd::load(s), b = simd::load(s + simd::kLanes);
  for (int64_t i = 2 * simd::kLanes; i < n; i += 2 * simd::kLanes) {
    a = simd::max(a, simd::load(s + i));
    b = simd::max(b, simd::load(s + i + simd::kLanes));
  }
  return simd::max(a, b);
}

// n scores (masked ones are -inf) to probabilities p, which may be s itself; returns their sums
// lane by lane. `shift` is the maximum, or any finite number where nothing is visible.
template <int kDegree, class Math>
inline simd::Vec make_probabilities(const float* s, Math* p, int64_t n, float to_log2,
                                    float shift) {
  using simd::Vec;
  Vec scale = simd::set1(to_log2), top = simd::set1(shift), sum_a = simd::zero(), sum_b = sum_a;
  for (int64_t i = 0; i < n; i += 2 * simd::kLanes) {
    Vec a = simd::exp2<kDegree>(exponent(Math(), simd::load(s + i), top, scale));
    Vec b = simd::exp2<kDegree>(exponent(Math(), simd::load(s + i + simd::kLanes), top, scale));
    sum_a = sum_a + a;
    sum_b = sum_b + b;
    store_probabilities(p + i, a, b);
  }
  return sum_a + sum_b;
}

// Scores to probabilities of up to kLanes rows. Maxima and sums are made side by side: row by row,
// the latency of each is longer than a row's work. mask(j, scores) makes those -inf that row j does
// not see; make_row(j, shift) makes row j's probabilities and returns their sums lane by lane.
template <class Math, class Mask, class MakeRow>
inline void softmax_rows_by(const SoftmaxArgs<Math>& a, const ScoreScale& scale, int64_t count,
                            Mask&& mask, MakeRow&& make_row) {
  using simd::Vec;
  Vec lanes[simd::kLanes];
  for (int64_t j = 0; j < simd::kLanes; ++j) lanes[j] = simd::zero();
  for (int64_t j = 0; j < count; ++j) {
    float* row = a.scores + j * a.score_stride;
    if (scale.transform) transform_scores(scale, row, a.columns);
    mask(j, row);
    lanes[j] = largest_lanes(row, a.columns);
  }
  Vec to_log2 = simd::set1(scale.to_log2()), old = simd::load(a.maxima);
  Vec top = kept_maximum(old, simd::reduce_max_each(lanes), to_log2);
  // Rows that have seen nothing yet: any finite number keeps -inf - -inf from being NaN.
  Vec shift = simd::where_less(simd::set1(-kInfinity), top, top, simd::zero());
  Vec factor = simd::exp2<kExpDegree<float>>((old - shift) * to_log2);
  alignas(64) float shifts[simd::kLanes];
  simd::store(shifts, shift);
  simd::store(a.factors, factor);
  simd::store(a.maxima, top);
  difference_first(a, to_log2, count, shifts);
  for (int64_t j = 0; j < count; ++j) lanes[j] = make_row(j, shifts[j]);
  simd::store(a.sums, simd::load(a.sums) * factor + simd::reduce_each(lanes));
}

template <int kDegree, class Math, class Mask>
inline void softmax_rows(const SoftmaxArgs<Math>& a, const ScoreScale& scale, int64_t count,
                         Mask&& mask) {
  softmax_rows_by(a, scale, count, mask, [&](int64_t j, float shift) {
    return make_probabilities<kDegree>(a.scores + j * a.score_stride, a.p + j * a.p_stride,
                                       a.columns, scale.to_log2(), shift);
  });
}

// What a row's sum becomes when it is finished: out = acc * factor, and lse in natural units.
struct RowEnd {
  float factor, lse;
};

// sink: one more logit (natural units) without a value; -inf where there is none. lse is left out
// where it is not wanted: a logarithm for each row is 3 % of a short prefill.
inline RowEnd finish_row(const RowState& state, const ScoreScale& scale, float sink,
                         bool with_lse) {
  // A row of which no score is a number has no maximum, but its sum is NaN.
  bool seen = state.maximum != -kInfinity, has_sink = sink != -kInfinity;
  if (!seen && std::isnan(state.sum)) return {state.sum, state.sum};
  if (!seen && !has_sink) return {0.0f, -kInfinity};
  // In double: a float's last bit of a large logit is more than the result may be off.
  double maximum = seen ? static_cast<double>(state.maximum) * scale.natural : -kInfinity;
  double kept = 1.0, sum = state.sum;
  if (has_sink) {
    double logit = maximum;
    maximum = std::max(logit, static_cast<double>(sink));
    kept = std::exp(logit - maximum);
    sum = state.sum * kept + std::exp(sink - maximum);
  }
  double lse = with_lse ? maximum + std::log(sum) : 0.0;
  return {static_cast<float>(kept / sum), static_cast<float>(lse)};
}

}  // namespace jit_kernel
