// Query rows in the form that the dot products take.
#pragma once

#include <cmath>

#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/head_sizes.h"
#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/common/rotary.h"
#include "flash_attention_v3/cpu/common/softmax.h"

namespace jit_kernel {

// One row, padded: q (rotated where asked for), then qv. `spare` holds d floats, `turned` d
// elements.
template <class Math, class Params, class Element>
inline void load_query(const Params& p, const Sequence& s, const HeadSizes& sizes,
                       const QueryRow& row, Math* to, float* spare, Element* turned) {
  const int64_t token = row.token, head = row.head;
  if (!p.only_qv) {
    const Element* q = p.q.at(s.q_batch, s.q_begin + token, head);
    if (p.rotary_cos) {
      rotate_row(p, q, s.rotary_begin + (p.is_masked() ? token : 0), spare, turned);
      q = turned;
    }
    convert_row<Math>(q, to, p.d, sizes.qk);
    to += sizes.qk;
  }
  if (p.qv) {
    const Element* qv = p.qv.at(s.q_batch, s.q_begin + token, head);
    convert_row<Math>(qv, to, p.dv, sizes.qv);
  }
}

// v's factor in the scores. It is never so small beside k's that a quotient by it overflows: 2^-64
// of k's changes no score that float32 can show, and 0 is a valid factor.
template <class Params>
inline float v_score_factor(const Params& p, int64_t batch, int64_t head_k) {
  const float v = p.v_descale.at(batch, head_k);
  if (p.only_qv) return v;
  const float least = std::abs(p.k_descale.at(batch, head_k)) * 0x1p-64f;
  return std::abs(v) < least ? least : v;
}

// The factors of one head's scores. With qv they are those of v, and q·k is first multiplied by
// qk_factor.
template <class Params>
inline ScoreScale score_scale_of(const Params& p, int64_t batch, int64_t head_k) {
  const float keys = p.qv ? v_score_factor(p, batch, head_k) : p.k_descale.at(batch, head_k);
  return score_scale(p.softmax_scale * (p.q_descale.at(batch, head_k) * keys), p.softcap);
}

template <class Params>
inline float qk_factor(const Params& p, int64_t batch, int64_t head_k) {
  if (!p.qv || p.only_qv || !(p.k_descale.data || p.v_descale.data)) return 1.0f;
  const float v = v_score_factor(p, batch, head_k);
  return v == 0.0f ? 1.0f : p.k_descale.at(batch, head_k) / v;  // 0 where k's factor is 0, too
}

}  // namespace jit_kernel
