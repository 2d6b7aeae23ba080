// The CUDA driver for host launchers: symbols from libcuda.so.1 at run time, so that a machine
// without a driver or a toolkit builds the same launcher. Declares only what the launchers use.
#ifndef JIT_KERNEL_CUDA_DRIVER_H_
#define JIT_KERNEL_CUDA_DRIVER_H_

#include <dlfcn.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

namespace jit_kernel::cuda {

// ABI of cuda.h, which is stable: CUresult and CUdevice are ints, the rest opaque pointers.
using Result = int;
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;

inline constexpr Result kSuccess = 0;
inline constexpr int kMaxDynamicSharedSizeBytes = 8;           // CU_FUNC_ATTRIBUTE_*
inline constexpr int kMultiprocessorCount = 16;                // CU_DEVICE_ATTRIBUTE_*
inline constexpr int kCaptureModeRelaxed = 2;                  // CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr unsigned kDefaultSharedWithoutOptIn = 49152;  // bytes a block gets unasked
inline constexpr int kMaxDevices = 64;

// Symbol of libcuda.so.1 by its exported name (cuCtxPushCurrent_v2, not cuCtxPushCurrent).
// Throws RuntimeError when the driver or the symbol is missing.
inline void* driver_symbol(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    TVM_FFI_THROW(RuntimeError) << "the CUDA driver library libcuda.so.1 cannot be loaded; is an "
                                   "NVIDIA driver installed on this machine?";
  }
  void* const symbol = dlsym(library, name);
  if (symbol == nullptr) {
    TVM_FFI_THROW(RuntimeError) << "the CUDA driver has no " << name
                                << "; CUDA 12 or newer is needed";
  }
  return symbol;
}

template <typename Signature>
Signature* driver_function(const char* name) {
  return reinterpret_cast<Signature*>(driver_symbol(name));
}

// CUlaunchAttribute and CUlaunchConfig; the value of an attribute has 64 bytes.
struct LaunchAttribute {
  int id;
  int padding;
  unsigned value[16];
};
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
inline constexpr int kClusterDimension = 4;  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and the first driver that captures it.
inline constexpr int kProgrammaticSerialization = 6;
inline constexpr int kDriverOfOverlappedGraphs = 12030;

struct Driver {
  Result (*init)(unsigned);
  Result (*version)(int*);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*device_get)(Device*, int);
  Result (*device_attribute)(int*, int, Device);
  Result (*primary_context_retain)(Context*, Device);
  Result (*context_current)(Context*);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*capture_mode_exchange)(int*);
  Result (*module_load_data)(Module*, const void*);
  Result (*module_get_function)(Function*, Module, const char*);
  Result (*function_set_attribute)(Function, int, int);
  Result (*launch_kernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                          unsigned, Stream, void**, void**);
  Result (*launch_kernel_ex)(const LaunchConfig*, Function, void**, void**);

  static const Driver& get() {
    static const Driver driver = load();
    return driver;
  }

 private:
  template <typename Signature>
  static void bind(Signature** slot, const char* name) {
    *slot = driver_function<Signature>(name);
  }

  static Driver load() {
    Driver d{};
    bind(&d.init, "cuInit");
    bind(&d.version, "cuDriverGetVersion");
    bind(&d.error_name, "cuGetErrorName");
    bind(&d.error_string, "cuGetErrorString");
    bind(&d.device_get, "cuDeviceGet");
    bind(&d.device_attribute, "cuDeviceGetAttribute");
    bind(&d.primary_context_retain, "cuDevicePrimaryCtxRetain");
    bind(&d.context_current, "cuCtxGetCurrent");
    bind(&d.context_push, "cuCtxPushCurrent_v2");
    bind(&d.context_pop, "cuCtxPopCurrent_v2");
    bind(&d.capture_mode_exchange, "cuThreadExchangeStreamCaptureMode");
    bind(&d.module_load_data, "cuModuleLoadData");
    bind(&d.module_get_function, "cuModuleGetFunction");
    bind(&d.function_set_attribute, "cuFuncSetAttribute");
    bind(&d.launch_kernel, "cuLaunchKernel");
    bind(&d.launch_kernel_ex, "cuLaunchKernelEx");
    d.init(0);  // a failure repeats at the first call that needs a device, and is reported there
    return d;
  }
};

