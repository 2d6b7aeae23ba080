// Queries, keys and values as integers, tile by tile and block by block.
#pragma once

#include <algorithm>
#include <cmath>

#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/prefetch.h"
#include "flash_attention_v3/cpu/prefill/i16_rows.h"
#include "flash_attention_v3/cpu/prefill/pack.h"
#include "flash_attention_v3/cpu/prefill/prefill_state.h"

#ifdef JIT_KERNEL_I16_DOT

namespace jit_kernel {

// The largest |q| |k| times the scale of scores that is left to integers: a score's deviation is
// 2.8e-4 then, and an lse may be off by 1e-3. Normal numbers have 11 at head size 128.
constexpr float kLargestNorms = 32.0f;

// Rows that see fewer keys are computed in floats: a row that sees one key is its value, and
// integers are off by 2^-15 of a value's largest element.
constexpr int64_t kFewKeysI16 = 16;

// Keys of a block that are not finite and scored one by one. A block with more is all in floats.
constexpr int64_t kMostOddKeys = 4;

// The queries, keys and values of an item as integers, and which of them suit integers.
struct PackedI16 {
  using State = PrefillState<fp16, float>;

  bool on;            // whether anything is computed in integers
  int64_t depth, dv;  // padded
  float score_scale;  // the factor of q·k, without its sign
  i16 *q, *keys, *values, *p, *spare;
  fp16* halves;  // rows that are no whole vectors
  float *q_factors, *key_factors, *value_factors, *p_factors;
  float *tile_norms, *key_norms;   // a tile's largest; infinite where floats are wanted
  bool* has_floats;                // of each block
  int64_t *odd_counts, *odd_keys;  // of each block: keys that are not finite
  float* odd_key;

  template <class Params>
  PackedI16(const Params& params, const HeadSizes& sizes)
      : on(!params.qv),
        depth(round_up(sizes.qk, kDepth)),
        dv(sizes.dv),
        score_scale(std::abs(params.softmax_scale)) {}

  template <class F>
  void each_array(const State& state, int64_t padded_rows, F&& f) {
    const int64_t rows = state.q_rows, packed = state.packed_keys(), block = state.tiles.block;
    f(q, rows * depth);
    f(q_factors, rows);
    f(tile_norms, padded_rows / State::kTileRows);
    f(keys, packed * depth);
    f(key_factors, packed);
    f(key_norms, packed);
    f(values, packed * dv);
    f(value_factors, packed);
    f(has_floats, packed / block);
    f(p, State::kTileRows * block);
    f(p_factors, State::kTileRows * kI16Chunks);
    f(odd_counts, packed / block);
    f(odd_keys, packed / block * kMostOddKeys);
    f(odd_key, state.sizes.depth);
    f(spare, simd::kLanes * depth);
    f(halves, kDepth * std::max(depth, dv));
  }

  // The first row of a tile among those that are held.
  static int64_t slot(const State& state, int64_t row) {
    return (state.q_of(row) - state.q) / state.sizes.depth;
  }

  // The queries of the tile from row `row` on, which are there as floats.
  void load_tile(const State& state, int64_t row, int64_t rows) {
    const float* from = state.q_of(row);
    const int64_t n = state.sizes.depth, first = slot(state, row);
    float norm = 0.0f;
    for (int64_t i = 0; i < State::kTileRows; i += simd::kLanes, from += simd::kLanes * n) {
      auto load = [&](int64_t j, int64_t at) {
        return at < n ? simd::load(from + j * n + at) : simd::zero();
      };
      norm = std::max(norm, simd::reduce_max(rows_to_integers(load, depth, q + (first + i) * depth,
                                                              q_factors + first + i)));
    }
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t seen = state.count_seen(i);
      if (seen > 0 && seen < kFewKeysI16) norm = kInfinity;
    }
    tile_norms[row / State::kTileRows] = norm;
  }

  // Packs the block that begins `at` keys after the first of those that are packed.
  void pack_block(const State& state, int64_t at) {
    const int64_t block = state.tiles.block, end = std::min(state.packed, at + block);
    auto rows_from = [&](int64_t i) {
      return PackedRows{state.hidden - i, end - i, state.packed - i};
    };
    const fp16* rows[kDepth];
    const i16* integers[simd::kLanes];
    odd_counts[at / block] = 0;
    has_floats[at / block] = false;
    for (int64_t j = 0; j < simd::kLanes; ++j) integers[j] = spare + j * depth;
    for (int64_t i = at; i < end; i += kDepth) {
      find_rows(state.key_pointers + i, rows_from(i), state.d, depth, rows);
      for (int64_t j = 0; j < kDepth; j += simd::kLanes) {
        auto load = [&](int64_t row, int64_t n) { return simd::load_as_float(rows[j + row] + n); };
        simd::Vec norms = rows_to_integers(load, depth, spare, key_factors + i + j);
        simd::store(key_norms + i + j, take_odd_keys(norms, at / block, i + j));
        transpose_panel(integers, depth, keys + (i + j) * depth, [](int64_t) {});
      }
    }
    for (int64_t i = at; i < end; i += kDepth) {
      find_rows(state.value_pointers + i, rows_from(i), state.dv, dv, rows);
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

  // kDepth rows of n elements, filled up to `padded` with zeros. The next kDepth are asked for
  // where there are so many.
  void find_rows(const fp16* const* from, const PackedRows& which, int64_t n, int64_t padded,
                 const fp16** rows) {
    Prefetch ahead(reinterpret_cast<const void* const*>(from), n * int64_t{sizeof(fp16)},
                   which.known, kDepth);
    ahead.more(kDepth);
    for (int64_t j = 0; j < kDepth; ++j) {
      const bool is_there = which.holds(j);
      rows[j] = is_there ? from[j] : nullptr;
      if (n == padded && is_there) continue;
      fp16* to = halves + j * padded;
      convert_row<fp16>(rows[j], to, is_there ? n : 0, padded);
      rows[j] = to;
    }
  }

  // Whether a tile and the keys that its rows see of a block are computed in integers.
  bool fit(const State& state, const State::Tile& t) const {
    if (!on) return false;
    const int64_t last = t.row + t.rows - 1;
    const int64_t from = std::max<int64_t>(0, state.begins[t.row] - t.first);
    const int64_t to = std::min(t.from + t.columns, state.ends[last] - t.first);
    simd::Vec norms = simd::zero();
    for (int64_t i = from; i < to; i += simd::kLanes) {
      auto seen = static_cast<__mmask16>((1u << std::min<int64_t>(simd::kLanes, to - i)) - 1);
      if (state.draft.covers(t.first + to)) seen &= state.drafts_of(t, t.first + i);
      norms = simd::max(norms, _mm512_maskz_loadu_ps(seen, key_norms + t.at + i));
    }
    const float norm = simd::reduce_max(norms);
    return score_scale * tile_norms[t.row / State::kTileRows] * norm <= kLargestNorms;
  }
};

}  // namespace jit_kernel

#endif  // JIT_KERNEL_I16_DOT
