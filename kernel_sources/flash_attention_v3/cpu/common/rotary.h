// Rotary embedding of queries and of appended keys, and the append itself.
#pragma once

#include <cstring>

#include "flash_attention_v3/cpu/common/params.h"
#include "jit_kernel/cpu/simd.h"

namespace jit_kernel {

// Turns the first rotary_dim of n elements at a position; computed in float, rounded to Element
// once, as a cache must hold it. `spare` holds n floats, `cosines` and `sines` rotary_dim/2.
template <class Params, class Element>
inline void rotate_row(const Params& p, const Element* from, int64_t position, float* spare,
                       Element* to) {
  int64_t half = p.rotary_dim / 2, n = p.d;
  const Element* cosines = p.rotary_cos.data + position * p.rotary_cos.row;
  const Element* sines = p.rotary_sin.data + position * p.rotary_sin.row;
  simd::convert_to_float(from, spare, n);
  for (int64_t i = 0; i < half; ++i) {
    float& a = spare[p.rotary_interleaved ? 2 * i : i];
    float& b = spare[p.rotary_interleaved ? 2 * i + 1 : half + i];
    float c = to_float(cosines[i]), s = to_float(sines[i]), first = a;
    a = first * c - b * s;
    b = first * s + b * c;
  }
  simd::convert_from_float(spare, to, n, 1.0f);
}

// Copies the new tokens of sequence s of one key/value head into the caches, keys rotated.
// `spare` holds d floats.
template <class Params>
inline void append_tokens(const Params& p, const Sequence& s, int64_t head, float* spare) {
  int64_t first = s.sk - s.new_tokens;
  for (int64_t t = 0; t < s.new_tokens; ++t) {
    auto* k = key_row(p, p.k, s, first + t, head);
    auto* v = key_row(p, p.v, s, first + t, head);
    auto* k_new = p.k_new.at(s.new_batch, s.new_begin + t, head);
    auto* v_new = p.v_new.at(s.new_batch, s.new_begin + t, head);
    if (p.rotary_cos) {
      rotate_row(p, k_new, s.rotary_begin + t, spare, k);
    } else {
      std::memcpy(static_cast<void*>(k), k_new, static_cast<size_t>(p.d) * sizeof(*k));
    }
    std::memcpy(static_cast<void*>(v), v_new, static_cast<size_t>(p.dv) * sizeof(*v));
  }
}

}  // namespace jit_kernel
