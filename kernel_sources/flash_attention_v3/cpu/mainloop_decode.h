// Few query rows against keys in place: each key and value is read from memory once for all rows.
#pragma once

#include "flash_attention_v3/cpu/decode_state.h"

namespace jit_kernel {

// Products of kRows query rows (`stride` apart) and kLanes / kRows keys of n elements, summed; lane
// i * kKeys + j is row i and key j. A key begins `offset` elements after its pointer: its head's
// place.
template <int kRows, class Key>
inline simd::Vec dot_keys(const Key* const* keys, int64_t offset, const float* q, int64_t stride,
                          int64_t n) {
  constexpr int kKeys = simd::kLanes / kRows;
  simd::Vec sum[simd::kLanes];
  const Key* k[kKeys];
#pragma GCC unroll 16
  for (int j = 0; j < simd::kLanes; ++j) sum[j] = simd::zero();
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) k[j] = keys[j] + offset;
  for (int64_t at = 0; at < n; at += simd::kLanes) {
    simd::Vec rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = simd::load(q + i * stride + at);
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

// sums (kRows rows, kVecs vectors of columns) += P (rows, keys) · values, keys in order.
template <int kRows, int kVecs, class Value>
inline void add_values(const Value* const* values, int64_t offset, int64_t count, int64_t column,
                       const float* p, int64_t p_stride, float* sums, int64_t sum_stride,
                       Prefetch& prefetch) {
  simd::Vec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      sum[i][c] = simd::load(sums + i * sum_stride + column + c * simd::kLanes);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (j % 2) prefetch.more(1);
    simd::Vec v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      v[c] = simd::load_as_float(values[j] + offset + column + c * simd::kLanes);
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
      simd::store(sums + i * sum_stride + column + c * simd::kLanes, sum[i][c]);
    }
  }
}

template <class Element>
struct Decode : DecodeState<Element, float> {
  using State = DecodeState<Element, float>;
  using Block = typename State::Block;
  using State::maxima, State::row_sums, State::head_settings, State::seen, State::kHasLoads;
  using State::sizes, State::rows, State::heads, State::in_place, State::q, State::sums;
  static constexpr int kVecs = simd::kRegisters == 32 ? 4 : 2;

  float *keys, *values;  // a converted block
  float* scores;
  const float **math_keys, **math_values;
  Prefetch ahead;

  template <class F>
  void each_array(F&& f) {
    this->each_state_array(f);
    f(scores, kDecodeRows * kDecodeBlock);
    f(math_keys, kDecodeBlock), f(math_values, kDecodeBlock);
    f(keys, in_place ? 0 : kDecodeBlock * sizes.qk);
    f(values, in_place ? 0 : kDecodeBlock * this->value_stride());
  }

  template <class Params>
  Decode(const Params& params, const Item& item, Scratch& scratch) : State(params, item) {
    take_arrays(*this, scratch);
  }

  // Scores of kRows rows from `row` on of a head, and all keys of a block.
  template <int kRows, class Key>
  void score_rows(const Key* const* k, int64_t k_offset, const Key* const* v, int64_t v_offset,
                  int64_t head, int64_t row) {
    constexpr int kKeys = simd::kLanes / kRows;
    simd::Vec mix = simd::set1(head_settings[head].mix);
    const float* query = q + (head * rows + row) * sizes.depth;
    float* to = scores + row * kDecodeBlock;
    for (int64_t j = 0; j < kDecodeBlock; j += kKeys) {
      ahead.more((kKeys + 1) / 2);
      simd::Vec s = simd::zero();
      if (sizes.qk) s = dot_keys<kRows>(k + j, k_offset, query, sizes.depth, sizes.qk) * mix;
      if (sizes.qv) {
        s = s + dot_keys<kRows>(v + j, v_offset, query + sizes.qk, sizes.depth, sizes.qv);
      }
      if constexpr (kRows == 1) {
        simd::store(to + j, s);
      } else {
        float lanes[simd::kLanes];
        simd::store(lanes, s);
        for (int i = 0; i < kRows; ++i) {
          std::memcpy(to + i * kDecodeBlock + j, lanes + i * kKeys, kKeys * sizeof(float));
        }
      }
    }
  }

