// How a kernel is launched, packed into two integers, so that a call hands over few arguments.
#ifndef JIT_KERNEL_CUDA_LAUNCH_SHAPE_H_
#define JIT_KERNEL_CUDA_LAUNCH_SHAPE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::cuda {

inline constexpr int kCooperative = 2;                 // CU_LAUNCH_ATTRIBUTE_COOPERATIVE
inline constexpr int kNonPortableClusterAllowed = 14;  // CU_FUNC_ATTRIBUTE_*
inline constexpr unsigned kPortableCluster = 8;        // blocks

struct Shape {
  Grid block, cluster;
  unsigned shared_bytes = 0;
  bool cooperative = false, programmatic = false;
};

// The fields of `packed`, from the lowest bit. Python (toolkit/shapes.py) packs; a test compares.
class Fields {
 public:
  explicit Fields(int64_t packed) : rest_(static_cast<uint64_t>(packed)) {}
  unsigned next(int bits) {
    const uint64_t value = rest_ & ((uint64_t{1} << bits) - 1);
    rest_ >>= bits;
    return static_cast<unsigned>(value);
  }

 private:
  uint64_t rest_;
};

// x in 31 bits, then y and z less 1 in 16 each: a plain number is a grid of one dimension.
inline Grid grid_of(int64_t packed) {
  if (packed < 0) TVM_FFI_THROW(ValueError) << "launch: grid is negative";
  Fields fields(packed);
  Grid grid;
  grid.x = fields.next(31);
  grid.y = fields.next(16) + 1;
  grid.z = fields.next(16) + 1;
  return grid;
}

// Threads less 1 in 10, 10 and 6 bits, shared memory in 20, the cluster's blocks less 1 in 4 each
// and two flags.
inline Shape shape_of(int64_t packed) {
  Fields fields(packed);
  Shape shape;
  shape.block.x = fields.next(10) + 1;
  shape.block.y = fields.next(10) + 1;
  shape.block.z = fields.next(6) + 1;
  shape.shared_bytes = fields.next(20);
  shape.cluster.x = fields.next(4) + 1;
  shape.cluster.y = fields.next(4) + 1;
  shape.cluster.z = fields.next(4) + 1;
  shape.cooperative = fields.next(1) != 0;
  shape.programmatic = fields.next(1) != 0;
  return shape;
}

// The shared memory that a kernel was allowed, by device. A launch may need more than the one
// before.
class SharedLimits {
 public:
  void allow(int device, Function function, unsigned bytes, const char* title) {
    if (bytes <= kDefaultSharedWithoutOptIn) return;
    std::atomic<unsigned>& allowed = allowed_[static_cast<size_t>(device)];
    if (bytes <= allowed.load(std::memory_order_acquire)) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes <= allowed.load(std::memory_order_relaxed)) return;
    check(Driver::get().function_set_attribute(function, kMaxDynamicSharedSizeBytes,
                                               static_cast<int>(bytes)),
          (std::string(title) + ", " + std::to_string(bytes) + " bytes of shared memory").c_str());
    allowed.store(bytes, std::memory_order_release);
  }

 private:
  std::mutex mutex_;
  std::array<std::atomic<unsigned>, kMaxDevices> allowed_{};
};

inline void launch_on(Kernel& kernel, SharedLimits& limits, int device, Grid grid,
                      const Shape& shape, void** params, const char* title) {
  const ContextGuard context(device);
  const Driver& driver = Driver::get();
  const Function function = kernel.function(device);
  limits.allow(device, function, shape.shared_bytes, title);
  const unsigned blocks = shape.cluster.x * shape.cluster.y * shape.cluster.z;
  const Stream stream = current_stream(device);
  if (blocks == 1 && !shape.cooperative && !shape.programmatic) {
    check(driver.launch_kernel(function, grid.x, grid.y, grid.z, shape.block.x, shape.block.y,
                               shape.block.z, shape.shared_bytes, stream, params, nullptr),
          title);
    return;
  }
  LaunchAttribute attributes[3] = {};
  unsigned count = 0;
  if (blocks > 1) {
    attributes[count++] = {
        kClusterDimension, 0, {shape.cluster.x, shape.cluster.y, shape.cluster.z}};
    if (blocks > kPortableCluster) {
      check(driver.function_set_attribute(function, kNonPortableClusterAllowed, 1),
            "cuFuncSetAttribute(non-portable cluster size allowed)");
    }
  }
  if (shape.cooperative) attributes[count++] = {kCooperative, 0, {1}};
  if (shape.programmatic && can_overlap()) {
    attributes[count++] = {kProgrammaticSerialization, 0, {1}};
  }
  const LaunchConfig config{
      grid.x, grid.y,     grid.z, shape.block.x, shape.block.y, shape.block.z, shape.shared_bytes,
      stream, attributes, count};
  check(driver.launch_kernel_ex(&config, function, params, nullptr), title);
}

}  // namespace jit_kernel::cuda

#endif  // JIT_KERNEL_CUDA_LAUNCH_SHAPE_H_
