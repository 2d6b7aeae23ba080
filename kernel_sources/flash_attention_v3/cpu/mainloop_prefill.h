// Many query rows against packed blocks of keys: scores, softmax and P·V of a block while it is in
// cache.
#pragma once

#include "flash_attention_v3/cpu/epilogue.h"
#include "flash_attention_v3/cpu/mainloop_prefill_amx.h"
#include "flash_attention_v3/cpu/mask.h"
#include "flash_attention_v3/cpu/pack.h"
#include "flash_attention_v3/cpu/query.h"
#include "flash_attention_v3/cpu/scheduler.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// The error of a sum of floats grows with the root of its length, and large float32 scores leave
// none to spare: they are summed in pieces. Beside bf16's own rounding it does not show.
template <class Math>
constexpr int64_t kScorePieceOf = std::is_same<Math, float>::value ? 64 : 1 << 30;

template <class Element, class Math = MathOf<Element>>
struct Prefill {
  static constexpr int64_t kScorePiece = kScorePieceOf<Math>, kTileRows = kTileRowsOf<Math>;

#ifdef JIT_KERNEL_AMX
  static constexpr bool kTiles = sizeof(Math) == 2;  // fp16 only where amx_fp16_allowed()
#endif

  HeadSizes sizes;
  PrefillTiles tiles;
  Math *q, *keys, *values, *p, *spare;
  float *scores, *sums, *spare_row;
  Element* turned;
  const Element **key_rows_, **value_rows;
  float *maxima, *row_sums;  // each row's RowState
  int64_t *begins, *ends;    // each row's visible keys
  bool* begun;               // of each tile of rows: whether its sums hold anything
#ifdef JIT_KERNEL_AMX
  AmxTiles amx;
#endif
  float mix = 1.0f;  // what q·k is multiplied by before qv·v is added

  int64_t score_stride() const { return tiles.block + simd::kLanes; }  // off the powers of two

  // Calls f with each array and its length: once to add up sizes, once to take them.
  template <class F>
  void each_array(int64_t rows, F&& f) {
    int64_t padded = round_up(rows, kDepth) + kTileRows, block = tiles.block;
    f(q, padded * sizes.depth), f(sums, padded * sizes.dv), f(maxima, padded), f(row_sums, padded);
    f(begins, padded), f(ends, padded), f(begun, padded / kTileRows + 1);
    f(keys, block * sizes.depth), f(values, block * sizes.dv);
    f(scores, kTileRows * std::max(score_stride(), 3 * kDepth)), f(p, kTileRows * block);
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
      maxima[i] = -kInfinity, row_sums[i] = 0.0f;
    }
    // Rows that only fill up a tile: zeros, so that no NaN slows them down.
    std::memset(static_cast<void*>(q + rows * sizes.depth), 0,
                static_cast<size_t>((padded - rows) * sizes.depth) * sizeof(Math));
    std::memset(begun, 0, static_cast<size_t>(rows / kTileRows + 1));
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

  // Rows row .. row + rows - 1 against keys from .. from + columns - 1 of a packed block.
  struct Tile {
    int64_t row, rows, first, from, columns;  // `first` is the block's first key
    Math* p;
    float factors[kTileRows];  // what the rows' sums are multiplied by before P·V is added
  };

  // The part of a block that the rows see, in whole steps; columns is 0 when they see none of it.
  void set_tile(int64_t row, int64_t rows, int64_t first, int64_t count, Tile& t) {
    t.row = row, t.rows = rows, t.first = first;
    t.from = std::max<int64_t>(0, begins[row] - first) / kDepth * kDepth;
    int64_t to = round_up(std::min(count, ends[row + rows - 1] - first), kDepth);
    t.columns = std::max<int64_t>(0, to - t.from);
    if constexpr (std::is_same<Math, float>::value) {
      t.p = scores;  // replaced in place
    } else {
      t.p = p;
    }
  }

  GemmArgs<Math> score_args(const Tile& t) const {
    constexpr int64_t kLanes = simd::kLanes;
    return {q + t.row * sizes.depth,
            sizes.depth,
            keys + t.from * sizes.depth,
            kLanes * sizes.depth,
            scores,
            score_stride(),
            sizes.depth,
            false,
            kScorePiece};
  }

