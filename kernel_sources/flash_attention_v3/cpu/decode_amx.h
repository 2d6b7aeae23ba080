// What a decode in AMX tiles is made of.
//
// Scores come transposed, keys by rows: so keys are read as they lie in memory, 16 rows of 32
// elements a tile, and it is the few queries that are packed, kColumns (4 or 16) side by side: a
// vector of scores holds 16 / kColumns keys. P·V takes packed values, a pair of keys side by side.
#pragma once

#include "flash_attention_v3/cpu/decode_state.h"
#include "flash_attention_v3/cpu/gemm_amx.h"
#include "flash_attention_v3/cpu/pack.h"
#include "flash_attention_v3/cpu/softmax.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

static_assert(kDecodeBlock == kDepth, "a block of keys is one tile deep");

// Multiplies the tiles of scores, 3 and 7, by a factor.
inline void amx_scale_scores(int64_t columns, float factor) {
  alignas(64) float tiles[2 * 256];
  _tile_stored(3, tiles, columns * 4);
  _tile_stored(7, tiles + 256, columns * 4);
  asm volatile("" ::: "memory");
  scale_floats(tiles, 2 * 256, factor);
  asm volatile("" ::: "memory");
  _tile_loadd(3, tiles, columns * 4);
  _tile_loadd(7, tiles + 256, columns * 4);
}

// 16 rows of keys as a tile is loaded from them.
template <class Math>
struct TileRows {
  const Math* first;
  int64_t stride;
};

// rows[0..15] + offset; through `spare`, 16 rows of n elements, where they are not evenly spaced.
template <class Math>
inline TileRows<Math> tile_rows(const Math* const* rows, int64_t offset, int64_t n, Math* spare) {
  int64_t stride = rows[1] - rows[0];
  bool even = stride > 0;
  for (int j = 2; j < 16; ++j) even &= rows[j] - rows[j - 1] == stride;
  if (even) return {rows[0] + offset, stride};
  for (int j = 0; j < 16; ++j) {
    std::memcpy(static_cast<void*>(spare + j * n), rows[j] + offset, static_cast<size_t>(n) * 2);
  }
  return {spare, n};
}

// Two rows of values side by side, to line `pair` of each panel of 16 columns. Of 32 columns the
// first panel gets those that unpack_low takes and the next the others: one instruction a vector;
// order_columns() puts the sums right.
template <class Math>
inline void pack_pair(const Math* a, const Math* b, int64_t dv, Math* to) {
  int64_t c = 0;
  for (; c + 32 <= dv; c += 32, to += 2 * kAmxTile) {
    __m512i x = _mm512_loadu_si512(a + c), y = _mm512_loadu_si512(b + c);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(to + kAmxTile, _mm512_unpackhi_epi16(x, y));
  }
  if (c == dv) return;
  auto words = [c](const Math* row) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c)));
  };
  _mm512_store_si512(to, _mm512_or_si512(words(a), _mm512_slli_epi32(words(b), 16)));
}

inline void order_columns(float* sum, int64_t dv) {
  for (int64_t c = 0; c + 32 <= dv; c += 32) {
    __m512 x = _mm512_loadu_ps(sum + c), y = _mm512_loadu_ps(sum + c + 16);
    __m512 low = _mm512_shuffle_f32x4(x, y, _MM_SHUFFLE(1, 0, 1, 0));
    __m512 high = _mm512_shuffle_f32x4(x, y, _MM_SHUFFLE(3, 2, 3, 2));
    _mm512_storeu_ps(sum + c, _mm512_shuffle_f32x4(low, low, _MM_SHUFFLE(3, 1, 2, 0)));
    _mm512_storeu_ps(sum + c + 16, _mm512_shuffle_f32x4(high, high, _MM_SHUFFLE(3, 1, 2, 0)));
  }
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

inline __m512i as_halves(bf16, simd::Vec a, simd::Vec b) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}
inline __m512i as_halves(fp16, simd::Vec a, simd::Vec b) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, kNearest)),
                            _mm512_cvtps_ph(b, kNearest), 1);
}

// Probabilities to rows of 32 keys. x[i] holds keys 2 n i .. 2 n (i + 1) - 1, n = 16 / kColumns, of
// kColumns queries.
template <int kColumns>
inline void store_by_rows(const __m512i (&x)[kColumns], void* p) {
  // A query's keys of one vector side by side; then pieces of that size change places.
  constexpr int kKeys = 32 / kColumns;
  alignas(64) static constexpr auto order = [] {
    struct {
      uint16_t of[32] = {};
    } table;
    for (int i = 0; i < 32; ++i) table.of[i] = uint16_t(i % kKeys * kColumns + i / kKeys);
    return table;
  }();
  __m512i by = _mm512_load_si512(order.of), y[kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) y[i] = _mm512_permutexvar_epi16(by, x[i]);
  if constexpr (kColumns == 4) {
    __m512i a = _mm512_shuffle_i32x4(y[0], y[1], 0x44), b = _mm512_shuffle_i32x4(y[2], y[3], 0x44);
    __m512i c = _mm512_shuffle_i32x4(y[0], y[1], 0xee), d = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
    char* to = static_cast<char*>(p);
    _mm512_store_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + 64, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(to + 128, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(to + 192, _mm512_shuffle_i32x4(c, d, 0xdd));
  } else {
    const char* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = reinterpret_cast<const char*>(y + i);
    transpose_words(rows, 0, static_cast<char*>(p));
  }
}

// The softmax of a block's transposed scores: scores (keys, kColumns) to p (rows of 32 keys).
// maxima and sums are one vector each, of lanes as join_columns() leaves them; sums stay lane by
// lane. Returns whether earlier sums are to be multiplied by factors.
template <int kColumns, class Math>
inline bool soften_columns(const float* scores, Math* p, float to_log2, float* maxima, float* sums,
                           float* factors) {
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
    Vec factor = simd::exp2<6>((old - shift) * scale);
    simd::store(factors, factor);
    simd::store(maxima, top);
    sum = sum * factor;
  }
  __m512i halves[kColumns];
  Vec parts[2] = {simd::zero(), simd::zero()};
#pragma GCC unroll 4
  for (int i = 0; i < kColumns; ++i) {
    const float* s = scores + 32 * i;
    Vec a = simd::exp2<kExpDegree<Math>>(exponent(Math(), simd::load(s), shift, scale));
    Vec b = simd::exp2<kExpDegree<Math>>(exponent(Math(), simd::load(s + 16), shift, scale));
    parts[0] = parts[0] + a, parts[1] = parts[1] + b;
    halves[i] = as_halves(Math(), a, b);
  }
  simd::store(sums, sum + plus(parts[0], parts[1]));
  store_by_rows<kColumns>(halves, p);
  return moved;
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
