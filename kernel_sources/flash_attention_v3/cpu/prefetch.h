// Software prefetch of keys and values that are read in place.
#pragma once

#include <cstdint>

namespace jit_kernel {

// Asks for what is read next, a few lines at a time between computations: a core has too few
// requests for memory to ask for a block at once, and its own prefetcher does not follow rows
// across pages. Lines are asked for in the order of memory, into L2: L1 holds what is being read.
class Prefetch {
 public:
  Prefetch() = default;
  // `bytes` of each row, from `offset` on.
  Prefetch(const void* const* rows, int64_t count, int64_t offset, int64_t bytes)
      : rows_(rows), end_(rows + count), offset_(offset), bytes_(bytes) {}

  void lines(int64_t n) {
    while (n > 0 && rows_ != end_) {
      const char* from = static_cast<const char*>(*rows_) + offset_ + at_;
      int64_t left = (bytes_ - at_ + 63) / 64, now = n < left ? n : left;
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(from + 64 * i, 0, 2);
      n -= now, at_ += 64 * now;
      if (now == left) at_ = 0, ++rows_;
    }
  }

 private:
  const void* const* rows_ = nullptr;
  const void* const* end_ = nullptr;
  int64_t offset_ = 0, bytes_ = 0, at_ = 0;
};

}  // namespace jit_kernel