  GemmArgs<Math> value_args(const Tile& t) const {
    constexpr int64_t kLanes = simd::kLanes;
    int64_t stride = std::is_same<Math, float>::value ? score_stride() : tiles.block;
    return {t.p,
            stride,
            values + t.from * kLanes,
            kLanes * tiles.block,
            sums + t.row * sizes.dv,
            sizes.dv,
            t.columns,
            begun[t.row / kTileRows],
            t.columns};
  }

  // Up to kLanes rows of a tile from row i on.
  void soften_tile(const ScoreScale& scale, Tile& t, int64_t i) {
    int64_t row = t.row + i, start = t.first + t.from;
    int64_t p_stride = std::is_same<Math, float>::value ? score_stride() : tiles.block;
    SoftenArgs<Math> a{scores + i * score_stride(),
                       score_stride(),
                       t.p + i * p_stride,
                       p_stride,
                       t.columns,
                       maxima + row,
                       row_sums + row,
                       t.factors + i};
    soften_rows<kExpDegree<Math>>(
        a, scale, std::min<int64_t>(simd::kLanes, t.rows - i),
        [&](int64_t j) { return Interval{begins[row + j] - start, ends[row + j] - start}; });
  }

  // The values' product to come: what it adds to, and how.
  GemmArgs<Math> begin_values(const Tile& t) {
    bool& old = begun[t.row / kTileRows];
    if (old) scale_sums(t);
    GemmArgs<Math> g = value_args(t);
    old = true;
    return g;
  }

  void scale_sums(const Tile& t) {
    for (int64_t i = 0; i < t.rows; ++i) {
      if (t.factors[i] != 1.0f) scale_row(sums + (t.row + i) * sizes.dv, sizes.dv, t.factors[i]);
    }
  }

  void score(const Tile& t) {
    GemmArgs<Math> g = score_args(t);
    int64_t panels = t.columns / simd::kLanes;
    if (mix == 1.0f) return multiply(g, t.rows, panels);
    g.depth = sizes.qk;
    multiply(g, t.rows, panels);
    for (int64_t i = 0; i < t.rows; ++i) scale_row(scores + i * score_stride(), t.columns, mix);
    g.a += sizes.qk, g.b += simd::kLanes * sizes.qk, g.depth = sizes.qv, g.accumulate = true;
    multiply(g, t.rows, panels);
  }

  void add_values(const Tile& t) { multiply(begin_values(t), t.rows, sizes.dv / simd::kLanes); }

  void multiply(const GemmArgs<Math>& g, int64_t rows, int64_t panels) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (amx.active()) return gemm_amx(g, panels);
    }
#endif
    if constexpr (!std::is_same<Math, fp16>::value) gemm(g, rows, panels);
  }

  void whole_tile(const ScoreScale& scale, Tile& t) {
    score(t);
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) soften_tile(scale, t, i);
    add_values(t);
  }

  void scale_row(float* row, int64_t n, float factor) {
    simd::Vec by = simd::set1(factor);
    for (int64_t j = 0; j < n; j += simd::kLanes) simd::store(row + j, simd::load(row + j) * by);
  }

  // All rows against the packed block of keys first .. first + count - 1, tile after tile.
  void packed_tiles(const ScoreScale& scale, int64_t rows, int64_t first, int64_t count) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (amx.active() && mix == 1.0f) {
        return TilePipeline<Prefill, Math>(*this, scale).run(rows, first, count);
      }
    }
#endif
    Tile t;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      set_tile(i, std::min(kTileRows, rows - i), first, count, t);
      if (t.columns > 0) whole_tile(scale, t);
    }
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
      packed_tiles(scale, rows, first, count);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* sum = sums + i * sizes.dv;
      RowState state{maxima[i], row_sums[i]};
      if (item.part < 0) {
        write_row(params, s, item.batch, item.head_begin, item.row_begin + i, scale, sum, state);
      } else {
        std::memcpy(parts.sums + (item.part + i) * sizes.dv, sum,
                    static_cast<size_t>(sizes.dv) * sizeof(float));
        parts.states[item.part + i] = state;
      }
    }
  }
};

}  // namespace jit_kernel
