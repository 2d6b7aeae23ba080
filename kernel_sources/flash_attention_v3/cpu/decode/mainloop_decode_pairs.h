// The decode of mainloop_decode.h with its products by VDPBF16PS.
#pragma once

#include "flash_attention_v3/cpu/decode/decode_pairs.h"
#include "jit_kernel/cpu/thread_pool.h"

#ifdef JIT_KERNEL_BF16_DOT

namespace jit_kernel {

template <class Element>
struct DecodePairs : DecodeInOrder<Element, bf16> {
  using State = DecodeInOrder<Element, bf16>;
  using Block = typename State::Block;
  using Heads = typename State::Heads;
  using State::ahead, State::key_bytes, State::sum_columns;
  using State::maxima, State::row_sums, State::head_settings, State::seen;
  using State::sizes, State::rows, State::heads, State::in_place, State::q, State::sums;

  int64_t groups;       // of four rows, in each head
  int64_t value_share;  // bytes to be asked for with a panel of values
  bf16* queries;        // head after head, rows filled up to groups
  float* scores;        // of a block, head after head, group after group
  bf16* p;              // the same
  float* ordered;       // a row of sums

  template <class F>
  void each_array(F&& f) {
    this->each_array_in_order(f);
    f(queries, heads * groups * kGroupRows * sizes.depth);
    f(ordered, sum_columns);
    f(scores, heads * groups * kGroupScores);
    f(p, heads * groups * kGroupScores);
  }

  template <class Params>
  DecodePairs(const Params& params, const Item& item, Scratch& scratch)
      : State(params, item, kPanel), groups((this->rows + kGroupRows - 1) / kGroupRows) {
    in_place = in_place && std::is_same<KeyOf<Element>, bf16>::value;
    scratch.take_all([&](auto&& f) { each_array(f); });
    const int64_t passes = rows / kGroupRows + rows % kGroupRows, panels = sum_columns / kPanel;
    const int64_t bytes = kValueKeys * params.dv * int64_t{sizeof(KeyOf<Element>)};
    value_share = (bytes + passes * panels - 1) / (passes * panels);
  }

  // The first row of a head's group.
  int64_t padded_row(int64_t head, int64_t group) const {
    return (head * groups + group) * kGroupRows;
  }

  // Scores of kScoreKeys keys from `key` on of all heads.
  void score(const Heads& of, int64_t key) {
    const bf16* const* k = this->template keys_from<bf16>(key);
    const bf16* const* v = this->template values_from<bf16>(key);
    for (int64_t h = of.begin; h < of.end; ++h) {
      ahead.ask(kScoreKeys * key_bytes);
      for (int64_t g = 0; g < groups; ++g) {
        const bf16* query = queries + padded_row(h, g) * sizes.depth;
        simd::Vec s = simd::zero();
        if (sizes.qk) s = score_quarters(k, of.k(h), query, sizes.depth, sizes.qk);
        if (sizes.qv) {
          s = s * simd::set1(head_settings[h].mix);
          s = s + score_quarters(v, of.v(h), query + sizes.qk, sizes.depth, sizes.qv);
        }
        simd::store(scores + padded_row(h, g) * kDecodeBlock + key * kGroupRows, s);
      }
    }
  }

  // The scores of keys that a row from first_row on does not see become -inf.
  void mask(const Block& block, float* s, int64_t first_row) {
    for (int64_t i = 0; i < std::min(kGroupRows, rows - first_row); ++i) {
      const uint32_t keys = this->seen_of(block, first_row + i);
      if (keys == ~uint32_t{0}) continue;
      for (int64_t j = 0; j < kDecodeBlock; ++j) {
        if (!(keys >> j & 1)) s[j / kScoreKeys * 16 + i * 4 + j % kScoreKeys] = -kInfinity;
      }
    }
  }

  // A head's scores to probabilities; its sums are scaled to its new maxima.
  void softmax(const Block& block, int64_t head) {
    const ScoreScale& scale = head_settings[head].scale;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroupRows, at = padded_row(head, g) * kDecodeBlock;
      const int64_t state = head * kDecodeRows + first;
      float factors[kGroupRows];
      if (scale.transform) transform_scores(scale, scores + at, kGroupScores);
      mask(block, scores + at, first);
      if (!softmax_group(scores + at, p + at, scale.to_log2(), maxima + state, row_sums + state,
                         factors)) {
        continue;
      }
      for (int64_t i = 0; i < std::min(kGroupRows, rows - first); ++i) {
        if (factors[i] == 1.0f) continue;
        simd::scale_floats(sums + (head * rows + first + i) * sum_columns, sum_columns, factors[i]);
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

  // Adds the values of kValueKeys keys from `key` on to a head's sums of the rows from `begin` to
  // `end`.
  void add_values(const Heads& of, int64_t head, int64_t key, int64_t begin, int64_t end) {
    const bf16* const* v = this->template values_from<bf16>(key);
    for (int64_t i = begin; i < end;) {
      const int64_t in_group = i % kGroupRows;
      const bf16* pairs = p + padded_row(head, i / kGroupRows) * kDecodeBlock + key * kGroupRows +
                          in_group * kScoreKeys;
      float* sum = sums + (head * rows + i) * sum_columns;
      if (in_group == 0 && i + kGroupRows <= end) {
        add_rows<kGroupRows>(v, of.v(head), pairs, sum);
        i += kGroupRows;
      } else {
        add_rows<1>(v, of.v(head), pairs, sum);
        ++i;
      }
    }
  }

  template <class Key>
  void attend_heads(const Block& block, const Heads& of) {
    if constexpr (std::is_same<Key, bf16>::value) {
      for (int64_t key = 0; key < kDecodeBlock; key += kScoreKeys) score(of, key);
      this->add_block(
          block, of, [&](int64_t head) { softmax(block, head); },
          [&](int64_t head, int64_t key, int64_t begin, int64_t end) {
            add_values(of, head, key, begin, end);
          });
    }
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
    this->run_blocks(*this, params, s, write);
  }
};

}  // namespace jit_kernel

#endif  // JIT_KERNEL_BF16_DOT