inline void check(Result result, const char* what) {
  if (result == kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  Driver::get().error_name(result, &name);
  Driver::get().error_string(result, &text);
  TVM_FFI_THROW(RuntimeError) << what << ": " << (name ? name : "unknown CUDA error") << " ("
                              << result << "): " << (text ? text : "");
}

inline int checked_device(int device) {
  if (device < 0 || device >= kMaxDevices) {
    TVM_FFI_THROW(ValueError) << "CUDA device index " << device << " is not in 0.."
                              << kMaxDevices - 1;
  }
  return device;
}

// The primary context of a device, the one that PyTorch works in; retained once and kept.
inline Context primary_context(int device) {
  static std::array<std::atomic<Context>, kMaxDevices> contexts{};
  std::atomic<Context>& slot = contexts[static_cast<size_t>(checked_device(device))];
  Context context = slot.load(std::memory_order_acquire);
  if (context == nullptr) {
    const Driver& driver = Driver::get();
    Device handle = 0;
    check(driver.device_get(&handle, device), "cuDeviceGet");
    check(driver.primary_context_retain(&context, handle), "cuDevicePrimaryCtxRetain");
    slot.store(context, std::memory_order_release);
  }
  return context;
}

inline int device_attribute(int device, int attribute) {
  const Driver& driver = Driver::get();
  Device handle = 0;
  check(driver.device_get(&handle, device), "cuDeviceGet");
  int value = 0;
  check(driver.device_attribute(&value, attribute, handle), "cuDeviceGetAttribute");
  return value;
}

// How many multiprocessors a device has; asked of the driver once.
inline int multiprocessors(int device) {
  static std::array<std::atomic<int>, kMaxDevices> counts{};
  std::atomic<int>& slot = counts[static_cast<size_t>(checked_device(device))];
  int count = slot.load(std::memory_order_relaxed);
  if (count == 0) {
    count = device_attribute(device, kMultiprocessorCount);
    slot.store(count, std::memory_order_relaxed);
  }
  return count;
}

// Makes the device's primary context current for a scope; free when it already is.
class ContextGuard {
 public:
  explicit ContextGuard(int device) {
    const Driver& driver = Driver::get();
    const Context wanted = primary_context(device);
    Context current = nullptr;
    check(driver.context_current(&current), "cuCtxGetCurrent");
    if (current == wanted) return;
    check(driver.context_push(wanted), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~ContextGuard() {
    Context popped = nullptr;
    if (pushed_) Driver::get().context_pop(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

// Lets this thread load a module while one of its streams is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check(Driver::get().capture_mode_exchange(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { Driver::get().capture_mode_exchange(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = kCaptureModeRelaxed;
};

// The caller's current stream on a device, as tvm-ffi recorded it from the call's tensors.
inline Stream current_stream(int device) { return TVMFFIEnvGetStream(2 /* kDLCUDA */, device); }

// Whether a launch that overlaps the kernel before it may be captured in a graph.
inline bool can_overlap() {
  static const bool can = [] {
    int version = 0;
    check(Driver::get().version(&version), "cuDriverGetVersion");
    return version >= kDriverOfOverlappedGraphs;
  }();
  return can;
}

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// One entry of a cubin, loaded on a device at its first use there. Never unloaded: a captured
// graph may hold the function for as long as the process lives.
class Kernel {
 public:
  Kernel(std::string image, std::string name, unsigned threads, unsigned shared_bytes)
      : image_(std::move(image)),
        name_(std::move(name)),
        threads_(threads),
        shared_(shared_bytes) {}

  // The caller holds a ContextGuard for the same device.
  Function function(int device) {
    std::atomic<Function>& slot = functions_[static_cast<size_t>(checked_device(device))];
    const Function known = slot.load(std::memory_order_acquire);
    return known != nullptr ? known : load(slot);
  }

  // Asynchronous launch on the caller's current stream; params as cuLaunchKernel takes them.
  void launch(int device, Grid grid, void** params) {
    const ContextGuard context(device);
    const Function entry = function(device);
    check(Driver::get().launch_kernel(entry, grid.x, grid.y, grid.z, threads_, 1, 1, shared_,
                                      current_stream(device), params, nullptr),
          name_.c_str());
  }

  // The same, in clusters of `cluster` blocks along x, of a kernel that executes
  // griddepcontrol.wait before it touches what others write or read: its blocks may start while
  // those of the stream's kernel before are at their end, if that one allows it.
  void launch_overlapped(int device, Grid grid, unsigned cluster, void** params) {
    const ContextGuard context(device);
    const Function entry = function(device);
    LaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (can_overlap()) attributes[count++] = {kProgrammaticSerialization, 0, {1}};
    if (cluster > 1) attributes[count++] = {kClusterDimension, 0, {cluster, 1, 1}};
    const LaunchConfig config{
        grid.x, grid.y, grid.z, threads_, 1, 1, shared_, current_stream(device), attributes, count};
    check(Driver::get().launch_kernel_ex(&config, entry, params, nullptr), name_.c_str());
  }

 private:
  Function load(std::atomic<Function>& slot) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Function entry = slot.load(std::memory_order_acquire);
    if (entry != nullptr) return entry;
    const Driver& driver = Driver::get();
    const RelaxedCapture relaxed;
    Module module = nullptr;
    check(driver.module_load_data(&module, image_.data()), "cuModuleLoadData");
    check(driver.module_get_function(&entry, module, name_.c_str()), "cuModuleGetFunction");
    if (shared_ > kDefaultSharedWithoutOptIn) {
      check(driver.function_set_attribute(entry, kMaxDynamicSharedSizeBytes,
                                          static_cast<int>(shared_)),
            "cuFuncSetAttribute(max dynamic shared size)");
    }
    slot.store(entry, std::memory_order_release);
    return entry;
  }

  std::string image_;
  std::string name_;
  unsigned threads_;
  unsigned shared_;
  std::mutex mutex_;
  std::array<std::atomic<Function>, kMaxDevices> functions_{};
};

}  // namespace jit_kernel::cuda

#endif  // JIT_KERNEL_CUDA_DRIVER_H_
