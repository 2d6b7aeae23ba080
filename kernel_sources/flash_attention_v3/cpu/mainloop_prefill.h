// Many query rows against packed blocks of keys: scores, softmax and P·V of a block while it is in
// cache.
#pragma once

#include "flash_attention_v3/cpu/epilogue.h"
#include "flash_attention_v3/cpu/gemm_amx.h"
#include "flash_attention_v3/cpu/mask.h"
#include "flash_attention_v3/cpu/pack.h"
#include "flash_attention_v3/cpu/query.h"
#include "flash_attention_v3/cpu/scheduler.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// P rounded to bf16 has 2^-9: a polynomial of degree 4 is exact beside it.
template <class Math>
constexpr int kExpDegree = std::is_same<Math, bf16>::value ? 4 : 6;

// The error of a sum of floats grows with the root of its length, and large float32 scores leave
// none to spare: they are summed in pieces. Beside bf16's own rounding it does not show.
template <class Math>
constexpr int64_t kScorePieceOf = std::is_same<Math, float>::value ? 32 : 1 << 30;

template <class Element>
struct Prefill {
  using Math = MathOf<Element>;
  static constexpr int64_t kScorePiece = kScorePieceOf<Math>;

  HeadSizes sizes;
  PrefillTiles tiles;
  Math *q, *keys, *values, *p, *spare;
  float *scores, *sums, *spare_row;
  Element* turned;
  const Element **key_rows_, **value_rows;
  RowState* states;
  int64_t *begins, *ends;  // each row's visible keys
#ifdef JIT_KERNEL_AMX
  AmxTiles amx;
#endif
  float mix = 1.0f;  // what q·k is multiplied by before qv·v is added

  int64_t score_stride() const { return tiles.block + simd::kLanes; }  // off the powers of two

  // Calls f with each array and its length: once to add up sizes, once to take them.
  template <class F>
  void each_array(int64_t rows, F&& f) {
    int64_t padded = round_up(rows, kDepth) + kTileRows, block = tiles.block;
    f(q, padded * sizes.depth), f(sums, padded * sizes.dv), f(states, padded);
    f(begins, padded), f(ends, padded);
    f(keys, block * sizes.depth), f(values, block * sizes.dv);
    f(scores, kTileRows * score_stride()), f(p, kTileRows * block);
    f(spare, simd::kLanes * std::max(std::max(sizes.qk, sizes.qv), sizes.dv));
    f(spare_row, sizes.depth), f(turned, sizes.depth);
    f(key_rows_, block), f(value_rows, block);
  }

  template <class Params>
  Prefill(const Params& params, int64_t rows, Scratch& scratch)
      : sizes(head_sizes<Math>(params)), tiles(prefill_tiles<Math>(sizes)) {
    size_t bytes = 0;
    each_array(rows, [&](auto*& a, int64_t n) {
      bytes += Scratch::size<std::remove_reference_t<decltype(*a)>>(n);
    });
    scratch.reserve(bytes);
    each_array(rows, [&](auto*& a, int64_t n) {
      a = scratch.take<std::remove_reference_t<decltype(*a)>>(n);
    });
  }

  template <class Params>
  void load_rows(const Params& params, const Sequence& s, const Item& item) {
    int64_t rows = item.row_end - item.row_begin, padded = round_up(rows, kDepth);
    for (int64_t i = 0; i < rows; ++i) {
      int64_t r = item.row_begin + i;
      load_query(params, s, sizes, item.head_begin, r, q + i * sizes.depth, spare_row, turned);
      Interval seen = visible_keys(params, r / params.group, s.sq, s.sk);
      begins[i] = std::min(std::max(seen.begin, item.key_begin), item.key_end);
      ends[i] = std::max(begins[i], std::min(seen.end, item.key_end));
      states[i] = RowState();
    }
    // Rows that only fill up a tile: zeros, so that no NaN slows them down.
    std::memset(static_cast<void*>(q + rows * sizes.depth), 0,
                static_cast<size_t>((padded - rows) * sizes.depth) * sizeof(Math));
    std::memset(sums, 0, static_cast<size_t>(padded * sizes.dv) * sizeof(float));
  }

  template <class Params>
  void pack_block(const Params& params, const Sequence& s, int64_t head_k, int64_t first,
                  int64_t count) {
    int64_t padded = round_up(count, kDepth), panel = simd::kLanes * sizes.depth;
    key_rows(params, params.v, s, first, count, head_k, value_rows);
    if (!params.only_qv) {
      key_rows(params, params.k, s, first, count, head_k, key_rows_);
      pack_keys(key_rows_, count, params.d, sizes.qk, keys, panel, spare);
      fill_panels(count, padded, sizes.qk, keys, panel);
    }
    if (params.qv) {
      Math* after = keys + simd::kLanes * sizes.qk;
      pack_keys(value_rows, count, params.dv, sizes.qv, after, panel, spare);
      fill_panels(count, padded, sizes.qv, after, panel);
    }
    pack_values(value_rows, count, padded, params.dv, sizes.dv, values, simd::kLanes * tiles.block,
                spare);
  }

