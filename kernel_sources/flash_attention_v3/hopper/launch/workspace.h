// Memory of the decode kernels' own: counters, which are zero before and after each launch, and
// room for the partial results of cut sequences.
//
// Launches of one stream follow each other and share both. A captured launch gets counters of its
// own for good, since its graph may run on any stream; room for partial results it takes from the
// caller, whose allocator knows of the capture.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::hopper {

class Workspace {
 public:
  struct Memory {
    int* counters;
    float* partials;  // null while the stream is captured
  };

  static Workspace& of(int device) {
    static std::array<std::atomic<Workspace*>, cuda::kMaxDevices> all{};
    static std::mutex* const making = new std::mutex();
    std::atomic<Workspace*>& slot = all[static_cast<size_t>(device)];
    Workspace* found = slot.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    const std::lock_guard<std::mutex> lock(*making);
    found = slot.load(std::memory_order_acquire);
    if (found == nullptr) {
      found = new Workspace();
      slot.store(found, std::memory_order_release);
    }
    return *found;
  }

  // For a launch of `blocks` thread blocks that needs `floats` numbers for partial results.
  // has_room: the caller has them; without, nothing is taken for a launch that is captured.
  Memory memory(cuda::Stream stream, int blocks, int64_t floats, bool has_room) {
    static auto* const is_capturing =
        cuda::driver_function<cuda::Result(cuda::Stream, int*)>("cuStreamIsCapturing");
    static auto* const get_id =
        cuda::driver_function<cuda::Result(cuda::Stream, unsigned long long*)>("cuStreamGetId");
    int capturing = 0;
    cuda::check(is_capturing(stream, &capturing), "cuStreamIsCapturing");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing != 0) return {has_room ? take(blocks) : nullptr, nullptr};
    unsigned long long id = 0;  // a stream's address may return, its id does not
    cuda::check(get_id(stream, &id), "cuStreamGetId");
    if (last_ == nullptr || id != last_id_) {
      last_ = &of_stream_[id];
      last_id_ = id;
    }
    OfStream& known = *last_;
    if (known.blocks < blocks) {
      known.memory.counters = take(blocks);
      known.blocks = blocks;
    }
    if (known.floats < floats) {  // the smaller memory stays: launches on their way may use it
      const cuda::RelaxedCapture relaxed;
      known.memory.partials = static_cast<float*>(allocate(floats * 4));
      known.floats = floats;
    }
    return known.memory;
  }

 private:
  struct OfStream {
    Memory memory{};
    int blocks = 0;
    int64_t floats = 0;
  };
  static constexpr int64_t kChunk = 1 << 18;  // ints that are zeroed at a time: 1 MiB

  static void* allocate(int64_t bytes) {
    static auto* const allocate_bytes =
        cuda::driver_function<cuda::Result(void**, size_t)>("cuMemAlloc_v2");
    void* memory = nullptr;
    cuda::check(allocate_bytes(&memory, static_cast<size_t>(bytes)), "cuMemAlloc");
    return memory;
  }

  int* take(int count) {
    if (count > left_) add_chunk(count > kChunk ? count : kChunk);
    int* const taken = next_;
    next_ += count;
    left_ -= count;
    return taken;
  }

  void add_chunk(int64_t ints) {
    const cuda::RelaxedCapture relaxed;
    auto* const create =
        cuda::driver_function<cuda::Result(cuda::Stream*, unsigned)>("cuStreamCreate");
    auto* const destroy = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamDestroy_v2");
    auto* const fill = cuda::driver_function<cuda::Result(void*, unsigned, size_t, cuda::Stream)>(
        "cuMemsetD32Async");
    auto* const finish = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamSynchronize");
    void* const memory = allocate(ints * 4);
    cuda::Stream stream = nullptr;  // of its own: the caller's may be under capture
    cuda::check(create(&stream, 1 /* CU_STREAM_NON_BLOCKING */), "cuStreamCreate");
    cuda::check(fill(memory, 0, static_cast<size_t>(ints), stream), "cuMemsetD32Async");
    cuda::check(finish(stream), "cuStreamSynchronize");
    cuda::check(destroy(stream), "cuStreamDestroy");
    next_ = static_cast<int*>(memory);
    left_ = ints;
  }

  std::mutex mutex_;
  int* next_ = nullptr;
  int64_t left_ = 0;
  std::unordered_map<unsigned long long, OfStream> of_stream_;
  unsigned long long last_id_ = 0;
  OfStream* last_ = nullptr;
};

}  // namespace jit_kernel::hopper
