// What a thread holds of a block of keys and of a block of queries, as floats, and the five
// products of the two.
#pragma once

#include <algorithm>
#include <type_traits>

#include "flash_attention_v3/cpu/backward/backward_params.h"
#include "flash_attention_v3/cpu/backward/product.h"
#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/softmax.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// Rows to panels of kLanes rows: for each of `depth` columns, the numbers of kLanes rows side by
// side. `count` is a multiple of kLanes.
inline void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t depth,
                         float* out) {
  for (int64_t first = 0; first < count; first += simd::kLanes, out += depth * simd::kLanes) {
    const float* from = rows + first * stride;
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t j = 0; j < simd::kLanes; ++j) out[i * simd::kLanes + j] = from[j * stride + i];
    }
  }
}

// Scores s and products t of a row, n of them (a multiple of kLanes), to P and dS:
// P = exp(s' - shift), dS = P (t - delta), times 1 - tanh^2 with a softcap.
inline void make_row(const ScoreScale& scale, float* s, float* t, int64_t n, float shift,
                     float delta) {
  const simd::Vec log2e = simd::set1(kLog2e), one = simd::set1(1.0f);
  const simd::Vec minus_shift = simd::set1(-shift), minus_delta = simd::set1(-delta);
  if (scale.softcap > 0.0f) {
    const simd::Vec inner = simd::set1(scale.inner), cap = simd::set1(scale.softcap);
    for (int64_t i = 0; i < n; i += simd::kLanes) {
      const simd::Vec x = simd::tanh(simd::load(s + i) * inner);
      const simd::Vec p = simd::exp2<6>(simd::fma(x, cap, minus_shift) * log2e);
      const simd::Vec slope = one - x * x;
      simd::store(s + i, p);
      simd::store(t + i, p * (simd::load(t + i) + minus_delta) * slope);
    }
    return;
  }
  const simd::Vec natural = simd::set1(scale.natural);
  for (int64_t i = 0; i < n; i += simd::kLanes) {
    const simd::Vec p = simd::exp2<6>(simd::fma(simd::load(s + i), natural, minus_shift) * log2e);
    simd::store(s + i, p);
    simd::store(t + i, p * (simd::load(t + i) + minus_delta));
  }
}

template <class Element>
struct BlockState {
  using Params = BackwardParams<Element>;

  const Params& p;
  const BackwardSizes sizes;
  const ScoreScale scale;
  // Keys as rows and as columns, values as columns; sums of their gradients; queries and gradients
  // of the result as rows; P over the scores, dS over the gradients of P.
  float *keys, *key_columns, *value_columns, *sums_k, *sums_v;
  float *queries, *grads, *probabilities, *grad_scores;
  Interval seen[96];  // of each row of the block of queries, counted from the block's first key

  BlockState(const Params& params, const BackwardSizes& of, Scratch& scratch)
      : p(params), sizes(of), scale(score_scale(params.softmax_scale, params.softcap)) {
    scratch.take_all([&](auto&& f) {
      f(keys, sizes.keys * std::max(sizes.row_q(), sizes.row_v()));
      f(key_columns, sizes.keys * sizes.d);
      f(value_columns, sizes.keys * sizes.dv);
      f(sums_k, sizes.keys * sizes.row_q());
      f(sums_v, sizes.keys * sizes.row_v());
      f(queries, sizes.rows * sizes.row_q());
      f(grads, sizes.rows * sizes.row_v());
      f(probabilities, sizes.rows * sizes.row_scores());
      f(grad_scores, sizes.rows * sizes.row_scores());
    });
  }

  // The keys of a block and their values, zeros where no query of the sequence sees one: their
  // memory may hold anything.
  void load_keys(const BackwardPlan::OfSequence& of, int64_t head_k, int64_t first) {
    const Sequence& s = of.sequence;
    const auto load = [&](const Rows<Element>& rows, int64_t n, int64_t padded, int64_t stride) {
      for (int64_t j = 0; j < sizes.keys; ++j) {
        const int64_t key = first + j;
        const bool is_seen = key >= of.seen.begin && key < of.seen.end;
        const Element* from = is_seen ? key_row(p, rows, s, key, head_k) : nullptr;
        convert_row<float>(from, keys + j * stride, is_seen ? n : 0, padded);
      }
    };
    load(p.v, p.dv, sizes.dv, sizes.row_v());  // through the memory of the keys
    pack_columns(keys, sizes.row_v(), sizes.keys, sizes.dv, value_columns);
    load(p.k, p.d, sizes.d, sizes.row_q());
    pack_columns(keys, sizes.row_q(), sizes.keys, sizes.d, key_columns);
    std::fill_n(sums_k, sizes.keys * sizes.row_q(), 0.0f);
    std::fill_n(sums_v, sizes.keys * sizes.row_v(), 0.0f);
  }

