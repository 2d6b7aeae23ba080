// Few query rows against keys in place, in floats: each key and value is read from memory once for
// all rows.
#pragma once

#include "flash_attention_v3/cpu/decode/decode_in_order.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// Products of kRows query rows (`stride` apart) and kLanes / kRows keys of n elements, summed; lane
// i * kKeys + j is row i and key j. A key begins `offset` elements after its pointer: its head's
// place. Asks again for the keys that come kRowsAgain rows later: in a loop of its own that takes a
// tenth of an fp16 decode.
template <int kRows, class Key>
inline simd::Vec dot_keys(const Key* const* keys, int64_t offset, const float* q, int64_t stride,
                          int64_t n) {
  constexpr int kKeys = simd::kLanes / kRows;
  constexpr int64_t kLine = kCacheLine / sizeof(Key);
  simd::Vec sum[simd::kLanes];
  const Key *k[kKeys], *later[kKeys];
#pragma GCC unroll 16
  for (int j = 0; j < simd::kLanes; ++j) sum[j] = simd::zero();
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) {
    k[j] = keys[j] + offset;
    later[j] = keys[j + kRowsAgain] + offset;
  }
  for (int64_t at = 0; at < n; at += simd::kLanes) {
    simd::Vec rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = simd::load(q + i * stride + at);
    if (at % kLine == 0) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) __builtin_prefetch(later[j] + at, 0, 2);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      simd::Vec key = simd::load_as_float(k[j] + at);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sum[i * kKeys + j] = simd::fma(rows[i], key, sum[i * kKeys + j]);
      }
    }
  }
  return simd::reduce_each(sum);
}

