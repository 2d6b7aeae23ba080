// The decode of mainloop_decode.h with its products by VDPBF16PS.
//
// A block of keys passes all heads: a few keys of each at a time, so that memory is read nearly in
// its own order, which decides how fast it is read.
#pragma once

#include "flash_attention_v3/cpu/decode_pairs.h"
#include "flash_attention_v3/cpu/run_prefetch.h"

#ifdef JIT_KERNEL_BF16_DOT

namespace jit_kernel {

template <class Element>
struct DecodePairs : DecodeState<Element, bf16> {
  using State = DecodeState<Element, bf16>;
  using Block = typename State::Block;
  using State::blocks, State::kBlocks, State::sum_columns, State::head_begin;
  using State::maxima, State::row_sums, State::head_settings, State::seen, State::steps;
  using State::sizes, State::rows, State::heads, State::in_place, State::q, State::sums;
  using Ahead = RunPrefetch<Block, kBlocks>;
  static constexpr int64_t kBytesAhead = 32 << 10;

  int64_t groups;        // of four rows, in each head
  int64_t value_stride;  // of converted values
  bf16* queries;         // head after head, rows filled up to groups
  float* scores;         // of a block, head after head, group after group
  bf16* p;               // the same
  bf16 *keys, *values;   // a head's, converted
  const bf16** near;     // rows of keys, of values, and of keys once more: of the next block
  float* ordered;        // a row of sums
  Ahead ahead;
  int64_t key_bytes, value_share;  // to be asked for with each key, and with each panel of values

  template <class F>
  void each_array(F&& f) {
    this->each_state_array(f);
    f(queries, heads * groups * kGroupRows * sizes.depth);
    f(scores, heads * groups * kGroupScores), f(p, heads * groups * kGroupScores);
    f(keys, kDecodeBlock * sizes.qk), f(values, kDecodeBlock * value_stride);
    f(near, 3 * kDecodeBlock), f(ordered, sum_columns);
  }

  template <class Params>
  DecodePairs(const Params& params, const Item& item, Scratch& scratch)
      : State(params, item), groups((this->rows + kGroupRows - 1) / kGroupRows) {
    sum_columns = round_up(sizes.dv, kPanel);
    value_stride = std::max(sum_columns, sizes.qv);
    in_place = in_place && sum_columns == sizes.dv && std::is_same<Element, bf16>::value;
    take_arrays(*this, scratch);
  }

  // Heads of a block whose rows `near` holds: head h begins h heads after the offset.
  struct Heads {
    int64_t begin, end;
    int64_t k_offset, k_head, v_offset, v_head;
  };

  // The first row of a head's group.
  int64_t padded_row(int64_t head, int64_t group) const {
    return (head * groups + group) * kGroupRows;
  }

  // Scores of kScoreKeys keys from `key` on of all heads.
  void score(const Heads& of, int64_t key) {
    for (int64_t h = of.begin; h < of.end; ++h) {
      const int64_t k_offset = of.k_offset + h * of.k_head;
      const int64_t v_offset = of.v_offset + h * of.v_head;
      ahead.ask(kScoreKeys * key_bytes);
      for (int64_t g = 0; g < groups; ++g) {
        const bf16* query = queries + padded_row(h, g) * sizes.depth;
        simd::Vec s = simd::zero();
        if (sizes.qk) s = score_quarters(near + key, k_offset, query, sizes.depth, sizes.qk);
        if (sizes.qv) {
          s = s * simd::set1(head_settings[h].mix);
          s = s + score_quarters(near + kDecodeBlock + key, v_offset, query + sizes.qk, sizes.depth,
                                 sizes.qv);
        }
        simd::store(scores + padded_row(h, g) * kDecodeBlock + key * kGroupRows, s);
      }
    }
  }

  // Hides what rows from first_row on do not see.
  void mask(const Block& block, float* s, int64_t first_row) {
    for (int64_t i = 0; i < std::min(kGroupRows, rows - first_row); ++i) {
      const Interval& row = seen[first_row + i];
      int64_t from = std::max(block.from, row.begin - block.first);
      int64_t to = std::min(block.to, row.end - block.first);
      if (from <= 0 && to >= kDecodeBlock) continue;
      for (int64_t j = 0; j < kDecodeBlock; ++j) {
        if (j < from || j >= to) s[j / kScoreKeys * 16 + i * 4 + j % kScoreKeys] = -kInfinity;
      }
    }
  }

  // A head's scores to probabilities; its sums are scaled to its new maxima.
  void soften(const Block& block, int64_t head) {
    const ScoreScale& scale = head_settings[head].scale;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroupRows, at = padded_row(head, g) * kDecodeBlock;
      const int64_t state = head * kDecodeRows + first;
      float factors[kGroupRows];
      if (scale.transform) transform_scores(scale, scores + at, kGroupScores);
      mask(block, scores + at, first);
      if (!soften_group(scores + at, p + at, scale.to_log2(), maxima + state, row_sums + state,
                        factors)) {
        continue;
      }
      for (int64_t i = 0; i < std::min(kGroupRows, rows - first); ++i) {
        if (factors[i] == 1.0f) continue;
        scale_floats(sums + (head * rows + first + i) * sum_columns, sum_columns, factors[i]);
      }
    }
  }