  void store_keys(const BackwardPlan::OfSequence& of, int64_t head_k, int64_t first) {
    const Sequence& s = of.sequence;
    for (int64_t j = 0; j < std::min(sizes.keys, s.sk - first); ++j) {
      Element* grad_k = p.grad_k.at(s.k_batch, s.k_begin + first + j, head_k);
      Element* grad_v = p.grad_v.at(s.k_batch, s.k_begin + first + j, head_k);
      simd::convert_from_float(sums_k + j * sizes.row_q(), grad_k, p.d, p.softmax_scale);
      simd::convert_from_float(sums_v + j * sizes.row_v(), grad_v, p.dv, 1.0f);
    }
  }

  // The queries of a block and the gradients of their results, zeros where a row sees none of the
  // keys: its memory may hold anything. Returns the columns that some row sees.
  Interval load_queries(const Sequence& s, int64_t head, int64_t row, int64_t count,
                        int64_t first) {
    Interval columns{sizes.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
      const Interval visible = visible_keys(p, row + i, s.sq, s.sk);
      Interval& mine = seen[i];
      mine.begin = std::max<int64_t>(0, visible.begin - first);
      mine.end = std::min(sizes.keys, visible.end - first);
      const bool sees = mine.begin < mine.end;
      if (sees) {
        columns.begin = std::min(columns.begin, mine.begin);
        columns.end = std::max(columns.end, mine.end);
      }
      const Element* q = p.q.at(s.q_batch, s.q_begin + row + i, head);
      const Element* g = p.grad_out.at(s.q_batch, s.q_begin + row + i, head);
      convert_row<float>(q, queries + i * sizes.row_q(), sees ? p.d : 0, sizes.d);
      convert_row<float>(g, grads + i * sizes.row_v(), sees ? p.dv : 0, sizes.dv);
    }
    columns.begin = columns.begin / simd::kLanes * simd::kLanes;
    columns.end = round_up(columns.end, simd::kLanes);
    return columns;
  }

  // P and dS of the queries over the columns, 0 where a row does not see one: by selection, as what
  // is not seen may be no number.
  void make_scores(int64_t place, int64_t count, const Interval& columns) {
    const int64_t n = columns.end - columns.begin, stride = sizes.row_scores();
    const auto score = [&](const float* rows, int64_t lda, const float* of_keys, float* to) {
      Product g;
      g.a = rows;
      g.lda = lda;
      g.depth = lda - BackwardSizes::kGap;
      g.b = of_keys + columns.begin * g.depth;
      g.step = simd::kLanes;
      g.panel = g.depth * simd::kLanes;
      g.c = to;
      g.ldc = stride;
      g.accumulate = false;
      multiply<false>(g, count, n / simd::kLanes);
    };
    score(queries, sizes.row_q(), key_columns, probabilities);
    score(grads, sizes.row_v(), value_columns, grad_scores);
    for (int64_t i = 0; i < count; ++i) {
      float *s = probabilities + i * stride, *t = grad_scores + i * stride;
      make_row(scale, s, t, n, p.shifts[place + i], p.deltas[place + i]);
      const int64_t begin = std::min(n, std::max<int64_t>(0, seen[i].begin - columns.begin));
      const int64_t end = std::max(begin, std::min(n, seen[i].end - columns.begin));
      for (float* x : {s, t}) {
        std::fill(x, x + begin, 0.0f);
        std::fill(x + end, x + n, 0.0f);
      }
    }
  }

  // sums (columns, n) += transposed scores times rows.
  void add_to_keys(const float* scores, int64_t count, const Interval& columns, const float* rows,
                   int64_t stride, float* sums) {
    Product g;
    g.a = scores;
    g.lda = sizes.row_scores();
    g.b = rows;
    g.step = stride;
    g.panel = simd::kLanes;
    g.c = sums + columns.begin * stride;
    g.ldc = stride;
    g.depth = count;
    multiply<true>(g, columns.end - columns.begin, (stride - BackwardSizes::kGap) / simd::kLanes);
  }

  void add_to_keys(int64_t count, const Interval& columns) {
    add_to_keys(probabilities, count, columns, grads, sizes.row_v(), sums_v);
    add_to_keys(grad_scores, count, columns, queries, sizes.row_q(), sums_k);
  }

  // The sums of the queries' gradients += dS times keys, or = of the first block of keys.
  void add_to_queries(int64_t place, int64_t count, const Interval& columns, bool is_first) {
    Product g;
    g.a = grad_scores;
    g.lda = sizes.row_scores();
    g.b = keys + columns.begin * sizes.row_q();
    g.step = sizes.row_q();
    g.panel = simd::kLanes;
    g.c = p.sums + place * p.row_of_sums;
    g.ldc = p.row_of_sums;
    g.depth = columns.end - columns.begin;
    g.accumulate = !is_first;
    multiply<false>(g, count, sizes.d / simd::kLanes);
  }

  void store_queries(const Sequence& s, int64_t head, int64_t row, int64_t count) {
    const int64_t place = p.row_of(s, row, head);
    for (int64_t i = 0; i < count; ++i) {
      Element* to = p.grad_q.at(s.q_batch, s.q_begin + row + i, head);
      simd::convert_from_float(p.sums + (place + i) * p.row_of_sums, to, p.d, p.softmax_scale);
    }
  }
};

}  // namespace jit_kernel
