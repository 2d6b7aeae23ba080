// The counters from which a launch's blocks take their tiles: two ints, zero before and after each
// launch.
//
// Launches that may run at the same time must not share them. Those of one stream follow each other
// and share a pair; a launch that is captured into a graph gets a pair of its own for good, since
// the graph may run on any stream. (One graph does not run twice at the same time; two instances of
// one captured graph must not either.)
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "flash_attention_v3/hopper/launch/zeroed.h"
#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::hopper {

// What a stream is to those who keep memory for it.
struct StreamState {
  bool capturing;         // a launch becomes part of a graph
  unsigned long long id;  // of one that is not: a stream's address may return, its id does not
};

inline StreamState state_of(cuda::Stream stream) {
  static auto* const is_capturing =
      cuda::driver_function<cuda::Result(cuda::Stream, int*)>("cuStreamIsCapturing");
  static auto* const get_id =
      cuda::driver_function<cuda::Result(cuda::Stream, unsigned long long*)>("cuStreamGetId");
  int capturing = 0;
  cuda::check(is_capturing(stream, &capturing), "cuStreamIsCapturing");
  if (capturing != 0) return {true, 0};
  unsigned long long id = 0;
  cuda::check(get_id(stream, &id), "cuStreamGetId");
  return {false, id};
}

class ProgressPool {
 public:
  // The pool of a device; made at its first use, under a context guard for it.
  static ProgressPool& of(int device) {
    static std::array<std::atomic<ProgressPool*>, cuda::kMaxDevices> pools{};
    static std::mutex* const making = new std::mutex();
    std::atomic<ProgressPool*>& slot = pools[static_cast<size_t>(device)];
    ProgressPool* pool = slot.load(std::memory_order_acquire);
    if (pool != nullptr) return *pool;
    const std::lock_guard<std::mutex> lock(*making);
    pool = slot.load(std::memory_order_acquire);
    if (pool == nullptr) {
      pool = new ProgressPool();
      slot.store(pool, std::memory_order_release);
    }
    return *pool;
  }

  int* counters(cuda::Stream stream) {
    const StreamState state = state_of(stream);
    if (state.capturing) return take();
    const unsigned long long id = state.id;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (id == last_id_ && last_ != nullptr) return last_;
    int*& known = of_stream_[id];
    if (known == nullptr) known = take();
    last_id_ = id;
    return last_ = known;
  }

 private:
  static constexpr int64_t kPairs = 1 << 18;  // 2 MiB

  ProgressPool() : pairs_(zeroed_ints(2 * kPairs)) {}

  int* take() {
    const int64_t index = taken_.fetch_add(1, std::memory_order_relaxed);
    if (index >= kPairs) {
      TVM_FFI_THROW(RuntimeError)
          << "more than " << kPairs
          << " attention launches were captured into CUDA graphs by this process";
    }
    return pairs_ + 2 * index;
  }

  int* const pairs_;
  std::atomic<int64_t> taken_{0};
  std::mutex mutex_;
  std::unordered_map<unsigned long long, int*> of_stream_;
  unsigned long long last_id_ = 0;
  int* last_ = nullptr;
};

}  // namespace jit_kernel::hopper