  template <int kRows>
  void add_rows(const bf16* const* v, int64_t offset, const bf16* pairs, float* sum) {
    constexpr int kPanels = kRows == 1 ? 4 : 1;
    int64_t c = 0;
    for (; c + kPanels * kPanel <= sum_columns; c += kPanels * kPanel) {
      add_pairs<kRows, kPanels>(v, offset + c, pairs, sum + c, sum_columns);
      ahead.ask(kPanels * value_share);
    }
    for (; c < sum_columns; c += kPanel) {
      add_pairs<kRows, 1>(v, offset + c, pairs, sum + c, sum_columns);
      ahead.ask(value_share);
    }
  }

  // Adds the values of kValueKeys keys from `key` on to a head's sums.
  void add_values(const Heads& of, int64_t head, int64_t key) {
    const int64_t offset = of.v_offset + head * of.v_head;
    const bf16* const* v = near + kDecodeBlock + key;
    for (int64_t i = 0; i < rows;) {
      const int64_t in_group = i % kGroupRows;
      const bf16* pairs = p + padded_row(head, i / kGroupRows) * kDecodeBlock + key * kGroupRows +
                          in_group * kScoreKeys;
      float* sum = sums + (head * rows + i) * sum_columns;
      if (in_group == 0 && i + kGroupRows <= rows) {
        add_rows<kGroupRows>(v, offset, pairs, sum), i += kGroupRows;
      } else {
        add_rows<1>(v, offset, pairs, sum), ++i;
      }
    }
  }

  void attend_heads(const Block& block, const Heads& of) {
    for (int64_t key = 0; key < kDecodeBlock; key += kScoreKeys) score(of, key);
    for (int64_t key = 0; key < kDecodeBlock; key += kValueKeys) {
      for (int64_t h = of.begin; h < of.end; ++h) {
        if (key == 0) soften(block, h);
        add_values(of, h, key);
      }
    }
  }

  // Converts a head's keys and values; those that are masked become zeros.
  template <class Params>
  void convert(const Params& params, const Block& block, int64_t head_k) {
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      bf16 *k = keys + j * sizes.qk, *v = values + j * value_stride;
      const bool seen_by_some = j >= block.from && j < block.to;
      near[j] = near[2 * kDecodeBlock + j] = k, near[kDecodeBlock + j] = v;
      if (!params.only_qv) {
        convert_row<bf16>(block.k[j] + head_k * params.k.head, k, seen_by_some ? params.d : 0,
                          sizes.qk);
      }
      convert_row<bf16>(block.v[j] + head_k * params.v.head, v, seen_by_some ? params.dv : 0,
                        value_stride);
    }
  }

  // A block whose keys are not all seen is converted, too: zeros in place of what is not, as 0
  // times a value that is not finite would be NaN.
  template <class Params>
  void attend(const Params& params, const Block& block, const Block& next) {
    if constexpr (std::is_same<Element, bf16>::value) {
      if (in_place && this->is_whole(block)) {
        std::copy_n(block.k, kDecodeBlock, near);
        std::copy_n(block.v, kDecodeBlock, near + kDecodeBlock);
        std::copy_n(next.k, kDecodeBlock, near + 2 * kDecodeBlock);
        return attend_heads(block, {0, heads, head_begin * params.k.head, params.k.head,
                                    head_begin * params.v.head, params.v.head});
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      convert(params, block, head_begin + h);
      attend_heads(block, {h, h + 1, 0, 0, 0, 0});
    }
  }

  template <class Params>
  void look_at_blocks(const Params& params) {
    constexpr int64_t kSize = sizeof(Element);
    const int64_t passes = rows / kGroupRows + rows % kGroupRows, panels = sum_columns / kPanel;
    key_bytes = params.only_qv ? 0 : params.d * kSize;
    value_share = (kValueKeys * params.dv * kSize + passes * panels - 1) / (passes * panels);
    const int64_t k = params.k.head * kSize, v = params.v.head * kSize;
    ahead = {blocks,
             {{head_begin * k, head_begin * v},
              {params.d * kSize, params.dv * kSize},
              {k, v},
              heads,
              !params.only_qv}};
  }

  void fill_queries() {
    const int64_t depth = sizes.depth, padded = groups * kGroupRows;
    std::fill_n(queries, heads * padded * depth, bf16{0});
    for (int64_t h = 0; h < heads; ++h) {
      std::copy_n(q + h * rows * depth, rows * depth, queries + h * padded * depth);
    }
  }

  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& partials) {
    this->load(params, s, item);
    fill_queries();
    auto write = [&] {
      for (int64_t i = 0; i < heads * rows; ++i) {
        order_columns(sums + i * sum_columns, ordered, sum_columns);
        this->write(params, s, item, partials, i, ordered,
                    row_sums[i / rows * kDecodeRows + i % rows]);
      }
    };
    look_at_blocks(params);
    const int64_t count = steps / heads;
    for (int64_t b = 0; b < count; ++b) {
      this->locate_until(params, s, std::min(count - 1, b + kBlocks - 1));
      ahead.set_located(this->located);
      if (b == 0) ahead.ask(kBytesAhead);
      if (b + 2 < count) this->open_pages(params, blocks[(b + 2) % kBlocks], 0, kDecodeBlock);
      this->end_parts(b * heads, write);
      attend(params, blocks[b % kBlocks], blocks[std::min(count - 1, b + 1) % kBlocks]);
    }
    this->end_last_parts(write);
  }
};

}  // namespace jit_kernel

#endif  // JIT_KERNEL_BF16_DOT
