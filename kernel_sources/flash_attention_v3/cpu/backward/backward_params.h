// What one backward pass asks for, and how it is cut into blocks of queries and of keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "flash_attention_v3/cpu/common/head_sizes.h"
#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/params.h"

namespace jit_kernel {

// The forward call's parameters, its results as inputs, and the gradients.
template <class Element>
struct BackwardParams : ForwardParams<Element> {
  Rows<const Element> grad_out, result;
  Rows<const float> grad_lse, lse_of_rows;  // grad_lse may be null
  Rows<Element> grad_q, grad_k, grad_v;
  float* grad_sinks = nullptr;  // (heads,), null without sinks
  // Memory for each query row, by head: sums of its gradient, its delta, its lse.
  float *sums = nullptr, *deltas = nullptr, *shifts = nullptr;
  int64_t row_of_sums = 0;  // from a row's sums to the next one's
  int64_t all_rows = 0;     // of q, of all sequences

  // The place of a sequence's row among all rows of a head.
  int64_t row_of(const Sequence& s, int64_t token, int64_t head) const {
    return head * all_rows + s.q_batch * this->rows_q + s.q_begin + token;
  }
};

// Head sizes as rows of floats have them: whole vectors. A row of a block is kGap longer: rows of a
// power of two bytes would share a few sets of L1 where a product goes down a column.
struct BackwardSizes {
  static constexpr int64_t kGap = 16;
  int64_t d, dv;  // padded to whole vectors
  int64_t rows, keys;

  int64_t row_q() const { return d + kGap; }
  int64_t row_v() const { return dv + kGap; }
  int64_t row_scores() const { return keys + kGap; }
};

// Keys times head sizes: what a thread holds of them, three times as floats and two sums, should
// leave half of a small L2 (512 KiB) to the queries and the scores. Multiples of 48 fill tiles of 6
// rows and of 16 or 48 columns.
inline BackwardSizes backward_sizes(int64_t d, int64_t dv) {
  BackwardSizes b;
  b.d = round_up(d, simd::kLanes);
  b.dv = round_up(dv, simd::kLanes);
  const int64_t both = b.d + b.dv;
  b.keys = both <= 144 ? 192 : both <= 288 ? 96 : 48;
  b.rows = both <= 512 ? 96 : 48;
  return b;
}

// Which blocks of keys a block of queries sees, first .. end - 1.
struct SeenBlocks {
  int64_t first, end;
};

struct BackwardPlan {
  struct OfSequence {
    Sequence sequence;
    Interval seen;  // the keys that some query sees
    int64_t blocks_q, blocks_k;
    int64_t place;  // of its first block of queries in `seen`, and of its counters
  };
  struct Task {
    int64_t sequence, head_k, block;
  };

  std::vector<OfSequence> sequences;
  std::vector<SeenBlocks> seen;
  std::vector<Task> tasks;
  double cost = 0.0;
};

template <class Params>
inline void plan_sequence(const Params& p, const BackwardSizes& sizes, int64_t b,
                          BackwardPlan& plan) {
  BackwardPlan::OfSequence of;
  const Sequence s = of.sequence = sequence_of(p, b);
  of.place = static_cast<int64_t>(plan.seen.size());
  of.blocks_q = (s.sq + sizes.rows - 1) / sizes.rows;
  of.blocks_k = (s.sk + sizes.keys - 1) / sizes.keys;
  of.seen = {s.sk, 0};
  for (int64_t i = 0; i < of.blocks_q; ++i) {
    const int64_t last = std::min(s.sq, (i + 1) * sizes.rows) - 1;
    const int64_t begin = visible_keys(p, i * sizes.rows, s.sq, s.sk).begin;
    const int64_t end = visible_keys(p, last, s.sq, s.sk).end;
    SeenBlocks blocks{0, 0};
    if (begin < end) {
      blocks = {begin / sizes.keys, (end + sizes.keys - 1) / sizes.keys};
      of.seen.begin = std::min(of.seen.begin, begin);
      of.seen.end = std::max(of.seen.end, end);
    }
    plan.seen.push_back(blocks);
    plan.cost += static_cast<double>((blocks.end - blocks.first) * sizes.rows * sizes.keys) *
                 static_cast<double>((3 * sizes.d + 2 * sizes.dv) * p.heads);
  }
  plan.sequences.push_back(of);
}

// A task is a block of keys of one head of keys. First come those of the first keys, which under a
// causal mask the most queries see; and a task's sums wait for those of earlier blocks alone.
template <class Params>
inline BackwardPlan make_backward_plan(const Params& p, const BackwardSizes& sizes) {
  BackwardPlan plan;
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    plan_sequence(p, sizes, b, plan);
    most = std::max(most, plan.sequences.back().blocks_k);
  }
  for (int64_t block = 0; block < most; ++block) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const BackwardPlan::OfSequence& of = plan.sequences[b];
      const int64_t begin = block * sizes.keys;
      if (begin >= of.seen.end || begin + sizes.keys <= of.seen.begin) continue;
      for (int64_t h = 0; h < p.heads_k; ++h) plan.tasks.push_back({b, h, block});
    }
  }
  return plan;
}

}  // namespace jit_kernel
