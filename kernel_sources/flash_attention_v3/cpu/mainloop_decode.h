// Few query rows against keys in place: each key and value is read from memory once for all rows.
#pragma once

#include "flash_attention_v3/cpu/epilogue.h"
#include "flash_attention_v3/cpu/gemm.h"
#include "flash_attention_v3/cpu/mask.h"
#include "flash_attention_v3/cpu/query.h"
#include "flash_attention_v3/cpu/scheduler.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// The sums of products of one query row and kLanes keys of n elements (n a multiple of kDepth for
// bf16 pairs, of kLanes for floats).
template <class Key>
inline simd::Vec dot_keys(const Key* const* keys, const float* q, int64_t n) {
  simd::Vec sum[simd::kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < simd::kLanes; ++j) sum[j] = simd::zero();
  for (int64_t k = 0; k < n; k += simd::kLanes) {
    simd::Vec one = simd::load(q + k);
#pragma GCC unroll 16
    for (int j = 0; j < simd::kLanes; ++j) {
      sum[j] = simd::fma(one, simd::load_as_float(keys[j] + k), sum[j]);
    }
  }
  return simd::reduce_each(sum);
}
#ifdef JIT_KERNEL_BF16_DOT
inline simd::Vec dot_keys(const bf16* const* keys, const bf16* q, int64_t n) {
  simd::Vec sum[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) sum[j] = simd::zero();
  for (int64_t k = 0; k < n; k += 32) {
    __m512bh one = simd::load_pairs(q + k);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      sum[j] = simd::dot_pairs(sum[j], one, simd::load_pairs(keys[j] + k));
    }
  }
  return simd::reduce_each(sum);
}
#endif

