// The decode of mainloop_decode.h with its products in AMX tiles.
//
// A step is a block of 32 keys of one head. Each round turns a step's scores into probabilities and
// adds its values, after it has made the scores of the next step, so that none are waited for (2 to
// 3 %); between the products memory is asked for more.
#pragma once

#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/prefetch.h"
#include "flash_attention_v3/cpu/decode/decode_amx.h"
#include "flash_attention_v3/cpu/decode/decode_state.h"
#include "jit_kernel/cpu/thread_pool.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

template <class Element, class Math>
struct DecodeTiles : DecodeState<Element, Math> {
  using State = DecodeState<Element, Math>;
  using Block = typename State::Block;
  using Key = typename State::Key;
  using State::maxima, State::row_sums, State::head_settings, State::seen, State::steps;
  using State::sizes, State::rows, State::heads, State::in_place, State::q, State::sums;
  using State::sum_columns;
  static constexpr int64_t kPanel = 32;  // columns of values in a tile
  static constexpr int64_t kHalf = kDecodeBlock / 2;
  static constexpr int64_t kStepScores = kDecodeRows * kDecodeBlock;

  int64_t columns;       // queries side by side in a tile
  int64_t value_stride;  // of converted values
  Math* queries;         // packed, by heads
  uint32_t* p;           // probabilities of a step
  float* scores;         // of two steps
  Math *keys, *values;   // a converted block
  Math* copies;          // keys or values that are not evenly spaced
  float* ordered;        // a row of sums
  AmxTiles tiles;

  template <class F>
  void each_array(F&& f) {
    this->each_state_array(f);
    f(queries, heads * columns * sizes.depth);
    f(p, 2 * kTileWords);
    f(scores, 2 * kStepScores);
    f(copies, 2 * kHalf * std::max(sizes.qk, value_stride));
    f(ordered, sum_columns);
    f(keys, in_place ? 0 : kDecodeBlock * sizes.qk);
    f(values, in_place ? 0 : kDecodeBlock * value_stride);
  }

  template <class Params>
  DecodeTiles(const Params& params, const Item& item, Scratch& scratch)
      : State(params, item),
        columns(this->rows <= 4 ? 4 : 16),
        tiles(this->rows <= kDecodeRows / 2 ? 2 * this->rows : this->rows, columns) {
    sum_columns = round_up(sizes.dv, kPanel);
    value_stride = std::max(sum_columns, sizes.qv);
    in_place = in_place && sizes.dv >= kPanel;
    scratch.take_all([&](auto&& f) { each_array(f); });
  }

  // The keys or values of a step, 16 and 16.
  struct Halves {
    TileRows<Math> low, high;
  };
  // Memory that is asked for between products.
  struct Asking {
    Prefetch ahead;
    int64_t share;  // rows for each product
    int64_t at = 0;

    void rest() { at = ahead.ask(at, kDecodeBlock); }
  };

  const Block& block_of(int64_t step) const { return this->blocks[step / heads % State::kBlocks]; }
  // From head 0 of a key or value to the head of a step.
  int64_t offset(int64_t head_stride, int64_t step) const {
    return (this->head_begin + step % heads) * head_stride;
  }

  // Locates the blocks of a step and the next one, and the lines asked for while the step runs;
  // returns those that are left to ask for.
  template <class Params>
  Prefetch look_ahead(const Params& params, const Sequence& s, int64_t step) {
    const int64_t ahead = std::min(step + kStepsAhead, steps - 1);
    const int64_t next = step / heads + 1, last = (steps - 1) / heads;
    this->locate_until(params, s, std::min(last, std::max(next, ahead / heads)));
    const int64_t rows_of_step = (kDecodeBlock + heads - 1) / heads;
    if (next <= last) {
      this->open_pages(params, this->blocks[next % State::kBlocks], step % heads * rows_of_step,
                       rows_of_step);
    }
    constexpr int64_t kSize = sizeof(Key);
    const Block& b = block_of(ahead);
    auto at = [](const Key* const* p) { return reinterpret_cast<const void* const*>(p); };
    return {params.only_qv ? nullptr : at(b.k),
            offset(params.k.head, ahead) * kSize,
            params.d * kSize,
            at(b.v),
            offset(params.v.head, ahead) * kSize,
            params.dv * kSize,
            b.to};
  }

  // Adds to the tiles of scores products over n elements.
  static void add_products(const Halves& k, const Math* b, int64_t columns, int64_t n,
                           Asking& asking) {
    int64_t at = asking.at;
    asm volatile("" ::: "memory");  // the lines that tiles load are written
    for (int64_t i = 0; i < n; i += kDepth, b += kDepth * columns) {
      _tile_loadd(6, b, columns * 4);
      _tile_loadd(5, k.low.first + i, k.low.bytes);
      tile_dot<Math, 3, 5, 6>();
      at = asking.ahead.ask(at, asking.share);
      _tile_loadd(5, k.high.first + i, k.high.bytes);
      tile_dot<Math, 7, 5, 6>();
      at = asking.ahead.ask(at, asking.share);
    }
    asking.at = at;
  }

