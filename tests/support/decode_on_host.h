// The Hopper decode launcher compiled for the CPU, on tensors of the CPU: no driver, and a launch
// is counted and its parameters kept.
#include <tvm/ffi/tvm_ffi.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

// In place of the driver.
#define JIT_KERNEL_CUDA_DRIVER_H_
namespace jit_kernel::cuda {
using Result = int;
using Stream = void*;
inline constexpr int kMaxDevices = 64;

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// The last launch of any kernel.
struct Launch {
  int64_t count = 0;
  std::string parameters;
  static Launch& last() {
    static Launch launch;
    return launch;
  }
};

struct Kernel {
  Kernel(std::string, std::string, unsigned threads, unsigned shared)
      : threads(threads), shared(shared) {}
  void launch(int device, Grid grid, void** arguments) {
    launch_overlapped(device, grid, 1, arguments);
  }
  void launch_overlapped(int device, Grid grid, unsigned cluster, void** arguments);
  unsigned threads, shared;
};

struct ContextGuard {
  explicit ContextGuard(int) {}
  ~ContextGuard() {}
};
struct RelaxedCapture {
  RelaxedCapture() {}
  ~RelaxedCapture() {}
};
inline bool is_capturing = false;
inline int checked_device(int device) { return device; }
inline int multiprocessors(int) { return 132; }
inline Stream current_stream(int) { return nullptr; }
inline void check(Result, const char*) {}

// What an encoded map is made of, in place of the encoding.
inline Result encode(void* map, int type, unsigned rank, void* data, const uint64_t* sizes,
                     const uint64_t* steps, const uint32_t* box, const uint32_t*, int, int swizzle,
                     int promotion, int) {
  uint64_t words[16] = {static_cast<uint64_t>(type), reinterpret_cast<uint64_t>(data)};
  for (unsigned i = 0; i < rank; ++i) words[2 + i] = sizes[i] << 32 | box[i];
  for (unsigned i = 0; i + 1 < rank; ++i) words[8 + i] = steps[i];
  words[14] = static_cast<uint64_t>(swizzle);
  words[15] = static_cast<uint64_t>(promotion);
  std::memcpy(map, words, sizeof(words));
  return 0;
}
inline Result ask_capture(Stream, int* capturing) {
  *capturing = is_capturing;
  return 0;
}
inline Result give_id(Stream, unsigned long long* id) {
  *id = 1;
  return 0;
}
inline Result allocate(void** memory, size_t) {
  static char some[16];
  *memory = some;
  return 0;
}
inline Result do_nothing() { return 0; }

template <typename Signature>
Signature* driver_function(const char* name) {
  const std::string wanted = name;
  void* found = reinterpret_cast<void*>(&do_nothing);
  if (wanted == "cuTensorMapEncodeTiled") found = reinterpret_cast<void*>(&encode);
  if (wanted == "cuStreamIsCapturing") found = reinterpret_cast<void*>(&ask_capture);
  if (wanted == "cuStreamGetId") found = reinterpret_cast<void*>(&give_id);
  if (wanted == "cuMemAlloc_v2") found = reinterpret_cast<void*>(&allocate);
  return reinterpret_cast<Signature*>(found);
}
}  // namespace jit_kernel::cuda

#include "flash_attention_v3/hopper/launch/known_decode.h"

inline void jit_kernel::cuda::Kernel::launch_overlapped(int, Grid grid, unsigned cluster,
                                                        void** arguments) {
  Launch& last = Launch::last();
  ++last.count;
  last.parameters.assign(static_cast<const char*>(arguments[0]), sizeof(hopper::DecodeParams));
  for (unsigned number : {grid.x, grid.y, grid.z, cluster, threads, shared}) {
    last.parameters.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }
}

inline int64_t launches() { return jit_kernel::cuda::Launch::last().count; }
inline tvm::ffi::Bytes parameters() { return jit_kernel::cuda::Launch::last().parameters; }
inline void set_capturing(bool capturing) { jit_kernel::cuda::is_capturing = capturing; }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(launches, launches);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(parameters, parameters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_capturing, set_capturing);
JIT_KERNEL_EXPORT_KNOWN_DECODE(kDLCPU)
