// Rotary embedding of queries and of appended keys, and the append itself.
#pragma once

#include <cstring>
#include <type_traits>

#include "flash_attention_v3/cpu/common/params.h"
#include "jit_kernel/cpu/simd.h"

namespace jit_kernel {

// Turns the first rotary_dim numbers of a row at a position.
template <class Params>
inline void rotate_floats(const Params& p, int64_t position, float* row) {
  const int64_t half = p.rotary_dim / 2;
  const auto* cosines = p.rotary_cos.data + position * p.rotary_cos.row;
  const auto* sines = p.rotary_sin.data + position * p.rotary_sin.row;
  for (int64_t i = 0; i < half; ++i) {
    float& a = row[p.rotary_interleaved ? 2 * i : i];
    float& b = row[p.rotary_interleaved ? 2 * i + 1 : half + i];
    float c = to_float(cosines[i]), s = to_float(sines[i]), first = a;
    a = first * c - b * s;
    b = first * s + b * c;
  }
}

// The d elements of a row, turned; computed in float, rounded to Element once, as a cache must hold
// it. `spare` holds d floats.
template <class Params, class Element>
inline void rotate_row(const Params& p, const Element* from, int64_t position, float* spare,
                       Element* to) {
  simd::convert_to_float(from, spare, p.d);
  rotate_floats(p, position, spare);
  simd::convert_from_float(spare, to, p.d, 1.0f);
}

template <class Element>
inline void copy_row(const Element* from, Element* to, int64_t n) {
  std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(n) * sizeof(Element));
}

// n floats divided by a factor, rounded once; what is too large becomes the largest number.
inline void quantise_row(const float* from, e4m3* to, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<e4m3>(from[i] / factor);
}

// Copies the new tokens of sequence s of one key/value head into the caches, keys rotated, and
// quantised where the caches are of another type. `spare` holds as many floats as the larger of d
// and dv.
template <class Params>
inline void append_tokens(const Params& p, const Sequence& s, int64_t batch, int64_t head,
                          float* spare) {
  constexpr bool kSame = std::is_same<typename Params::Query, typename Params::Key>::value;
  const float k_descale = p.k_descale.at(batch, head), v_descale = p.v_descale.at(batch, head);
  for (int64_t t = 0; t < s.new_tokens; ++t) {
    const int64_t key = s.sk - s.new_tokens + t, from = s.new_begin + t;
    auto* k = key_row(p, p.k, s, key, head);
    auto* v = key_row(p, p.v, s, key, head);
    if (p.k_stored) {
      copy_row(p.k_stored.at(s.new_batch, from, head), k, p.d);
      copy_row(p.v_stored.at(s.new_batch, from, head), v, p.dv);
      continue;
    }
    const auto* k_new = p.k_new.at(s.new_batch, from, head);
    const auto* v_new = p.v_new.at(s.new_batch, from, head);
    if constexpr (kSame) {
      if (p.rotary_cos) {
        rotate_row(p, k_new, s.rotary_begin + t, spare, k);
      } else {
        copy_row(k_new, k, p.d);
      }
      copy_row(v_new, v, p.dv);
    } else {
      simd::convert_to_float(k_new, spare, p.d);
      if (p.rotary_cos) rotate_floats(p, s.rotary_begin + t, spare);
      quantise_row(spare, k, p.d, k_descale * key_factor(p, p.k_scale, s, key, head));
      simd::convert_to_float(v_new, spare, p.dv);
      quantise_row(spare, v, p.dv, v_descale * key_factor(p, p.v_scale, s, key, head));
    }
  }
}

}  // namespace jit_kernel
