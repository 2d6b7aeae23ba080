// Software prefetch of keys and values: of those that are read in place, and of those that are
// packed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

// Asks for one head's keys and values of a block, a few rows at a time between computations: a core
// has too few requests for memory to ask for a block at once. They go into L2, as L1 holds the
// lines in use; and the core's own prefetcher follows the runs of one head after the other.
class Prefetch {
 public:
  Prefetch() = default;
  // `count` rows each; k may be null.
  Prefetch(const void* const* k, int64_t k_offset, int64_t k_bytes, const void* const* v,
           int64_t v_offset, int64_t v_bytes, int64_t count)
      : k_(k), v_(v), offsets_{k_offset, v_offset}, bytes_{k_bytes, v_bytes}, count_(count) {}
  // `count` rows of one kind; those before the `at`-th are asked for already, or read at once.
  Prefetch(const void* const* rows, int64_t bytes, int64_t count, int64_t at)
      : v_(rows), bytes_{0, bytes}, count_(count), at_(at) {}

  // Rows up to the i-th, of those not asked for yet.
  void until(int64_t i) {
    if (i > at_) at_ = ask(at_, i - at_);
  }
  void more(int64_t rows) { until(at_ + rows); }

  // Rows from the i-th on; returns the next. For loops that keep i in a register.
  inline __attribute__((always_inline)) int64_t ask(int64_t i, int64_t rows) const {
    for (int64_t end = std::min(i + rows, count_); i < end; ++i) {
      if (k_) row(static_cast<const char*>(k_[i]) + offsets_[0], bytes_[0]);
      row(static_cast<const char*>(v_[i]) + offsets_[1], bytes_[1]);
    }
    return i;
  }

 private:
  static inline __attribute__((always_inline)) void row(const char* from, int64_t bytes) {
    constexpr int64_t kFourLines = 4 * kCacheLine;
    const char* end = from + bytes;
    for (; from + kFourLines <= end; from += kFourLines) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kFourLines; i += kCacheLine) __builtin_prefetch(from + i, 0, 2);
    }
#pragma GCC unroll 1
    for (; from < end; from += kCacheLine) __builtin_prefetch(from, 0, 2);
  }

  const void *const *k_ = nullptr, *const *v_ = nullptr;
  int64_t offsets_[2] = {}, bytes_[2] = {}, count_ = 0, at_ = 0;
};

}  // namespace jit_kernel
