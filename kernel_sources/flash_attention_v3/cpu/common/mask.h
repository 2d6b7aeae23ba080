// Which keys a query sees. Causal, window and chunk each allow one interval, so their meeting is
// one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

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

// The draft mask of one sequence, whose last 32 * words keys have a bit for each query token:
// whether it sees them. What causal, window and chunk hide it does not show.
struct DraftMask {
  static constexpr int64_t kKeys = 32;  // a word's

  const int32_t* rows = nullptr;                        // the first query token's
  int64_t words = 0, stride = 0;                        // of a row; from one to the next
  int64_t begin = std::numeric_limits<int64_t>::max();  // the first key with a bit, maybe negative

  // Whether a key before `end` has a bit; without a mask none has.
  bool covers(int64_t end) const { return end > begin; }

  // Which of the keys first .. first + 31 a token sees, the first one's in the lowest bit. Keys
  // without a bit are seen.
  uint32_t seen(int64_t token, int64_t first) const {
    const int32_t* row = rows + token * stride;
    const int64_t from = first - begin, word = floor_to_multiple(from, kKeys) / kKeys;
    auto bits = [&](int64_t i) {
      return uint64_t{i >= 0 && i < words ? static_cast<uint32_t>(row[i]) : ~uint32_t{0}};
    };
    return static_cast<uint32_t>((bits(word) | bits(word + 1) << kKeys) >> (from - word * kKeys));
  }
};

template <class Params, class Sequence>
inline DraftMask draft_mask_of(const Params& p, const Sequence& s) {
  DraftMask mask = p.draft_mask;
  if (!mask.rows) return mask;
  mask.rows += (s.q_batch * p.rows_q + s.q_begin) * mask.stride;
  mask.begin = s.sk - DraftMask::kKeys * mask.words;
  return mask;
}

// The lowest n of 32 bits: none below 0, all from 32 on.
inline uint32_t lowest_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 32 ? ~uint32_t{0} : (uint32_t{1} << n) - 1;
}

}  // namespace jit_kernel
