// The decode of mainloop_decode.h with its products in AMX tiles.
//
// A step is a block of 32 keys of one head. What a step's tiles store is read a step later: read at
// once, transfer and computation did not overlap, as if every store before it, and so memory, had
// to be waited for. So each round adds the values of one step, softens the scores of the next and
// makes those of the one after it, while the next one's values are packed and memory is asked for
// more.
#pragma once

#include "flash_attention_v3/cpu/decode_amx.h"
#include "flash_attention_v3/cpu/decode_state.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

template <class Element, class Math>
struct DecodeTiles : DecodeState<Element, Math> {
  using State = DecodeState<Element, Math>;
  using Block = typename State::Block;
  using State::maxima, State::row_sums, State::head_settings, State::seen, State::steps;
  using State::sizes, State::rows, State::heads, State::in_place, State::q, State::sums;
  static constexpr int64_t kPairs = kDecodeBlock / 2;

  int64_t columns;             // queries side by side in a tile
  Math *queries, *p, *packed;  // packed queries by heads; probabilities and values of two steps
  Math *keys, *values;         // a converted block
  Math* spare;                 // a converted pair of values, then keys that are not evenly spaced
  const Math **math_keys, **math_values;
  float* scores;  // of two steps
  AmxTiles tiles;

  template <class F>
  void each_array(F&& f) {
    this->each_state_array(f);
    f(queries, heads * columns * sizes.depth), f(p, 2 * 16 * kDecodeBlock);
    f(packed, 2 * kDecodeBlock * sizes.dv), f(scores, 2 * 16 * kDecodeBlock);
    f(spare, 2 * sizes.dv + 2 * 16 * std::max(sizes.qk, sizes.qv));
    f(math_keys, kDecodeBlock), f(math_values, kDecodeBlock);
    f(keys, in_place ? 0 : kDecodeBlock * sizes.qk);
    f(values, in_place ? 0 : kDecodeBlock * this->value_stride());
  }

  template <class Params>
  DecodeTiles(const Params& params, const Item& item, Scratch& scratch)
      : State(params, item), columns(this->rows <= 4 ? 4 : 16), tiles(this->rows, columns) {
    take_arrays(*this, scratch);
  }

  // The values of a step on their way into panels, and memory that is asked for meanwhile. A local
  // of a round, so that it stays in registers.
  struct Packing {
    const Element* const* rows;
    int64_t offset, dv, padded;
    Math *to, *spare;
    int64_t share;  // pairs for each product
    Prefetch ahead;
    int64_t pairs = 0;

    JIT_KERNEL_INLINE void more(int64_t n) {
      for (int64_t end = std::min(kPairs, pairs + n); pairs < end; ++pairs) {
        ahead.until(2 * pairs + 2);
        const Element *a = rows[2 * pairs] + offset, *b = rows[2 * pairs + 1] + offset;
        if constexpr (std::is_same<Element, Math>::value) {
          if (dv == padded) {
            pack_pair(a, b, dv, to + 32 * pairs);
            continue;
          }
        }
        convert(a, b);
        pack_pair(spare, spare + padded, padded, to + 32 * pairs);
      }
    }
    JIT_KERNEL_INLINE void deal() { more(share); }
    __attribute__((noinline)) void convert(const Element* a, const Element* b) const {
      convert_row<Math>(a, spare, dv, padded);
      convert_row<Math>(b, spare + padded, dv, padded);
    }
  };

