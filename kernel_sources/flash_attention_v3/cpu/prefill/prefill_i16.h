// A prefill's products of fp16 by 16-bit integers (VPDPWSSD), which are twice as many an
// instruction as of floats: 8 to 22 % slower than bf16 where floats are 85 to 120 %.
//
// A query or key becomes integers and one factor, by which its norm is at most 46,000: no sum of
// products is larger than 46,000^2 < 2^31 (Cauchy-Schwarz). Rounding moves a score by about
// 9e-6 |q| |k| (its deviation). Values have a factor for each key, and are at most 10,900;
// probabilities times these factors have one for each row and kI16Chunk keys, by which they add up
// to 195,000 at most: sums of their products stay below 2^31, too. What rounding would show in is
// computed in floats, tile by tile and block by block: large norms, values of which one element
// outweighs the others, what is not finite, and rows that see few keys.
#pragma once

#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"
#include "flash_attention_v3/cpu/prefill/pack.h"

namespace jit_kernel {

// What a Prefill has beside its floats: nothing, or for fp16 what is below.
template <class Element, class Math>
struct Integers {
  static constexpr bool kAreUsed = false;
  static constexpr int64_t kChunk = kDepth;  // a tile's first key is a multiple of it

  template <class Params>
  Integers(const Params&, const HeadSizes&) {}
};

#ifdef JIT_KERNEL_I16_DOT

constexpr float kLargestI16 = 32767.0f, kNormI16 = 46000.0f, kLargestValue = 10900.0f;

// The largest |q| |k| times the scale of scores that is left to integers: a score's deviation is
// 2.8e-4 then, and an lse may be off by 1e-3. Normal numbers have 11 at head size 128.
constexpr float kLargestNorms = 32.0f;

// Rows that see fewer keys are computed in floats: what sees one key is its value, and integers are
// off by 2^-15 of a value's largest element.
constexpr int64_t kFewKeysI16 = 16;

// Of probabilities times values' factors: what a row's largest may become, and its sum over
// kI16Chunk keys. Below kSmallestP all of them are nothing. That values have 3 times fewer steps
// than an integer could, and probabilities more, takes half of the error.
constexpr float kLargestP = 32700.0f, kLargestSum = 195000.0f, kSmallestP = 1e-30f;
constexpr int64_t kI16Chunk = 128, kI16Chunks = 2;  // keys, and chunks of a block at most

// Keys of a block that are not finite and scored one by one. With more of them it is all in floats.
constexpr int64_t kMostOddKeys = 4;

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
// elements stand in the same order, that of VPACKSSDW. Returns their norms, infinite for what is
// not finite. A factor makes the integers' norm that of the row, so no score is off by rounding
// along it: elements that are all the same are all rounded the same way.
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

// kDepth rows of values of n elements (a multiple of kLanes) to panels of kLanes columns, as
// pack_values() packs pairs. Their keys' norms become infinite where a value does not suit
// integers: it is not finite, or an element outweighs the others (7 times their root mean square),
// which would lose what they add to the row.
inline void values_to_integers(const fp16* const* rows, int64_t n, i16* out, int64_t panel,
                               float* factors, float* norms) {
  using simd::Vec, simd::kLanes;
  const float mean = 1.0f / static_cast<float>(n);
  const Vec most = simd::set1(std::min(49.0f * mean, 0.7f));  // of a norm's square
  alignas(64) float to_integer[kDepth];
  for (int64_t first = 0; first < kDepth; first += kLanes) {
    auto load = [&](int64_t j, int64_t i) { return simd::load_as_float(rows[first + j] + i); };
    const RowSizes sizes = sizes_of(load, n);
    const Vec top = sizes.largest, limit = most * sizes.norm * sizes.norm;
    simd::store(to_integer + first, to_integers(simd::set1(kLargestValue) / top, sizes));
    // Of what is not finite nothing, as rows that do not see it are multiplied by it.
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

// Scores to probabilities times `weights`, in 16 bits; as soften_rows() otherwise. Row j's factors
// are `factors[j]` for the first kI16Chunk columns, `next_factors` later for the next ones.
template <class Visible>
inline void soften_rows_i16(const SoftenArgs<i16>& a, const ScoreScale& scale, int64_t count,
                            const float* weights, float* factors, int64_t next_factors,
                            Visible&& visible) {
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
  soften_rows_by(a, scale, count, visible, [&](int64_t j, float shift) {
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
  // Not what they were multiplied by, but what they add up to: where all are the same, all are
  // rounded the same way.
  for (int64_t c = 0; c < chunks; ++c) {
    Vec sum = simd::reduce_each(sums[c]);
    simd::store(factors + c * next_factors,
                simd::where_less(simd::zero(), sum, totals[c] / sum, simd::zero()));
  }
}

template <>
struct Integers<fp16, float> {
  static constexpr bool kAreUsed = true;
  static constexpr int64_t kChunk = kI16Chunk;

  bool on;            // whether anything is computed in integers
  int64_t depth, dv;  // padded
  float score_scale;  // what q·k is multiplied by, without its sign
  i16 *q, *keys, *values, *p, *spare;
  fp16* halves;  // rows that are no whole vectors
  float *q_factors, *key_factors, *value_factors, *p_factors;
  float *tile_norms, *key_norms;   // a tile's largest; infinite where floats are wanted
  bool* has_floats;                // of each block
  int64_t *odd_counts, *odd_keys;  // of each block: keys that are not finite
  float* odd_key;

  template <class Params>
  Integers(const Params& params, const HeadSizes& sizes)
      : on(!params.qv),
        depth(round_up(sizes.qk, kDepth)),
        dv(sizes.dv),
        score_scale(std::abs(params.softmax_scale)) {}

  template <class Host, class F>
  void each_array(const Host& host, int64_t padded_rows, F&& f) {
    const int64_t rows = host.q_rows, packed = host.packed_keys(), block = host.tiles.block;
    f(q, rows * depth);
    f(q_factors, rows);
    f(tile_norms, padded_rows / Host::kTileRows);
    f(keys, packed * depth);
    f(key_factors, packed);
    f(key_norms, packed);
    f(values, packed * dv);
    f(value_factors, packed);
    f(has_floats, packed / block);
    f(p, Host::kTileRows * block);
    f(p_factors, Host::kTileRows * kI16Chunks);
    f(odd_counts, packed / block);
    f(odd_keys, packed / block * kMostOddKeys);
    f(odd_key, host.sizes.depth);
    f(spare, simd::kLanes * depth);
    f(halves, kDepth * std::max(depth, dv));
  }

  // The first row of a tile among those that are held.
  template <class Host>
  static int64_t slot(const Host& host, int64_t row) {
    return (host.q_of(row) - host.q) / host.sizes.depth;
  }

  // The queries of the tile from row `row` on, which are there as floats.
  template <class Host>
  void load_tile(const Host& host, int64_t row, int64_t rows) {
    const float* from = host.q_of(row);
    const int64_t n = host.sizes.depth, first = slot(host, row);
    float norm = 0.0f;
    for (int64_t i = 0; i < Host::kTileRows; i += simd::kLanes, from += simd::kLanes * n) {
      auto load = [&](int64_t j, int64_t at) {
        return at < n ? simd::load(from + j * n + at) : simd::zero();
      };
      norm = std::max(norm, simd::reduce_max(rows_to_integers(load, depth, q + (first + i) * depth,
                                                              q_factors + first + i)));
    }
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t seen = host.ends[i] - host.begins[i];
      if (seen > 0 && seen < kFewKeysI16) norm = kInfinity;
    }
    tile_norms[row / Host::kTileRows] = norm;
  }

  // Packs the block that begins `at` keys after the first of those that are packed.
  template <class Host>
  void pack_block(const Host& host, int64_t at) {
    const int64_t block = host.tiles.block, end = std::min(host.packed, at + block);
    const fp16* rows[kDepth];
    const i16* integers[simd::kLanes];
    odd_counts[at / block] = 0;
    has_floats[at / block] = false;
    for (int64_t j = 0; j < simd::kLanes; ++j) integers[j] = spare + j * depth;
    for (int64_t i = at; i < end; i += kDepth) {
      find_rows(host.key_rows_ + i, end - i, host.packed - i, host.d, depth, rows);
      for (int64_t j = 0; j < kDepth; j += simd::kLanes) {
        auto load = [&](int64_t row, int64_t n) { return simd::load_as_float(rows[j + row] + n); };
        simd::Vec norms = rows_to_integers(load, depth, spare, key_factors + i + j);
        simd::store(key_norms + i + j, take_odd_keys(norms, at / block, i + j));
        transpose_panel(integers, depth, keys + (i + j) * depth, [](int64_t) {});
      }
    }
    for (int64_t i = at; i < end; i += kDepth) {
      find_rows(host.value_rows + i, end - i, host.packed - i, host.dv, dv, rows);
      values_to_integers(rows, dv, values + at * dv + (i - at) * simd::kLanes, simd::kLanes * block,
                         value_factors + i, key_norms + i);
    }
  }

  // Remembers which of kLanes keys are not finite, the first few of a block; returns the norms with
  // zeros for these.
  simd::Vec take_odd_keys(simd::Vec norms, int64_t in_block, int64_t key) {
    int64_t& count = odd_counts[in_block];
    for (__mmask16 left = _mm512_cmp_ps_mask(norms, simd::set1(kInfinity), _CMP_EQ_OQ);
         left && count < kMostOddKeys; left &= left - 1) {
      const int j = __builtin_ctz(left);
      odd_keys[in_block * kMostOddKeys + count++] = key + j;
      norms = _mm512_mask_mov_ps(norms, static_cast<__mmask16>(1u << j), simd::zero());
    }
    return norms;
  }

  // The scores of keys that are not finite, which integers leave out. In the same tile may be rows
  // that do not see them: these keep their bits.
  template <class Host, class Tile>
  void score_odd_keys(const Host& host, const Tile& t) {
    const int64_t in_block = t.at / host.tiles.block, n = host.sizes.depth;
    for (int64_t i = 0; i < odd_counts[in_block]; ++i) {
      const int64_t key = odd_keys[in_block * kMostOddKeys + i], column = key - t.at - t.from;
      if (column < 0 || column >= t.columns) continue;
      simd::convert_to_float(host.key_rows_[key], odd_key, host.d);
      std::fill(odd_key + host.d, odd_key + n, 0.0f);
      for (int64_t r = 0; r < t.rows; ++r) {
        simd::Vec sum = simd::zero();
        for (int64_t at = 0; at < n; at += simd::kLanes) {
          sum = simd::fma(simd::load(host.q_of(t.row) + r * n + at), simd::load(odd_key + at), sum);
        }
        host.scores[r * host.score_stride() + column] = simd::reduce_add(sum);
      }
    }
  }

  // kDepth rows of n elements, filled up to `padded` with zeros; of them `count` are there. The
  // next kDepth are asked for where there are so many.
  void find_rows(const fp16* const* from, int64_t count, int64_t known, int64_t n, int64_t padded,
                 const fp16** rows) {
    Prefetch ahead(reinterpret_cast<const void* const*>(from), n * int64_t{sizeof(fp16)}, known,
                   kDepth);
    ahead.more(kDepth);
    for (int64_t j = 0; j < kDepth; ++j) {
      rows[j] = from[std::min(j, count - 1)];
      if (n == padded && j < count) continue;
      fp16* to = halves + j * padded;
      convert_row<fp16>(rows[j], to, j < count ? n : 0, padded);
      rows[j] = to;
    }
  }

  // Whether a tile and the keys that its rows see of a block are computed in integers.
  template <class Host, class Tile>
  bool fit(const Host& host, const Tile& t) const {
    if (!on) return false;
    const int64_t last = t.row + t.rows - 1;
    const int64_t from = std::max<int64_t>(0, host.begins[t.row] - t.first);
    const int64_t to = std::min(t.from + t.columns, host.ends[last] - t.first);
    simd::Vec norms = simd::zero();
    for (int64_t i = from; i < to; i += simd::kLanes) {
      const auto seen = static_cast<__mmask16>((1u << std::min<int64_t>(simd::kLanes, to - i)) - 1);
      norms = simd::max(norms, _mm512_maskz_loadu_ps(seen, key_norms + t.at + i));
    }
    const float norm = simd::reduce_max(norms);
    return score_scale * tile_norms[t.row / Host::kTileRows] * norm <= kLargestNorms;
  }

  // A tile of rows against a block, as Prefill::whole_tile().
  template <class Host, class Tile>
  void whole_tile(Host& host, const ScoreScale& scale, Tile& t) {
    const int64_t first = slot(host, t.row), key = t.at + t.from, block = host.tiles.block;
    GemmArgs<i16> g{q + first * depth,
                    depth,
                    keys + key * depth,
                    simd::kLanes * depth,
                    host.scores,
                    host.score_stride(),
                    depth,
                    false,
                    depth};
    g.factors = {q_factors + first, key_factors + key, 0};
    host.each_part(t, [&](int64_t i, int64_t rows, int64_t columns) {
      gemm(rows_from(g, i), rows, columns / simd::kLanes);
    });
    score_odd_keys(host, t);
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) {
      soften_rows_i16(host.soften_args(t, i, p + i * block, block), scale,
                      std::min<int64_t>(simd::kLanes, t.rows - i), value_factors + key,
                      p_factors + i, Host::kTileRows,
                      [&](int64_t j) { return host.seen_of(t, i + j); });
    }
    const bool accumulate = host.begin_sums(t);
    g = {p,
         block,
         values + t.at * dv + t.from * simd::kLanes,
         simd::kLanes * block,
         host.sums_of(t.row),
         dv,
         t.columns,
         accumulate,
         kI16Chunk,
         t.from};
    g.factors = {p_factors, nullptr, Host::kTileRows};
    host.each_part(t, [&](int64_t i, int64_t rows, int64_t columns) {
      GemmArgs<i16> part = rows_from(g, i);
      part.depth = columns;
      gemm(part, rows, dv / simd::kLanes);
    });
  }

  static GemmArgs<i16> rows_from(GemmArgs<i16> g, int64_t i) {
    g.a += i * g.lda;
    g.c += i * g.ldc;
    g.factors.rows += i;
    return g;
  }
};

#endif  // JIT_KERNEL_I16_DOT

}  // namespace jit_kernel