// sums (kRows rows, kVecs vectors of columns) += P (rows, keys) · values of kValueKeys keys, in
// order. Asks again for the values that come kRowsAgain rows later.
template <int kRows, int kVecs, class Value>
inline void add_values(const Value* const* values, int64_t offset, const float* p, int64_t p_stride,
                       float* sums, int64_t sum_stride) {
  constexpr int kLine = kCacheLine / sizeof(Value);
  simd::Vec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      sum[i][c] = simd::load(sums + i * sum_stride + c * simd::kLanes);
    }
  }
  for (int64_t j = 0; j < kValueKeys; ++j) {
    simd::Vec v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const int64_t at = offset + c * simd::kLanes;
      v[c] = simd::load_as_float(values[j] + at);
      if (c * simd::kLanes % kLine == 0) __builtin_prefetch(values[j + kRowsAgain] + at, 0, 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      simd::Vec one = simd::set1(p[i * p_stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[i][c] = simd::fma(one, v[c], sum[i][c]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      simd::store(sums + i * sum_stride + c * simd::kLanes, sum[i][c]);
    }
  }
}

template <class Element>
struct Decode : DecodeInOrder<Element, float> {
  using State = DecodeInOrder<Element, float>;
  using Block = typename State::Block;
  using Heads = typename State::Heads;
  using State::ahead, State::key_bytes, State::value_bytes, State::kHasLoads;
  using State::maxima, State::row_sums, State::head_settings, State::seen;
  using State::sizes, State::rows, State::heads, State::q, State::sums;
  static constexpr int kVecs = simd::kRegisters == 32 ? 4 : 2;
  static constexpr int64_t kLanes = simd::kLanes;

  float* scores;  // of a block, head after head, row after row

  template <class F>
  void each_array(F&& f) {
    this->each_array_in_order(f);
    f(scores, heads * rows * kDecodeBlock);
  }

  template <class Params>
  Decode(const Params& params, const Item& item, Scratch& scratch) : State(params, item, kLanes) {
    scratch.take_all([&](auto&& f) { each_array(f); });
  }

  // Scores of kRows rows from `row` on of a head, and `count` keys.
  template <int kRows, class Key>
  void score_rows(const Heads& of, int64_t head, int64_t row, int64_t first, int64_t count) {
    constexpr int64_t kKeys = kLanes / kRows;
    simd::Vec mix = simd::set1(head_settings[head].mix);
    const float* query = q + (head * rows + row) * sizes.depth;
    float* to = scores + (head * rows + row) * kDecodeBlock;
    for (int64_t j = first; j < first + count; j += kKeys) {
      const Key* const* k = this->template keys_from<Key>(j);
      const Key* const* v = this->template values_from<Key>(j);
      simd::Vec s = simd::zero();
      if (sizes.qk) s = dot_keys<kRows>(k, of.k(head), query, sizes.depth, sizes.qk) * mix;
      if (sizes.qv) {
        s = s + dot_keys<kRows>(v, of.v(head), query + sizes.qk, sizes.depth, sizes.qv);
      }
      if constexpr (kRows == 1) {
        simd::store(to + j, s);
      } else {
        float lanes[kLanes];
        simd::store(lanes, s);
        for (int64_t i = 0; i < kRows; ++i) {
          std::memcpy(to + i * kDecodeBlock + j, lanes + i * kKeys, kKeys * sizeof(float));
        }
      }
    }
  }

  template <class Key>
  void score(const Heads& of, int64_t key, int64_t count) {
    for (int64_t h = of.begin; h < of.end; ++h) {
      ahead.ask(count * key_bytes);
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4) score_rows<4, Key>(of, h, i, key, count);
      for (; i < rows; ++i) score_rows<1, Key>(of, h, i, key, count);
    }
  }

  template <int kRows, class Value>
  void add_rows(const Value* const* v, int64_t offset, const float* p, float* sum) {
    int64_t c = 0;
    for (; c + kVecs * kLanes <= sizes.dv; c += kVecs * kLanes) {
      add_values<kRows, kVecs>(v, offset + c, p, kDecodeBlock, sum + c, sizes.dv);
    }
    for (; c < sizes.dv; c += kLanes) {
      add_values<kRows, 1>(v, offset + c, p, kDecodeBlock, sum + c, sizes.dv);
    }
  }

  // Adds the values of kValueKeys keys to a head's sums of the rows from `begin` to `end`.
  template <class Value>
  void add_keys(const Heads& of, int64_t head, int64_t key, int64_t begin, int64_t end) {
    const Value* const* v = this->template values_from<Value>(key);
    const float* p = scores + head * rows * kDecodeBlock + key;
    float* sum = sums + head * rows * sizes.dv;
    ahead.ask(kValueKeys * value_bytes);
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      add_rows<4>(v, of.v(head), p + i * kDecodeBlock, sum + i * sizes.dv);
    }
    for (; i < end; ++i) add_rows<1>(v, of.v(head), p + i * kDecodeBlock, sum + i * sizes.dv);
  }

  // Scores to probabilities; the head's sums are scaled to its new maximum.
  void softmax(const Block& block, int64_t head) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int64_t count = std::min(kLanes, rows - i), state = head * kDecodeRows + i;
      float *s = scores + (head * rows + i) * kDecodeBlock,
            *sum = sums + (head * rows + i) * sizes.dv;
      alignas(64) float factors[simd::kLanes];
      SoftmaxArgs<float> a{
          s,      kDecodeBlock, s, kDecodeBlock, kDecodeBlock, maxima + state, row_sums + state,
          factors};
      auto mask = [&](int64_t j, float* row) { this->mask_row(block, i + j, row, 1); };
      softmax_rows<kExpDegree<float>>(a, head_settings[head].scale, count, mask);
      for (int64_t j = 0; j < count; ++j) {
        if (factors[j] != 1.0f) simd::scale_floats(sum + j * sizes.dv, sizes.dv, factors[j]);
      }
    }
  }

  template <class Key>
  void attend_heads(const Block& block, const Heads& of) {
    if constexpr (kHasLoads || std::is_same<Key, float>::value) {
      // Four rows share a vector of scores, one row has it for itself.
      const int64_t together = rows % 4 == 0 ? kLanes / 4 : kLanes;
      for (int64_t key = 0; key < kDecodeBlock; key += together) score<Key>(of, key, together);
      this->add_block(
          block, of, [&](int64_t head) { softmax(block, head); },
          [&](int64_t head, int64_t key, int64_t begin, int64_t end) {
            add_keys<Key>(of, head, key, begin, end);
          });
    }
  }

  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& partials) {
    this->load(params, s, item);
    auto write = [&] {
      for (int64_t i = 0; i < heads * rows; ++i) {
        this->write(params, s, item, partials, i, sums + i * sizes.dv,
                    row_sums[i / rows * kDecodeRows + i % rows]);
      }
    };
    this->run_blocks(*this, params, s, write);
  }
};

}  // namespace jit_kernel
