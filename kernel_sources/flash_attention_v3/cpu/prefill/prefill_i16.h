// A prefill's products of fp16 by 16-bit integers (VPDPWSSD), which are twice as many an
// instruction as of floats: 8 to 22 % slower than bf16 where floats are 85 to 120 %.
//
// A query or key becomes integers and one factor, by which its norm is at most 46,000: no sum of
// products is larger than 46,000^2 < 2^31 (Cauchy-Schwarz). Rounding moves a score by about
// 9e-6 |q| |k| (its deviation). Values have a factor for each key, and are at most 10,900;
// probabilities times these factors have one for each row and kI16Chunk keys, by which they add up
// to 195,000 at most: sums of their products stay below 2^31, too. Where rounding would show,
// floats are used, tile by tile and block by block: for large norms, values of which one element
// outweighs the others, elements that are not finite, and rows that see few keys.
#pragma once

#include <algorithm>

#include "flash_attention_v3/cpu/common/head_sizes.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"
#include "flash_attention_v3/cpu/prefill/i16_pack.h"
#include "flash_attention_v3/cpu/prefill/i16_softmax.h"

namespace jit_kernel {

// A Prefill's data for integers: none, or for fp16 the struct below. Of the prefill it reads and
// changes the PrefillState alone, which every function takes.
template <class Element, class Math>
struct Integers {
  template <class Params>
  Integers(const Params&, const HeadSizes&) {}
};

#ifdef JIT_KERNEL_I16_DOT

template <>
struct Integers<fp16, float> : PackedI16 {
  using PackedI16::PackedI16;

  // A tile of rows against a block, as Prefill::whole_tile().
  void whole_tile(State& state, const ScoreScale& scale, State::Tile& t) {
    const int64_t first = slot(state, t.row), key = t.at + t.from, block = state.tiles.block;
    GemmArgs<i16> g{q + first * depth,
                    depth,
                    keys + key * depth,
                    simd::kLanes * depth,
                    state.scores,
                    state.score_stride(),
                    depth,
                    false,
                    depth};
    g.factors = {q_factors + first, key_factors + key, 0};
    state.each_part(t, [&](int64_t i, int64_t rows, int64_t columns) {
      gemm(rows_from(g, i), rows, columns / simd::kLanes);
    });
    score_odd_keys(state, t);
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) {
      softmax_rows_i16(state.softmax_args(t, i, p + i * block, block), scale,
                       std::min<int64_t>(simd::kLanes, t.rows - i), value_factors + key,
                       p_factors + i, State::kTileRows,
                       [&](int64_t j, float* row) { state.mask_row(t, i + j, row); });
    }
    const bool accumulate = state.begin_sums(t);
    g = {p,
         block,
         values + t.at * dv + t.from * simd::kLanes,
         simd::kLanes * block,
         state.sums_of(t.row),
         dv,
         t.columns,
         accumulate,
         kI16Chunk,
         t.from};
    g.factors = {p_factors, nullptr, State::kTileRows};
    state.each_part(t, [&](int64_t i, int64_t rows, int64_t columns) {
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

  // The scores of keys that are not finite, which integers leave out. In the same tile may be rows
  // that do not see them: these keep their bits.
  void score_odd_keys(const State& state, const State::Tile& t) {
    const int64_t in_block = t.at / state.tiles.block, n = state.sizes.depth;
    for (int64_t i = 0; i < odd_counts[in_block]; ++i) {
      const int64_t key = odd_keys[in_block * kMostOddKeys + i], column = key - t.at - t.from;
      if (column < 0 || column >= t.columns) continue;
      simd::convert_to_float(state.key_pointers[key], odd_key, state.d);
      std::fill(odd_key + state.d, odd_key + n, 0.0f);
      for (int64_t r = 0; r < t.rows; ++r) {
        simd::Vec sum = simd::zero();
        for (int64_t at = 0; at < n; at += simd::kLanes) {
          sum =
              simd::fma(simd::load(state.q_of(t.row) + r * n + at), simd::load(odd_key + at), sum);
        }
        state.scores[r * state.score_stride() + column] = simd::reduce_add(sum);
      }
    }
  }
};

#endif  // JIT_KERNEL_I16_DOT

}  // namespace jit_kernel
