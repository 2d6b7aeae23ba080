// The counters by which parts of a tile's keys find out which came last: zero before and after each
// launch. Launches of one stream share them, a captured one has its own, as of progress.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "flash_attention_v3/hopper/launch/progress.h"
#include "flash_attention_v3/hopper/launch/zeroed.h"
#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::hopper {

class ArrivalPool {
 public:
  // The pool of a device; under a context guard for it.
  static ArrivalPool& of(int device) {
    static std::array<ArrivalPool, cuda::kMaxDevices>* const pools =
        new std::array<ArrivalPool, cuda::kMaxDevices>();
    return (*pools)[static_cast<size_t>(device)];
  }

  int* counters(cuda::Stream stream, int64_t count) {
    const StreamState state = state_of(stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state.capturing) return take(count);
    Counters& known = of_stream_[state.id];
    if (known.count < count) {
      known.count = std::max(count, 2 * known.count);  // what it had before stays for its launches
      known.memory = take(known.count);
    }
    return known.memory;
  }

 private:
  static constexpr int64_t kChunk = 1 << 19;  // 2 MiB

  struct Counters {
    int* memory = nullptr;
    int64_t count = 0;
  };

  int* take(int64_t count) {
    if (left_ < count) {
      left_ = std::max(kChunk, count);
      next_ = zeroed_ints(left_);
    }
    int* const taken = next_;
    next_ += count;
    left_ -= count;
    return taken;
  }

  std::mutex mutex_;
  std::unordered_map<unsigned long long, Counters> of_stream_;
  int* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace jit_kernel::hopper