// sums (kRows rows, kVecs vectors of columns) += P (rows, keys) · values, keys in order.
template <int kRows, int kVecs, class Value>
inline void add_values(const Value* const* values, int64_t count, int64_t column, const float* p,
                       int64_t p_stride, float* sums, int64_t sum_stride) {
  simd::Vec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      sum[i][c] = simd::load(sums + i * sum_stride + column + c * simd::kLanes);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    simd::Vec v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      v[c] = simd::load_as_float(values[j] + column + c * simd::kLanes);
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
struct Decode {
  using Math = MathOf<Element>;
  static constexpr int kVecs = simd::kRegisters == 32 ? 4 : 2;

  HeadSizes sizes;
  Math *q, *keys, *values;  // keys and values only when they cannot be used where they are
  float *scores, *sums, *spare_row;
  Element* turned;
  const Element **key_rows_, **value_rows;
  const Math **math_keys, **math_values;
  RowState* states;
  Interval seen[kDecodeRows];
  float mix;  // what q·k is multiplied by before qv·v is added

  template <class F>
  void each_array(bool in_place, F&& f) {
    f(q, kDecodeRows * sizes.depth), f(sums, kDecodeRows * sizes.dv), f(states, kDecodeRows);
    f(scores, kDecodeRows * kDecodeBlock), f(spare_row, sizes.depth), f(turned, sizes.depth);
    f(key_rows_, kDecodeBlock), f(value_rows, kDecodeBlock);
    f(math_keys, kDecodeBlock), f(math_values, kDecodeBlock);
    f(keys, in_place ? 0 : kDecodeBlock * sizes.qk);
    f(values, in_place ? 0 : kDecodeBlock * std::max(sizes.dv, sizes.qv));
  }

  // e4m3 has no loads that are cheap enough to repeat for every row.
  static constexpr bool kHasLoads = !std::is_same<Element, e4m3>::value;

  // Whether whole vectors of keys and values can be read where they are.
  template <class Params>
  bool in_place(const Params& params) const {
    bool exact = (params.only_qv || params.d == sizes.qk) && params.dv == sizes.dv;
    return kHasLoads && exact && (!params.qv || params.dv == sizes.qv);
  }

  template <class Params>
  Decode(const Params& params, Scratch& scratch) : sizes(head_sizes<Math>(params)) {
    size_t bytes = 0;
    each_array(in_place(params), [&](auto*& a, int64_t n) {
      bytes += Scratch::size<std::remove_reference_t<decltype(*a)>>(n);
    });
    scratch.reserve(bytes);
    each_array(in_place(params), [&](auto*& a, int64_t n) {
      a = scratch.take<std::remove_reference_t<decltype(*a)>>(n);
    });
  }

  // Scores of all rows and the keys of a block, whose row pointers are a multiple of kLanes.
  template <class Key>
  void score_block(const Key* const* k, const Key* const* v, int64_t rows, int64_t count) {
    for (int64_t j = 0; j < count; j += simd::kLanes) {
      for (int64_t i = 0; i < rows; ++i) {
        const Math* row = q + i * sizes.depth;
        simd::Vec s = simd::zero();
        if (sizes.qk) s = dot_keys(k + j, row, sizes.qk) * simd::set1(mix);
        if (sizes.qv) s = s + dot_keys(v + j, row + sizes.qk, sizes.qv);
        simd::store(scores + i * kDecodeBlock + j, s);
      }
    }
  }

  template <int kRows, class Value>
  void add_rows(const Value* const* v, int64_t first, int64_t count, int64_t row) {
    constexpr int64_t kLanes = simd::kLanes;
    const float* p = scores + row * kDecodeBlock + first;
    float* sum = sums + row * sizes.dv;
    int64_t c = 0;
    for (; c + kVecs * kLanes <= sizes.dv; c += kVecs * kLanes) {
      add_values<kRows, kVecs>(v + first, count, c, p, kDecodeBlock, sum, sizes.dv);
    }
    for (; c < sizes.dv; c += kLanes) {
      add_values<kRows, 1>(v + first, count, c, p, kDecodeBlock, sum, sizes.dv);
    }
  }

  template <class Value>
  void add_block(const Value* const* v, int64_t rows, int64_t first, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_rows<4>(v, first, count, i);
    for (; i < rows; ++i) add_rows<1>(v, first, count, i);
  }

  // Scores to probabilities; block key 0 is key `first`.
  void soften_block(const ScoreScale& scale, int64_t rows, int64_t first, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * kDecodeBlock;
      if (scale.transform) transform_scores(scale, s, columns);
      int64_t begin = std::min(columns, std::max<int64_t>(0, seen[i].begin - first));
      int64_t end = std::max(begin, std::min(columns, seen[i].end - first));
      mask_scores(s, begin, end, columns);
      float factor = softmax_row<6>(s, s, columns, scale.to_log2(), states[i]);
      if (factor == 1.0f) continue;
      for (int64_t j = 0; j < sizes.dv; ++j) sums[i * sizes.dv + j] *= factor;
    }
  }

  // Converts a block's keys and values, for types or sizes that have no loads of their own.
  template <class Params>
  void convert_block(const Params& params, int64_t from, int64_t to, int64_t columns) {
    int64_t stride = std::max(sizes.dv, sizes.qv);
    for (int64_t j = 0; j < columns; ++j) {
      math_keys[j] = keys + j * sizes.qk;
      math_values[j] = values + j * stride;
      if (j < from || j >= to) continue;  // fills up a vector: its scores are masked
      if (!params.only_qv) convert_row<Math>(key_rows_[j], keys + j * sizes.qk, params.d, sizes.qk);
      convert_row<Math>(value_rows[j], values + j * stride, params.dv, stride);
    }
  }

  // Keys first + from .. first + to - 1 of the block that begins at key `first`.
  template <class Params>
  void block(const Params& params, const Sequence& s, const Item& item, const ScoreScale& scale,
             int64_t first, int64_t from, int64_t to) {
    int64_t rows = item.row_end - item.row_begin;
    int64_t begin = from / kDepth * kDepth, columns = round_up(to, kDepth) - begin;
    first += begin, from -= begin, to -= begin;
    if (!params.only_qv)
      key_rows(params, params.k, s, first + from, to - from, item.head_k, key_rows_ + from);
    key_rows(params, params.v, s, first + from, to - from, item.head_k, value_rows + from);
    for (int64_t j = 0; j < columns; ++j) {  // masked keys point at one that may be read
      if (j >= from && j < to) continue;
      key_rows_[j] = key_rows_[from];
      value_rows[j] = value_rows[from];
    }
    if constexpr (kHasLoads) {
      if (in_place(params)) {
        return attend(key_rows_, value_rows, scale, rows, first, from, to, columns);
      }
    }
    convert_block(params, from, to, columns);
    attend(math_keys, math_values, scale, rows, first, from, to, columns);
  }

  template <class Key>
  void attend(const Key* const* k, const Key* const* v, const ScoreScale& scale, int64_t rows,
              int64_t first, int64_t from, int64_t to, int64_t columns) {
    score_block(k, v, rows, columns);
    soften_block(scale, rows, first, columns);
    add_block(v, rows, from, to - from);
  }

  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& parts) {
    int64_t rows = item.row_end - item.row_begin, begin = item.key_end, end = item.key_begin;
    std::memset(sums, 0, static_cast<size_t>(rows * sizes.dv) * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      int64_t r = item.row_begin + i;
      load_query(params, s, sizes, item.head_k, r, q + i * sizes.depth, spare_row, turned);
      seen[i] = visible_keys(params, r / params.group, s.sq, s.sk);
      begin = std::min(begin, std::max(seen[i].begin, item.key_begin));
      end = std::max(end, std::min(seen[i].end, item.key_end));
      states[i] = RowState();
    }
    ScoreScale scale = score_scale_of(params, item.batch, item.head_k);
    mix = qk_factor(params, item.batch, item.head_k);
    int64_t first = item.key_begin + (begin - item.key_begin) / kDecodeBlock * kDecodeBlock;
    for (; first < end; first += kDecodeBlock) {
      int64_t from = std::max<int64_t>(0, begin - first);
      block(params, s, item, scale, first, from, std::min(kDecodeBlock, end - first));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* sum = sums + i * sizes.dv;
      if (item.part < 0) {
        write_row(params, s, item.batch, item.head_k, item.row_begin + i, scale, sum, states[i]);
      } else {
        std::memcpy(parts.sums + (item.part + i) * sizes.dv, sum,
                    static_cast<size_t>(sizes.dv) * sizeof(float));
        parts.states[item.part + i] = states[i];
      }
    }
  }
};

}  // namespace jit_kernel
