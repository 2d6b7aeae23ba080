// What a decode in AMX tiles is made of.
//
// Scores come transposed, keys by rows: so keys are read as they lie in memory, 16 rows of 32
// elements a tile, and it is the few queries that are packed, kColumns (4 or 16) side by side: a
// vector of scores holds 16 / kColumns keys. Values are read as they lie, too, 16 rows of 32
// columns a tile, though the product wants two keys side by side where two columns are: each
// probability comes once beside a zero below it and once above it (store_probabilities), for as
// many queries as leave half of a tile's rows free at no cost.
#pragma once

#include "flash_attention_v3/cpu/common/amx.h"
#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/decode/decode_state.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

static_assert(kDecodeBlock == kDepth, "a block of keys is one tile deep");

// Multiplies the tiles of scores, 3 and 7, by a factor.
inline void amx_scale_scores(int64_t columns, float factor) {
  alignas(64) float tiles[2 * 256];
  _tile_stored(3, tiles, columns * 4);
  _tile_stored(7, tiles + 256, columns * 4);
  asm volatile("" ::: "memory");
  simd::scale_floats(tiles, 2 * 256, factor);
  asm volatile("" ::: "memory");
  _tile_loadd(3, tiles, columns * 4);
  _tile_loadd(7, tiles + 256, columns * 4);
}

// 16 rows of keys or values as a tile is loaded from them.
template <class Math>
struct TileRows {
  const Math* first;
  int64_t bytes;  // from one to the next
};

// rows[0..15] + offset, `step` elements apart; where that is 0, as they are not evenly spaced,
// through `spare`, 16 rows of n elements.
template <class Math>
inline TileRows<Math> tile_rows(const Math* const* rows, int64_t step, int64_t offset, int64_t n,
                                Math* spare) {
  if (step) return {rows[0] + offset, step * 2};
  for (int j = 0; j < 16; ++j) {
    std::memcpy(static_cast<void*>(spare + j * n), rows[j] + offset, static_cast<size_t>(n) * 2);
  }
  return {spare, n * 2};
}

// Queries (rows, depth) as tile B wants them: pairs of the depth, `columns` queries side by side.
template <class Math>
inline void pack_columns(const Math* q, int64_t rows, int64_t depth, int64_t columns, Math* to) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(depth * columns) * sizeof(Math));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; k += 2) {
      std::memcpy(static_cast<void*>(to + k * columns + 2 * i), q + i * depth + k, 4);
    }
  }
}

// Joins lanes that belong to the same query, each result in all of them.
template <int kColumns, class Join>
inline simd::Vec join_columns(simd::Vec x, Join join) {
  static_assert(kColumns == 4 || kColumns == 16, "the columns of a tile of scores");
  if (kColumns == 16) return x;
  x = join(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(1, 0, 3, 2)));
  return join(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(2, 3, 0, 1)));
}

// Halves, each in the low part of a word.
inline __m512i as_words(bf16, simd::Vec a) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
}
inline __m512i as_words(fp16, simd::Vec a) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

constexpr int64_t kTileKeys = 16;  // of values in a tile
// Words of the probabilities of so many keys: 16 keys a line, lines as store_probabilities()
// leaves.
constexpr int64_t kTileWords = 2 * kDecodeRows * kTileKeys;

// Probabilities of 16 keys to tile A of their product with values as they lie in memory. x[i] holds
// keys n i .. n (i + 1) - 1, n = 16 / kColumns, of kColumns queries. A line of 16 keys for each of
// `rows` queries with the probability in the low half of a word, then one each with it in the high
// half: tile B pairs the columns 2 c and 2 c + 1 of a key where it expects two keys, so the first
// lines gather the even columns and the others the odd ones.
template <int kColumns>
inline void store_probabilities(const __m512i (&x)[kColumns], int64_t rows, uint32_t* p) {
  auto odd = [](__m512i even) { return _mm512_slli_epi32(even, 16); };
  if constexpr (kColumns == 4) {
    // A query's 4 keys of one vector side by side; then such quarters change places.
    __m512i by = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = _mm512_permutexvar_epi32(by, x[i]);
    __m512i a = _mm512_shuffle_i32x4(y[0], y[1], 0x44), b = _mm512_shuffle_i32x4(y[2], y[3], 0x44);
    __m512i c = _mm512_shuffle_i32x4(y[0], y[1], 0xee), d = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
    __m512i even[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                       _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(p + i * kTileKeys, even[i]);
    p += rows * kTileKeys;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(p + i * kTileKeys, odd(even[i]));
  } else {
    const char* lines[16];
    for (int i = 0; i < 16; ++i) lines[i] = reinterpret_cast<const char*>(x + i);
    transpose_words(lines, 0, reinterpret_cast<char*>(p));
    for (int64_t i = 0; i < rows; ++i) {
      __m512i even = _mm512_load_si512(p + i * kTileKeys);
      _mm512_store_si512(p + (rows + i) * kTileKeys, odd(even));
    }
  }
}

// The softmax of a block's transposed scores: scores (keys, kColumns) to p, kTileWords for every 16
// keys. maxima and sums are one vector each, of lanes as join_columns() leaves them; sums stay lane
// by lane. Returns whether earlier sums are to be multiplied by factors. Scores may be replaced.
template <int kColumns, class Math>
inline bool softmax_columns(float* scores, int64_t rows, uint32_t* p, float to_log2, float* maxima,
                            float* sums, float* factors) {
  using simd::Vec;
  constexpr int kVecs = 2 * kColumns;
  auto larger = [](Vec a, Vec b) { return simd::max(a, b); };
  auto plus = [](Vec a, Vec b) { return a + b; };
  Vec top = simd::max(simd::load(scores), simd::load(scores + 16));
  for (int i = 2; i < kVecs; ++i) top = simd::max(top, simd::load(scores + 16 * i));
  Vec old = simd::load(maxima), sum = simd::load(sums), scale = simd::set1(to_log2);
  top = simd::max(old, join_columns<kColumns>(top, larger));
  // Rows that have seen nothing yet: any finite number keeps -inf - -inf from being NaN.
  Vec shift = simd::where_less(simd::set1(-kInfinity), top, top, simd::zero());
  bool moved = _mm512_cmp_ps_mask(top, old, _CMP_NEQ_OQ) != 0;
  if (moved) {
    Vec factor = simd::exp2<kExpDegree<float>>((old - shift) * scale);
    simd::store(factors, factor);
    simd::store(maxima, top);
    sum = sum * factor;
  }
  if (far_lanes(shift, scale) != 0) {
    for (int i = 0; i < kVecs; ++i)
      simd::store(scores + 16 * i, simd::load(scores + 16 * i) - shift);
    shift = simd::zero();
  }
  Vec parts[2] = {simd::zero(), simd::zero()};
  for (int64_t keys = 0; keys < kDecodeBlock; keys += kTileKeys, p += kTileWords) {
    __m512i words[kColumns];
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; ++i, scores += 16) {
      Vec x = simd::exp2<kExpDegree<Math>>(exponent(Math(), simd::load(scores), shift, scale));
      parts[i % 2] = parts[i % 2] + x;
      words[i] = as_words(Math(), x);
    }
    store_probabilities<kColumns>(words, rows, p);
  }
  simd::store(sums, sum + plus(parts[0], parts[1]));
  return moved;
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