  // Adds P · values to the sums of up to 8 rows: even and odd columns in one tile.
  static void add_few_rows(const Halves& v, const uint32_t* a, float* sum, int64_t line,
                           int64_t last, Asking& asking) {
    int64_t at = asking.at;
    _tile_loadd(1, a, 64);
    _tile_loadd(4, a + kTileWords, 64);
    for (int64_t c = 0;; c = std::min(c + kPanel, last), sum += line) {
      _tile_loadd(0, sum, 64);
      _tile_loadd(5, v.low.first + c, v.low.bytes);
      tile_dot<Math, 0, 1, 5>();
      at = asking.ahead.ask(at, asking.share);
      _tile_loadd(5, v.high.first + c, v.high.bytes);
      tile_dot<Math, 0, 4, 5>();
      at = asking.ahead.ask(at, asking.share);
      _tile_stored(0, sum, 64);
      if (c == last) break;
    }
    asking.at = at;
  }

  // The same of 16 keys and up to 16 rows: a tile for even columns, one for odd ones, which lie
  // `line` floats further.
  static void add_many_rows(const TileRows<Math>& v, const uint32_t* a, float* sum, int64_t line,
                            int64_t last, Asking& asking) {
    int64_t at = asking.at;
    _tile_loadd(1, a, 64);
    _tile_loadd(4, a + line, 64);
    for (int64_t c = 0;; c = std::min(c + kPanel, last), sum += 2 * line) {
      _tile_loadd(0, sum, 64);
      _tile_loadd(2, sum + line, 64);
      _tile_loadd(5, v.first + c, v.bytes);
      tile_dot<Math, 0, 1, 5>();
      tile_dot<Math, 2, 4, 5>();
      at = asking.ahead.ask(at, asking.share);
      _tile_stored(0, sum, 64);
      _tile_stored(2, sum + line, 64);
      if (c == last) break;
    }
    asking.at = at;
  }

