// What becomes of a row's sum: out and lse, or, when its keys were split, a part to be combined.
#pragma once

#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/common/softmax.h"

namespace jit_kernel {

// Parts of the rows whose keys are split: sums that are not divided yet, and their states.
struct Partials {
  float* sums = nullptr;  // row after row, dv floats each
  RowState* states = nullptr;
};

template <class Params>
inline void write_row(const Params& p, const Sequence& s, int64_t batch, int64_t head_k,
                      const QueryRow& row, const ScoreScale& scale, const float* sum,
                      const RowState& state) {
  const int64_t token = row.token, head = row.head;
  RowEnd end =
      finish_row(state, scale, p.sinks ? p.sinks[head] : -kInfinity, static_cast<bool>(p.lse));
  auto* out = p.out.at(s.q_batch, s.q_begin + token, head);
  if (end.factor == 0.0f) {  // nothing visible: not 0 times a sum that was never made
    for (int64_t i = 0; i < p.dv; ++i) out[i] = {};
  } else if (p.stream_out) {
    simd::stream_from_float(sum, out, p.dv, end.factor * p.v_descale.at(batch, head_k));
  } else {
    simd::convert_from_float(sum, out, p.dv, end.factor * p.v_descale.at(batch, head_k));
  }
  if (p.lse) *p.lse.at(s.q_batch, s.q_begin + token, head) = end.lse;
}

// Adds up the parts of one row, `stride` rows apart, in the order of their keys, into `sum`.
inline RowState combine_parts(const Partials& parts, int64_t first, int64_t stride, int64_t count,
                              int64_t dv, float to_log2, float* sum) {
  RowState all;
  for (int64_t i = 0; i < count; ++i) {
    all.maximum = std::max(all.maximum, parts.states[first + i * stride].maximum);
  }
  for (int64_t j = 0; j < dv; ++j) sum[j] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const RowState& part = parts.states[first + i * stride];
    if (part.maximum == -kInfinity) {  // it saw nothing, or nothing but NaN: so is its sum
      all.sum += part.sum;
      continue;
    }
    float factor = std::exp2((part.maximum - all.maximum) * to_log2);
    if (factor == 0.0f) continue;
    const float* from = parts.sums + (first + i * stride) * dv;
    for (int64_t j = 0; j < dv; ++j) sum[j] += from[j] * factor;
    all.sum += part.sum * factor;
  }
  return all;
}

}  // namespace jit_kernel
