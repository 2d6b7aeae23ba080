// What a decode through VDPBF16PS is made of.
//
// Scores: products of four keys and four rows run along the head, and come as four rows of four
// keys: a vector of scores is a quarter for each row. Values: rows of two keys are joined word by
// word, and a pair of probabilities stands in every lane beside them.
#pragma once

#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/decode/decode_in_order.h"

#ifdef JIT_KERNEL_BF16_DOT

namespace jit_kernel {

constexpr int64_t kGroupRows = 4;  // query rows that share a vector of scores
constexpr int64_t kScoreKeys = 4;  // keys in it
constexpr int64_t kGroupScores = kGroupRows * kDecodeBlock;
constexpr int64_t kPanel = 32;  // columns of values in a vector

// Adds products of n elements of four keys and four rows of q (`stride` apart) to sum[4 i + j] of
// row i and key j. Asks again for the keys that come kRowsAgain rows later.
inline __attribute__((always_inline)) void add_products(const bf16* const* keys, int64_t offset,
                                                        const bf16* q, int64_t stride, int64_t n,
                                                        simd::Vec (&sum)[16]) {
  const bf16 *key[kScoreKeys], *later[kScoreKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kScoreKeys; ++j) {
    key[j] = keys[j] + offset;
    later[j] = keys[j + kRowsAgain] + offset;
  }
  for (int64_t at = 0; at < n; at += kDepth) {
    __m512bh row[kGroupRows];
#pragma GCC unroll 4
    for (int i = 0; i < kGroupRows; ++i) row[i] = simd::load_pairs(q + i * stride + at);
#pragma GCC unroll 4
    for (int j = 0; j < kScoreKeys; ++j) {
      __m512bh k = simd::load_pairs(key[j] + at);
      __builtin_prefetch(later[j] + at, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < kGroupRows; ++i) {
        sum[4 * i + j] = simd::dot_pairs(sum[4 * i + j], row[i], k);
      }
    }
  }
}

// Scores of four keys and four rows; see add_products().
inline simd::Vec score_quarters(const bf16* const* keys, int64_t offset, const bf16* q,
                                int64_t stride, int64_t n) {
  simd::Vec sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = simd::zero();
  add_products(keys, offset, q, stride, n, sum);
  return simd::reduce_each(sum);
}

// What `join` makes of each quarter, in all of its lanes.
template <class Join>
inline simd::Vec join_quarters(simd::Vec x, Join join) {
  x = join(x, _mm512_permute_ps(x, _MM_SHUFFLE(2, 3, 0, 1)));
  return join(x, _mm512_permute_ps(x, _MM_SHUFFLE(1, 0, 3, 2)));
}

// Four floats, each to all lanes of a quarter; and back.
inline simd::Vec load_quarters(const float* from) {
  __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(_mm_loadu_ps(from)));
}
inline void store_quarters(float* to, simd::Vec x) {
  __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}

// The softmax of four rows and a block of keys: scores, a vector for four keys, to p, for four keys
// two pairs of probabilities of each row. maxima and sums are of four rows. Returns whether earlier
// sums are to be multiplied by factors.
inline bool softmax_group(const float* scores, bf16* p, float to_log2, float* maxima, float* sums,
                          float* factors) {
  using simd::Vec;
  constexpr int kVecs = kGroupScores / 16;
  auto larger = [](Vec a, Vec b) { return simd::max(a, b); };
  auto plus = [](Vec a, Vec b) { return a + b; };
  Vec x[kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) x[i] = simd::load(scores + 16 * i);
  Vec low = larger(larger(x[0], x[1]), larger(x[2], x[3]));
  Vec high = larger(larger(x[4], x[5]), larger(x[6], x[7]));
  Vec old = load_quarters(maxima), sum = load_quarters(sums), scale = simd::set1(to_log2);
  Vec top = kept_maximum(old, join_quarters(larger(low, high), larger), scale);
  // Rows that have seen nothing yet: any finite number keeps -inf - -inf from being NaN.
  Vec shift = simd::where_less(simd::set1(-kInfinity), top, top, simd::zero());
  const bool moved = _mm512_cmp_ps_mask(top, old, _CMP_NEQ_OQ) != 0;
  if (moved) {
    Vec factor = simd::exp2<kExpDegree<float>>((old - shift) * scale);
    store_quarters(factors, factor);
    store_quarters(maxima, top);
    sum = sum * factor;
  }
  if (far_lanes(shift, scale) != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) x[i] = x[i] - shift;
    shift = simd::zero();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) {
    x[i] = simd::exp2<kExpDegree<bf16>>(exponent(bf16(), x[i], shift, scale));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; i += 2) {
    auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
    _mm512_storeu_si512(p + 16 * i, both);
  }
  low = (x[0] + x[1]) + (x[2] + x[3]);
  high = (x[4] + x[5]) + (x[6] + x[7]);
  store_quarters(sums, sum + join_quarters(low + high, plus));
  return moved;
}

// sums (kRows, kPanels · 32 columns) += P · values of kValueKeys keys; p as softmax_group() leaves
// it. Asks again for the values that come kRowsAgain rows later.
template <int kRows, int kPanels>
inline __attribute__((always_inline)) void add_pairs(const bf16* const* values, int64_t offset,
                                                     const bf16* p, float* sums, int64_t stride) {
  constexpr int kVecs = 2 * kPanels;
  simd::Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) sum[i][c] = simd::load(sums + i * stride + c * 16);
  }
#pragma GCC unroll 2
  for (int64_t j = 0; j < kValueKeys; j += 2) {
    __m512bh v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kPanels; ++c) {
      const int64_t at = offset + c * kPanel;
      __m512i a = _mm512_loadu_si512(values[j] + at), b = _mm512_loadu_si512(values[j + 1] + at);
      __builtin_prefetch(values[j + kRowsAgain] + at, 0, 2);
      __builtin_prefetch(values[j + kRowsAgain + 1] + at, 0, 2);
      v[2 * c] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      v[2 * c + 1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      __m512bh pair = simd::set1_pair(p + j / 4 * 16 + i * 4 + j % 4);
#pragma GCC unroll 8
      for (int c = 0; c < kVecs; ++c) sum[i][c] = simd::dot_pairs(sum[i][c], pair, v[c]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) simd::store(sums + i * stride + c * 16, sum[i][c]);
  }
}

// A row of sums as add_pairs() leaves them, in the order of columns: of 8 columns a panel's first
// vector holds four, the second one the others.
inline void order_columns(const float* from, float* to, int64_t n) {
  __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < n; c += kPanel) {
    simd::Vec a = simd::load(from + c), b = simd::load(from + c + 16);
    simd::store(to + c, _mm512_permutex2var_ps(a, low, b));
    simd::store(to + c + 16, _mm512_permutex2var_ps(a, high, b));
  }
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_BF16_DOT