  template <class Key>
  void score_block(const Key* const* k, int64_t k_offset, const Key* const* v, int64_t v_offset,
                   int64_t head) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) score_rows<4>(k, k_offset, v, v_offset, head, i);
    for (; i < rows; ++i) score_rows<1>(k, k_offset, v, v_offset, head, i);
  }

  template <int kRows, class Value>
  void add_rows(const Value* const* v, int64_t offset, const Block& block, int64_t row,
                float* sum) {
    constexpr int64_t kLanes = simd::kLanes;
    const float* p = scores + row * kDecodeBlock + block.from;
    int64_t c = 0, count = block.to - block.from;
    v += block.from, sum += row * sizes.dv;
    for (; c + kVecs * kLanes <= sizes.dv; c += kVecs * kLanes) {
      add_values<kRows, kVecs>(v, offset, count, c, p, kDecodeBlock, sum, sizes.dv, ahead);
    }
    for (; c < sizes.dv; c += kLanes) {
      add_values<kRows, 1>(v, offset, count, c, p, kDecodeBlock, sum, sizes.dv, ahead);
    }
  }

  template <class Value>
  void add_block(const Value* const* v, int64_t offset, const Block& block, float* sum) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_rows<4>(v, offset, block, i, sum);
    for (; i < rows; ++i) add_rows<1>(v, offset, block, i, sum);
  }

  // Scores to probabilities; the head's sums are scaled to its new maximum.
  void soften_block(const Block& block, int64_t head) {
    float* sum = sums + head * rows * sizes.dv;
    for (int64_t i = 0; i < rows; i += simd::kLanes) {
      int64_t count = std::min<int64_t>(simd::kLanes, rows - i), state = head * kDecodeRows + i;
      alignas(64) float factors[simd::kLanes];
      SoftenArgs<float> a{scores + i * kDecodeBlock,
                          kDecodeBlock,
                          scores + i * kDecodeBlock,
                          kDecodeBlock,
                          kDecodeBlock,
                          maxima + state,
                          row_sums + state,
                          factors};
      auto visible = [&](int64_t j) {
        return Interval{std::max(block.from, seen[i + j].begin - block.first),
                        std::min(block.to, seen[i + j].end - block.first)};
      };
      soften_rows<6>(a, head_settings[head].scale, count, visible);
      for (int64_t j = 0; j < count; ++j) {
        if (factors[j] != 1.0f) scale_floats(sum + (i + j) * sizes.dv, sizes.dv, factors[j]);
      }
    }
  }

  // Converts a head's keys and values, for types or sizes that have no loads of their own.
  template <class Params>
  void convert_block(const Params& params, const Block& block, int64_t k_offset, int64_t v_offset) {
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      float *k = keys + j * sizes.qk, *v = values + j * this->value_stride();
      math_keys[j] = k, math_values[j] = v;
      if (j < block.from || j >= block.to) continue;  // its scores are masked
      if (!params.only_qv) convert_row<float>(block.k[j] + k_offset, k, params.d, sizes.qk);
      convert_row<float>(block.v[j] + v_offset, v, params.dv, this->value_stride());
    }
  }

  template <class Params>
  void attend(const Params& params, const Block& block, int64_t step) {
    int64_t head = step % heads;
    int64_t k_offset = this->offset(params.k.head, step);
    int64_t v_offset = this->offset(params.v.head, step);
    float* sum = sums + head * rows * sizes.dv;
    if constexpr (kHasLoads) {
      if (in_place) {
        score_block(block.k, k_offset, block.v, v_offset, head);
        soften_block(block, head);
        return add_block(block.v, v_offset, block, sum);
      }
    }
    convert_block(params, block, k_offset, v_offset);
    score_block(math_keys, 0, math_values, 0, head);
    soften_block(block, head);
    add_block(math_values, 0, block, sum);
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
    for (int64_t step = 0; step < this->steps; ++step) {
      ahead = this->look_ahead(params, s, step);
      this->end_parts(step, write);
      attend(params, this->block_of(step), step);
    }
    this->end_last_parts(write);
  }
};

}  // namespace jit_kernel
