// Handles for a process's loaded kernels: Python holds numbers, the launcher the kernels.
#ifndef JIT_KERNEL_CUDA_KERNEL_TABLE_H_
#define JIT_KERNEL_CUDA_KERNEL_TABLE_H_

#include <tvm/ffi/error.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

namespace jit_kernel::cuda {

// Handles are indices: readers take no lock, entries are never removed. One table for each `Entry`
// of a library, which outlives every thread that may still launch.
template <class Entry>
class KernelTable {
 public:
  static KernelTable& get() {
    static KernelTable* const table = new KernelTable();
    return *table;
  }

  int64_t add(std::unique_ptr<Entry> entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t handle = size_.load(std::memory_order_relaxed);
    if (handle == kMaxKernels) {
      TVM_FFI_THROW(RuntimeError) << "more than " << kMaxKernels << " kernels in one process";
    }
    entries_[static_cast<size_t>(handle)] = std::move(entry);
    size_.store(handle + 1, std::memory_order_release);
    return handle;
  }

  Entry& at(int64_t handle) const {
    if (handle < 0 || handle >= size_.load(std::memory_order_acquire)) {
      TVM_FFI_THROW(ValueError) << "launch: no kernel has handle " << handle;
    }
    return *entries_[static_cast<size_t>(handle)];
  }

 private:
  static constexpr int kMaxKernels = 4096;

  std::mutex mutex_;
  std::array<std::unique_ptr<Entry>, kMaxKernels> entries_;
  std::atomic<int64_t> size_{0};
};

}  // namespace jit_kernel::cuda

#endif  // JIT_KERNEL_CUDA_KERNEL_TABLE_H_
