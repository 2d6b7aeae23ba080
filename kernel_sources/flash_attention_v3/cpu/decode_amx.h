// A decode's products in AMX tiles, for 2 to 16 query rows.
//
// Scores come transposed, keys by rows: so keys are read as they lie in memory, 16 rows of 32
// elements a tile, and it is the few queries that are packed. P·V takes packed values, a pair of
// keys side by side.
#pragma once

#include "flash_attention_v3/cpu/gemm_amx.h"
#include "flash_attention_v3/cpu/pack.h"
#include "flash_attention_v3/cpu/prefetch.h"
#include "flash_attention_v3/cpu/softmax.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

static_assert(kDecodeBlock == kDepth, "a block of keys is one tile deep");

// Tiles 3 and 7 take scores; the intrinsics want literal numbers.
template <int kTile>
inline void amx_zero() {
  static_assert(kTile == 3 || kTile == 7, "a tile of scores");
  if (kTile == 3) {
    _tile_zero(3);
  } else {
    _tile_zero(7);
  }
}

template <int kTile>
inline void amx_store(float* to) {
  if (kTile == 3) {
    _tile_stored(3, to, 64);
  } else {
    _tile_stored(7, to, 64);
  }
}

template <int kTile>
inline void amx_scale(float factor) {
  alignas(64) float tile[256];
  amx_store<kTile>(tile);
  for (float& x : tile) x *= factor;
  asm volatile("" ::: "memory");
  if (kTile == 3) {
    _tile_loadd(3, tile, 64);
  } else {
    _tile_loadd(7, tile, 64);
  }
}

// Adds to a tile of scores (16 keys by 16 query rows) products over n elements: keys[j] + offset
// against queries packed as one panel. `spare` holds 16 rows of n elements, for keys that are not
// evenly spaced.
template <int kTile>
inline void amx_add_scores(const bf16* const* keys, int64_t offset, const bf16* queries, int64_t n,
                           bf16* spare, Prefetch& prefetch) {
  const bf16* first = keys[0] + offset;
  int64_t stride = keys[1] - keys[0];
  bool even = stride > 0;
  for (int j = 2; j < 16; ++j) even &= keys[j] - keys[j - 1] == stride;
  if (!even) {
    for (int j = 0; j < 16; ++j) {
      std::memcpy(static_cast<void*>(spare + j * n), keys[j] + offset, static_cast<size_t>(n) * 2);
    }
    first = spare, stride = n;
  }
  asm volatile("" ::: "memory");
  for (int64_t k = 0; k < n; k += kDepth) {
    prefetch.lines(8);
    _tile_loadd(5, first + k, stride * 2);
    _tile_loadd(6, queries + k * 16, 64);
    tile_dot<bf16, kTile, 5, 6>();
  }
}

// The tile of scores to rows: scores[i * kDecodeBlock + j], key j and query row i.
template <int kTile>
inline void amx_store_scores(int64_t rows, float* scores) {
  alignas(64) float by_keys[256], by_rows[256];
  amx_store<kTile>(by_keys);
  const char* lines[16];
  for (int j = 0; j < 16; ++j) lines[j] = reinterpret_cast<const char*>(by_keys + 16 * j);
  transpose_words(lines, 0, reinterpret_cast<char*>(by_rows));
  for (int64_t i = 0; i < rows; ++i) {
    simd::store(scores + i * kDecodeBlock, simd::load(by_rows + 16 * i));
  }
}

// sums (rows, dv) += P (rows, kDecodeBlock) · values, packed in panels of 16 columns. The tiles'
// rows are those of P.
inline void amx_add_values(const bf16* p, const bf16* values, float* sums, int64_t dv,
                           Prefetch& prefetch) {
  constexpr int64_t kPanel = 16 * kDecodeBlock;
  asm volatile("" ::: "memory");
  _tile_loadd(4, p, kDecodeBlock * 2);
  int64_t c = 0;
  for (; c + 32 <= dv; c += 32, values += 2 * kPanel) {
    prefetch.lines(16);
    _tile_loadd(0, sums + c, dv * 4);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(1, sums + c + 16, dv * 4);
    _tile_loadd(5, values + kPanel, 64);
    _tile_dpbf16ps(1, 4, 5);
    _tile_stored(0, sums + c, dv * 4);
    _tile_stored(1, sums + c + 16, dv * 4);
  }
  if (c == dv) return;
  prefetch.lines(8);
  _tile_loadd(0, sums + c, dv * 4);
  _tile_loadd(6, values, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_stored(0, sums + c, dv * 4);
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