  // A step's rows of one kind in halves: where they are, or converted to rows of `padded` elements.
  // `n` of them count; factor(j) is the factor of row j.
  template <class Factor>
  Halves halves_of(const Key* const* rows, const int64_t (&row_steps)[2], int64_t offset, int64_t n,
                   int64_t padded, Math* converted, Factor&& factor) {
    if constexpr (std::is_same<Key, Math>::value) {
      if (in_place) {
        return {tile_rows(rows, row_steps[0], offset, n, copies),
                tile_rows(rows + kHalf, row_steps[1], offset, n, copies + kHalf * n)};
      }
    }
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      convert_row<Math>(rows[j] + offset, converted + j * padded, n, padded, factor(j));
    }
    const int64_t bytes = padded * int64_t{sizeof(Math)};
    return {{converted, bytes}, {converted + kHalf * padded, bytes}};
  }

  template <class Params>
  Halves keys_of(const Params& params, int64_t step) {
    const Block& block = block_of(step);
    const int64_t head = this->head_begin + step % heads;
    return halves_of(block.k, block.k_steps, offset(params.k.head, step), params.d, sizes.qk, keys,
                     [&](int64_t j) { return this->k_factor(params, block, j, head); });
  }

  template <class Params>
  Halves values_of(const Params& params, int64_t step) {
    const Block& block = block_of(step);
    const int64_t head = this->head_begin + step % heads;
    return halves_of(block.v, block.v_steps, offset(params.v.head, step), params.dv, value_stride,
                     values, [&](int64_t j) { return this->v_factor(params, block, j, head); });
  }

  template <class Params>
  void score(const Params& params, int64_t step, Asking& asking) {
    const Math* b = queries + step % heads * columns * sizes.depth;
    float mix = head_settings[step % heads].mix;
    _tile_zero(3);
    _tile_zero(7);
    if (sizes.qk) add_products(keys_of(params, step), b, columns, sizes.qk, asking);
    if (mix != 1.0f) amx_scale_scores(columns, mix);
    if (sizes.qv) {
      b += columns * sizes.qk;
      add_products(values_of(params, step), b, columns, sizes.qv, asking);
    }
    float* to = scores + step % 2 * kStepScores;
    _tile_stored(3, to, columns * 4);
    _tile_stored(7, to + 16 * columns, columns * 4);
    asm volatile("" ::: "memory");
  }

  void mask(const Block& block, float* s) {
    if (this->is_whole(block) && this->all_see(block)) return;
    for (int64_t i = 0; i < rows; ++i) this->mask_row(block, i, s + i, columns);
  }

  // Scores to probabilities; the head's sums are scaled to its new maximum.
  void softmax(int64_t step) {
    int64_t head = step % heads;
    const ScoreScale& scale = head_settings[head].scale;
    float *s = scores + step % 2 * kStepScores, *maximum = maxima + head * kDecodeRows;
    if (scale.transform) transform_scores(scale, s, kDecodeBlock * columns);
    mask(block_of(step), s);
    alignas(64) float factors[16];
    auto work = columns == 4 ? softmax_columns<4, Math> : softmax_columns<16, Math>;
    float* sum = row_sums + head * kDecodeRows;
    if (!work(s, rows, p, scale.to_log2(), maximum, sum, factors)) return;
    for (int64_t i = 0; i < rows; ++i) {
      if (factors[i] == 1.0f) continue;
      for (int64_t c = 0; c < sum_columns; c += kPanel) {
        simd::scale_floats(sum_line(head, c, i), 16, factors[i]);
        simd::scale_floats(sum_line(head, c, rows + i), 16, factors[i]);
      }
    }
  }

  // Sums lie as tiles leave them: for a panel of 32 columns a line of the even columns of each
  // query, then one each of the odd columns.
  float* sum_line(int64_t head, int64_t column, int64_t line) {
    return sums + head * rows * sum_columns + column * rows + line * 16;
  }

  // The first column of the last panel: it takes the last 32 columns that there are.
  int64_t last_column() const { return (in_place ? sizes.dv : sum_columns) - kPanel; }

  // The head's sums (rows, dv) += P (rows, 32 keys) · values.
  template <class Params>
  void add_values(const Params& params, int64_t step, Asking& asking) {
    float* sum = sum_line(step % heads, 0, 0);
    Halves v = values_of(params, step);
    asm volatile("" ::: "memory");
    if (rows > kDecodeRows / 2) {
      add_many_rows(v.low, p, sum, rows * 16, last_column(), asking);
      add_many_rows(v.high, p + kTileWords, sum, rows * 16, last_column(), asking);
    } else {
      add_few_rows(v, p, sum, rows * 32, last_column(), asking);
    }
    asm volatile("" ::: "memory");
  }

  // Puts a row's sums in the order of columns; returns whether all are finite.
  bool order_row(int64_t head, int64_t row) {
    __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __mmask16 not_finite = 0;
    for (int64_t c = 0; c < sum_columns; c += kPanel) {
      __m512 even = _mm512_load_ps(sum_line(head, c, row));
      __m512 odd = _mm512_load_ps(sum_line(head, c, rows + row));
      float* to = ordered + std::min(c, last_column());
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, high, odd));
      __m512 both = _mm512_add_ps(_mm512_sub_ps(even, even), _mm512_sub_ps(odd, odd));
      not_finite |= _mm512_cmp_ps_mask(both, both, _CMP_UNORD_Q);
    }
    return not_finite == 0;
  }

  // Writes the part that has ended, and to `not_finite` the heads of it whose sums are not all
  // finite.
  template <class Params>
  void write_part(const Params& params, const Sequence& s, const Item& item,
                  const Partials& partials, std::vector<Item>& not_finite) {
    for (int64_t h = 0; h < heads; ++h) {
      bool finite = true;
      for (int64_t r = 0; r < rows; ++r) {
        finite &= order_row(h, r);
        this->write(params, s, item, partials, h * rows + r, ordered, row_sum(h * rows + r));
      }
      if (finite) continue;
      Item again = item;
      again.head_begin = this->head_begin + h;
      again.head_end = again.head_begin + 1;
      again.key_begin += this->part * item.part_keys;
      again.key_end = std::min(again.key_begin + item.part_keys, item.key_end);
      if (item.part >= 0) again.part += this->part * item.part_stride + h * rows;
      not_finite.push_back(again);
    }
  }

  // Returns the items to be done again without tiles, as their sums are not all finite: a value
  // that is not finite reaches the neighbouring column here, as 0 · inf is NaN.
  template <class Params>
  std::vector<Item> run(const Params& params, const Sequence& s, const Item& item,
                        const Partials& partials) {
    this->load(params, s, item);
    for (int64_t h = 0; h < heads; ++h) {
      pack_columns(q + h * rows * sizes.depth, rows, sizes.depth, columns,
                   queries + h * columns * sizes.depth);
    }
    std::vector<Item> not_finite;
    auto write = [&] { write_part(params, s, item, partials, not_finite); };
    int64_t products = sum_columns / 16 + sizes.depth / 16;
    Asking none{Prefetch(), 0};
    if (steps > 0) {
      this->locate_until(params, s, 0);
      score(params, 0, none);
    }
    for (int64_t step = 0; step < steps; ++step) {
      Asking asking{look_ahead(params, s, step), (kDecodeBlock + products - 1) / products};
      this->end_parts(step, write);
      if (step + 1 < steps) score(params, step + 1, asking);
      softmax(step);
      add_values(params, step, asking);
      asking.rest();
    }
    this->end_last_parts(write);
    return not_finite;
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
