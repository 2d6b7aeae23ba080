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

#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::hopper {

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
    static auto* const is_capturing =
        cuda::driver_function<cuda::Result(cuda::Stream, int*)>("cuStreamIsCapturing");
    static auto* const get_id =
        cuda::driver_function<cuda::Result(cuda::Stream, unsigned long long*)>("cuStreamGetId");
    int capturing = 0;
    cuda::check(is_capturing(stream, &capturing), "cuStreamIsCapturing");
    if (capturing != 0) return take();
    unsigned long long id = 0;  // a stream's address may return, its id does not
    cuda::check(get_id(stream, &id), "cuStreamGetId");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (id == last_id_ && last_ != nullptr) return last_;
    int*& known = of_stream_[id];
    if (known == nullptr) known = take();
    last_id_ = id;
    return last_ = known;
  }

 private:
  static constexpr int64_t kPairs = 1 << 18;  // 2 MiB

  ProgressPool() {
    const cuda::RelaxedCapture relaxed;
    auto* const allocate = cuda::driver_function<cuda::Result(void**, size_t)>("cuMemAlloc_v2");
    auto* const create =
        cuda::driver_function<cuda::Result(cuda::Stream*, unsigned)>("cuStreamCreate");
    auto* const destroy = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamDestroy_v2");
    auto* const fill = cuda::driver_function<cuda::Result(void*, unsigned, size_t, cuda::Stream)>(
        "cuMemsetD32Async");
    auto* const finish = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamSynchronize");
    void* memory = nullptr;
    cuda::check(allocate(&memory, 2 * kPairs * sizeof(int)), "cuMemAlloc");
    cuda::Stream stream = nullptr;  // of its own: the caller's may be under capture
    cuda::check(create(&stream, 1 /* CU_STREAM_NON_BLOCKING */), "cuStreamCreate");
    cuda::check(fill(memory, 0, 2 * kPairs, stream), "cuMemsetD32Async");
    cuda::check(finish(stream), "cuStreamSynchronize");
    cuda::check(destroy(stream), "cuStreamDestroy");
    pairs_ = static_cast<int*>(memory);
  }

  int* take() {
    const int64_t index = taken_.fetch_add(1, std::memory_order_relaxed);
    if (index >= kPairs) {
      TVM_FFI_THROW(RuntimeError)
          << "more than " << kPairs
          << " attention launches were captured into CUDA graphs by this process";
    }
    return pairs_ + 2 * index;
  }

  int* pairs_ = nullptr;
  std::atomic<int64_t> taken_{0};
  std::mutex mutex_;
  std::unordered_map<unsigned long long, int*> of_stream_;
  unsigned long long last_id_ = 0;
  int* last_ = nullptr;
};

}  // namespace jit_kernel::hopper