  // Zeros in the panels that hold no key.
  void fill_panels(int64_t count, int64_t padded, int64_t depth, Math* out, int64_t panel) {
    for (int64_t j = round_up(count, simd::kLanes); j < padded; j += simd::kLanes) {
      std::memset(static_cast<void*>(out + j / simd::kLanes * panel), 0,
                  static_cast<size_t>(simd::kLanes * depth) * sizeof(Math));
    }
  }

  // Rows row .. row + rows - 1 against the packed block of keys first .. first + count - 1.
  void tile(const ScoreScale& scale, int64_t row, int64_t rows, int64_t first, int64_t count) {
    int64_t from = std::max<int64_t>(0, begins[row] - first) / kDepth * kDepth;
    int64_t to = round_up(std::min(count, ends[row + rows - 1] - first), kDepth);
    int64_t columns = to - from;
    if (columns <= 0) return;
    constexpr int64_t kLanes = simd::kLanes;
    score(row, rows, from, columns);
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * score_stride();
      if (scale.transform) transform_scores(scale, s, columns);
      int64_t begin = std::min(columns, std::max<int64_t>(0, begins[row + i] - first - from));
      int64_t end = std::max(begin, std::min(columns, ends[row + i] - first - from));
      mask_scores(s, begin, end, columns);
      float factor = softmax_row<kExpDegree<Math>>(s, probabilities(i), columns, scale.to_log2(),
                                                   states[row + i]);
      if (factor != 1.0f) scale_row(sums + (row + i) * sizes.dv, sizes.dv, factor);
    }
    GemmArgs<Math> pv{probabilities(0),
                      probability_stride(),
                      values + from * kLanes,
                      kLanes * tiles.block,
                      sums + row * sizes.dv,
                      sizes.dv,
                      columns,
                      true,
                      columns};
    multiply(pv, rows, sizes.dv / kLanes);
  }

  void multiply(const GemmArgs<Math>& g, int64_t rows, int64_t panels) {
#ifdef JIT_KERNEL_AMX
    if constexpr (std::is_same<Math, bf16>::value) {
      if (amx.active()) return gemm_amx(g, rows, panels);
    }
#endif
    gemm(g, rows, panels);
  }

  // Scores of rows and the packed keys from .. from + columns - 1.
  void score(int64_t row, int64_t rows, int64_t from, int64_t columns) {
    constexpr int64_t kLanes = simd::kLanes;
    GemmArgs<Math> g{q + row * sizes.depth, sizes.depth, keys + from * sizes.depth,
                     kLanes * sizes.depth,  scores,      score_stride(),
                     sizes.depth,           false,       kScorePiece};
    if (mix == 1.0f) return multiply(g, rows, columns / kLanes);
    g.depth = sizes.qk;
    multiply(g, rows, columns / kLanes);
    for (int64_t i = 0; i < rows; ++i) scale_row(scores + i * score_stride(), columns, mix);
    g.a += sizes.qk, g.b += kLanes * sizes.qk, g.depth = sizes.qv, g.accumulate = true;
    multiply(g, rows, columns / kLanes);
  }

  // Floats are replaced in place.
  Math* probabilities(int64_t i) {
    if constexpr (std::is_same<Math, float>::value) return scores + i * score_stride();
    return p + i * tiles.block;
  }
  int64_t probability_stride() const {
    return std::is_same<Math, float>::value ? score_stride() : tiles.block;
  }

  void scale_row(float* row, int64_t n, float factor) {
    simd::Vec by = simd::set1(factor);
    for (int64_t j = 0; j < n; j += simd::kLanes) simd::store(row + j, simd::load(row + j) * by);
  }

  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& parts) {
    int64_t rows = item.row_end - item.row_begin;
    load_rows(params, s, item);
    ScoreScale scale = score_scale_of(params, item.batch, item.head_begin);
    mix = qk_factor(params, item.batch, item.head_begin);
    int64_t begin = begins[0], end = ends[rows - 1];
    // Blocks are counted from the item's first key, never from what a row sees first.
    int64_t first = item.key_begin + (begin - item.key_begin) / tiles.block * tiles.block;
    for (; first < end; first += tiles.block) {
      int64_t count = std::min(tiles.block, end - first);
      pack_block(params, s, item.head_begin, first, count);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        tile(scale, i, std::min(kTileRows, rows - i), first, count);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* sum = sums + i * sizes.dv;
      if (item.part < 0) {
        write_row(params, s, item.batch, item.head_begin, item.row_begin + i, scale, sum,
                  states[i]);
      } else {
        std::memcpy(parts.sums + (item.part + i) * sizes.dv, sum,
                    static_cast<size_t>(sizes.dv) * sizeof(float));
        parts.states[item.part + i] = states[i];
      }
    }
  }
};

}  // namespace jit_kernel
