// Which keys a query sees. Causal, window and chunk each allow one interval, so their meeting is
// one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jit_kernel {

struct Interval {
  int64_t begin = 0, end = 0;
};

inline int64_t floor_to_multiple(int64_t x, int64_t n) {
  int64_t r = x % n;
  return x - (r < 0 ? r + n : r);
}

// Keys that query token i of a sequence sees; both ends are non-decreasing in i.
// Aligned to the bottom right: the query stands at key position i + sk - sq.
template <class Params>
inline Interval visible_keys(const Params& p, int64_t i, int64_t sq, int64_t sk) {
  int64_t position = i + sk - sq;
  Interval seen{0, sk};
  if (p.window_left >= 0) seen.begin = std::max(seen.begin, position - p.window_left);
  if (p.window_right >= 0) seen.end = std::min(seen.end, position + p.window_right + 1);
  if (p.attention_chunk > 0) {
    int64_t start = floor_to_multiple(position, p.attention_chunk);
    seen.begin = std::max(seen.begin, start);
    seen.end = std::min(seen.end, start + p.attention_chunk);
  }
  seen.begin = std::min(seen.begin, sk);
  seen.end = std::max(seen.end, seen.begin);
  return seen;
}

}  // namespace jit_kernel
