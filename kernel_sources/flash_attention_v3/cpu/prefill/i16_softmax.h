// The softmax of rows whose probabilities become 16-bit integers.
#pragma once

#include <algorithm>

#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"
#include "flash_attention_v3/cpu/prefill/i16_rows.h"

#ifdef JIT_KERNEL_I16_DOT

namespace jit_kernel {

// Bounds of probabilities times values' factors: a row's largest element, and its sum over
// kI16Chunk keys. Below kSmallestP all of them are nothing. That values have 3 times fewer steps
// than an integer could, and probabilities more, takes half of the error.
constexpr float kLargestP = 32700.0f, kLargestSum = 195000.0f, kSmallestP = 1e-30f;

// Scores to probabilities times `weights`, in 16 bits; as softmax_rows() otherwise. Row j's factors
// are `factors[j]` for the first kI16Chunk columns, `next_factors` later for the next ones.
template <class Mask>
inline void softmax_rows_i16(const SoftmaxArgs<i16>& a, const ScoreScale& scale, int64_t count,
                             const float* weights, float* factors, int64_t next_factors,
                             Mask&& mask) {
  using simd::Vec, simd::kLanes;
  Vec sums[kI16Chunks][kLanes], tops[kI16Chunks][kLanes];
  const int64_t chunks = (a.columns + kI16Chunk - 1) / kI16Chunk;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t j = count; j < kLanes; ++j) sums[c][j] = tops[c][j] = simd::zero();
  }
  auto each_pair = [&](int64_t chunk, auto&& f) {
    const int64_t end = std::min(a.columns, (chunk + 1) * kI16Chunk);
    for (int64_t i = chunk * kI16Chunk; i < end; i += 2 * kLanes) f(i);
  };
  Vec to_log2 = simd::set1(scale.to_log2());
  softmax_rows_by(a, scale, count, mask, [&](int64_t j, float shift) {
    float* row = a.scores + j * a.score_stride;
    Vec top = simd::set1(shift), all = simd::zero(), all_b = all;
    for (int64_t c = 0; c < chunks; ++c) {
      Vec sum = simd::zero(), largest = sum;
      each_pair(c, [&](int64_t i) {
        Vec x = simd::exp2<kExpDegree<i16>>(exponent(i16(), simd::load(row + i), top, to_log2));
        Vec y = simd::exp2<kExpDegree<i16>>(
            exponent(i16(), simd::load(row + i + kLanes), top, to_log2));
        all = all + x;
        all_b = all_b + y;
        x = x * simd::load(weights + i);
        y = y * simd::load(weights + i + kLanes);
        sum = sum + (x + y);
        largest = simd::max(largest, simd::max(x, y));
        simd::store(row + i, x);
        simd::store(row + i + kLanes, y);
      });
      sums[c][j] = sum;
      tops[c][j] = largest;
    }
    return all + all_b;
  });
  alignas(64) float to_integer[kI16Chunks][kLanes];
  Vec totals[kI16Chunks];
  for (int64_t c = 0; c < chunks; ++c) {
    totals[c] = simd::reduce_each(sums[c]);
    // What is to become kLargestP: the largest, or a sum that is to become kLargestSum.
    Vec largest =
        simd::max(totals[c] * simd::set1(kLargestP / kLargestSum), simd::reduce_max_each(tops[c]));
    Vec by = simd::set1(kLargestP) / largest;
    simd::store(to_integer[c], simd::where_less(simd::set1(kSmallestP), largest, by, simd::zero()));
  }
  for (int64_t j = 0; j < count; ++j) {
    const float* row = a.scores + j * a.score_stride;
    for (int64_t c = 0; c < chunks; ++c) {
      Vec by = simd::set1(to_integer[c][j]);
      __m512i sum = _mm512_setzero_si512();
      each_pair(c, [&](int64_t i) {
        __m512i pairs = join_i16(simd::load(row + i) * by, simd::load(row + i + kLanes) * by);
        sum = Dot<i16>::add(sum, pairs, _mm512_set1_epi16(1));
        _mm512_storeu_si512(a.p + j * a.p_stride + i, pairs);
      });
      sums[c][j] = _mm512_cvtepi32_ps(sum);
    }
  }
  // Factors follow from the rounded sums, not from the multipliers: where all elements are the
  // same, all are rounded the same way.
  for (int64_t c = 0; c < chunks; ++c) {
    Vec sum = simd::reduce_each(sums[c]);
    simd::store(factors + c * next_factors,
                simd::where_less(simd::zero(), sum, totals[c] / sum, simd::zero()));
  }
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_I16_DOT