  // Adds to the tiles of scores products over n elements.
  JIT_KERNEL_INLINE void add_products(Packing& packing, const Math* const* k, int64_t offset,
                                      const Math* b, int64_t n) {
    Math* copies = spare + 2 * sizes.dv;
    TileRows<Math> low = tile_rows(k, offset, n, copies);
    TileRows<Math> high = tile_rows(k + 16, offset, n, copies + 16 * n);
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < n; i += kDepth) {
      _tile_loadd(6, b + i * columns, columns * 4);
      _tile_loadd(5, low.first + i, low.stride * 2);
      tile_dot<Math, 3, 5, 6>();
      packing.deal();
      _tile_loadd(5, high.first + i, high.stride * 2);
      tile_dot<Math, 7, 5, 6>();
      packing.deal();
    }
  }

  template <class Params>
  JIT_KERNEL_INLINE void score(const Params& params, int64_t step, Packing& packing) {
    const Block& block = this->block_of(step);
    int64_t k_offset = this->offset(params.k.head, step);
    int64_t v_offset = this->offset(params.v.head, step);
    if constexpr (std::is_same<Element, Math>::value) {
      if (in_place) return score_rows(packing, step, block.k, k_offset, block.v, v_offset);
    }
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      math_keys[j] = keys + j * sizes.qk, math_values[j] = values + j * this->value_stride();
      if (sizes.qk) {
        convert_row<Math>(block.k[j] + k_offset, keys + j * sizes.qk, params.d, sizes.qk);
      }
      if (sizes.qv) {
        convert_row<Math>(block.v[j] + v_offset, values + j * this->value_stride(), params.dv,
                          this->value_stride());
      }
    }
    score_rows(packing, step, math_keys, 0, math_values, 0);
  }

  JIT_KERNEL_INLINE void score_rows(Packing& packing, int64_t step, const Math* const* k,
                                    int64_t k_offset, const Math* const* v, int64_t v_offset) {
    const Math* b = queries + step % heads * columns * sizes.depth;
    float mix = head_settings[step % heads].mix;
    _tile_zero(3);
    _tile_zero(7);
    if (sizes.qk) add_products(packing, k, k_offset, b, sizes.qk);
    if (mix != 1.0f) amx_scale_scores(columns, mix);
    if (sizes.qv) add_products(packing, v, v_offset, b + columns * sizes.qk, sizes.qv);
    float* to = scores + step % 2 * 16 * kDecodeBlock;
    _tile_stored(3, to, columns * 4);
    _tile_stored(7, to + 16 * columns, columns * 4);
    asm volatile("" ::: "memory");
  }

  void mask(const Block& block, float* s) {
    int64_t end = block.first + kDecodeBlock;
    if (this->is_whole(block) && seen[0].end >= end && seen[rows - 1].begin <= block.first) return;
    for (int64_t i = 0; i < rows; ++i) {
      int64_t from = std::max(block.from, seen[i].begin - block.first);
      int64_t to = std::min(block.to, seen[i].end - block.first);
      for (int64_t j = 0; j < kDecodeBlock; ++j) {
        if (j < from || j >= to) s[j * columns + i] = -kInfinity;
      }
    }
  }

  // Scores to probabilities; the head's sums are scaled to its new maximum.
  void soften(int64_t step) {
    int64_t head = step % heads;
    const ScoreScale& scale = head_settings[head].scale;
    float *s = scores + step % 2 * 16 * kDecodeBlock, *maximum = maxima + head * kDecodeRows;
    Math* to = p + step % 2 * 16 * kDecodeBlock;
    if (scale.transform) transform_scores(scale, s, kDecodeBlock * columns);
    mask(this->block_of(step), s);
    alignas(64) float factors[16];
    auto work = columns == 4 ? soften_columns<4, Math> : soften_columns<16, Math>;
    if (!work(s, to, scale.to_log2(), maximum, row_sums + head * kDecodeRows, factors)) return;
    for (int64_t i = 0; i < rows; ++i) {
      if (factors[i] == 1.0f) continue;
      scale_floats(sums + (head * rows + i) * sizes.dv, sizes.dv, factors[i]);
    }
  }

  // The head's sums (rows, dv) += P (rows, 32 keys) · values.
  JIT_KERNEL_INLINE void add_values(int64_t step, Packing& packing) {
    const Math* v = packed + step % 2 * kDecodeBlock * sizes.dv;
    float* sum = sums + step % heads * rows * sizes.dv;
    int64_t c = 0, stride = sizes.dv * 4;
    asm volatile("" ::: "memory");
    _tile_loadd(4, p + step % 2 * 16 * kDecodeBlock, kDecodeBlock * 2);
    for (; c + 32 <= sizes.dv; c += 32, v += 2 * kAmxTile) {
      _tile_loadd(0, sum + c, stride);
      _tile_loadd(2, v, 64);
      tile_dot<Math, 0, 4, 2>();
      packing.deal();
      _tile_loadd(1, sum + c + 16, stride);
      _tile_loadd(2, v + kAmxTile, 64);
      tile_dot<Math, 1, 4, 2>();
      packing.deal();
      _tile_stored(0, sum + c, stride);
      _tile_stored(1, sum + c + 16, stride);
    }
    if (c < sizes.dv) {
      _tile_loadd(0, sum + c, stride);
      _tile_loadd(2, v, 64);
      tile_dot<Math, 0, 4, 2>();
      _tile_stored(0, sum + c, stride);
    }
    asm volatile("" ::: "memory");
  }

  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& parts) {
    this->load(params, s, item);
    for (int64_t h = 0; h < heads; ++h) {
      pack_columns(q + h * rows * sizes.depth, rows, sizes.depth, columns,
                   queries + h * columns * sizes.depth);
    }
    int64_t products = sizes.dv / 32 * 2 + sizes.depth / 16;
    Packing none{nullptr, 0, 0, 0, nullptr, nullptr, 0, Prefetch(), kPairs};
    if (steps > 0) {
      this->look_ahead(params, s, 0);
      score(params, 0, none);
    }
    for (int64_t step = 0; step < steps; ++step) {
      Prefetch ahead = this->look_ahead(params, s, step + kStepsAhead);
      Packing packing{this->block_of(step).v,
                      this->offset(params.v.head, step),
                      params.dv,
                      sizes.dv,
                      packed + step % 2 * kDecodeBlock * sizes.dv,
                      spare,
                      (kPairs + products - 1) / products,
                      ahead};
      if (step > 0) add_values(step - 1, packing);
      soften(step);
      if (step + 1 < steps) score(params, step + 1, packing);
      packing.more(kPairs);
    }
    if (steps > 0) add_values(steps - 1, none);
    for (int64_t i = 0; i < heads * rows; ++i) {
      order_columns(sums + i * sizes.dv, sizes.dv);
      this->write(params, s, item, parts, i, row_sum(i));
    }
  }

  // Lanes of one query, in order.
  float row_sum(int64_t i) const {
    const float* lanes = row_sums + i / rows * kDecodeRows + i % rows;
    float sum = 0.0f;
    for (int64_t j = 0; i % rows + j < kDecodeRows; j += columns) sum += lanes[j];
    return sum;
  }
};

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
