// A launcher for any kernel: loads cubins, launches them with tensors and scalars on the
// caller's stream.
//
//   prepare(device) -> multiprocessors: what a launch needs that does not depend on the kernel
//   load_kernel(image, name, types, threads, shared_bytes) -> handle
//   launch(handle, grid, arguments...)
//
// Triton's calling convention: the kernel's run-time arguments in order, then two scratch pointers,
// which are null: the compiler's side refuses a kernel that asks for scratch.
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "jit_kernel/cuda/driver.h"
#include "jit_kernel/cuda/kernel_table.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::cuda {

using tvm::ffi::Bytes;
using tvm::ffi::String;

constexpr int kMaxArguments = 96;
constexpr int kFirstArgument = 2;  // after the handle and the grid

// A kernel and the types of its arguments: 'p' pointer, 'l' int64, 'i' int32, 'f' float32.
struct Entry {
  Entry(std::string image, std::string name, std::string types, unsigned threads, unsigned shared)
      : kernel(std::move(image), std::move(name), threads, shared), types(std::move(types)) {}
  Kernel kernel;
  std::string types;
};

int64_t load_kernel(Bytes image, String name, String types, int64_t threads, int64_t shared_bytes) {
  if (types.size() > kMaxArguments || threads < 32 || threads > 1024 || shared_bytes < 0) {
    TVM_FFI_THROW(ValueError) << "kernel " << std::string(name) << " has " << types.size()
                              << " arguments, " << threads << " threads and " << shared_bytes
                              << " bytes of shared memory; at most " << kMaxArguments
                              << " arguments and 32 to 1024 threads can be launched";
  }
  return KernelTable<Entry>::get().add(
      std::make_unique<Entry>(std::string(image), std::string(name), std::string(types),
                              static_cast<unsigned>(threads), static_cast<unsigned>(shared_bytes)));
}

int64_t prepare(int64_t device) {
  const int index = checked_device(static_cast<int>(device));
  const ContextGuard context(index);
  return multiprocessors(index);
}

const DLTensor* tensor_of(const TVMFFIAny& value) {
  if (value.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(value.v_ptr);
  if (value.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(value.v_obj);
  return nullptr;
}

// Arguments as cuLaunchKernel wants them: a pointer to each value.
class Parameters {
 public:
  void add(const TVMFFIAny& value, char type, int index) {
    Value& slot = values_[count_];
    if (type == 'p' && value.type_index == kTVMFFINone) {
      slot.pointer = nullptr;
    } else if (const DLTensor* tensor = type == 'p' ? tensor_of(value) : nullptr) {
      if (tensor->device.device_type != kDLCUDA) fail(type, index, "a tensor that is not on CUDA");
      if (device_ < 0) device_ = tensor->device.device_id;
      slot.pointer = data_of(*tensor);
    } else if (type == 'l' && value.type_index == kTVMFFIInt) {
      slot.wide = value.v_int64;
    } else if (type == 'i' && value.type_index == kTVMFFIInt) {
      slot.narrow = static_cast<int32_t>(value.v_int64);
      if (slot.narrow != value.v_int64) fail(type, index, "an int that 32 bits cannot hold");
    } else if (type == 'f' && value.type_index == kTVMFFIFloat) {
      slot.real = static_cast<float>(value.v_float64);
    } else {
      fail(type, index, "of another type");
    }
    pointers_[count_++] = &slot;
  }

  void add_scratch() {
    for (int i = 0; i < 2; ++i) {
      values_[count_].pointer = nullptr;
      pointers_[count_] = &values_[count_];
      ++count_;
    }
  }

  int device() const { return device_; }
  void** data() { return pointers_; }

 private:
  union Value {
    void* pointer;
    int64_t wide;
    int32_t narrow;
    float real;
  };

  [[noreturn]] static void fail(char type, int index, const char* what) {
    TVM_FFI_THROW(TypeError) << "launch: kernel argument " << index << " is " << what
                             << "; it must be of type '" << type << "'";
  }

  Value values_[kMaxArguments + 2];
  void* pointers_[kMaxArguments + 2];
  int count_ = 0;
  int device_ = -1;
};

// launch(handle, grid, arguments...): grid blocks on the current stream of the first tensor's
// device.
void launch(const TVMFFIAny* arguments, int count) {
  if (count < kFirstArgument || arguments[0].type_index != kTVMFFIInt ||
      arguments[1].type_index != kTVMFFIInt) {
    TVM_FFI_THROW(TypeError) << "launch takes a handle, a grid and the kernel's arguments";
  }
  const int64_t handle = arguments[0].v_int64;
  const int64_t grid = arguments[1].v_int64;
  Entry& entry = KernelTable<Entry>::get().at(handle);
  if (static_cast<size_t>(count - kFirstArgument) != entry.types.size()) {
    TVM_FFI_THROW(TypeError) << "launch: " << count - kFirstArgument
                             << " kernel arguments; it must be " << entry.types.size();
  }
  if (grid < 0 || grid > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "launch: grid is " << grid << "; it must be at most 2^31 - 1";
  }
  Parameters parameters;
  for (int i = kFirstArgument; i < count; ++i) {
    const size_t index = static_cast<size_t>(i - kFirstArgument);
    parameters.add(arguments[i], entry.types[index], i - kFirstArgument);
  }
  parameters.add_scratch();
  if (grid == 0) return;
  entry.kernel.launch(parameters.device(), {static_cast<unsigned>(grid), 1, 1}, parameters.data());
}

}  // namespace jit_kernel::cuda

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_kernel, jit_kernel::cuda::load_kernel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, jit_kernel::cuda::prepare);

// Any number of arguments: tvm-ffi's calling convention as it is, because a typed function has a
// fixed number.
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_launch(void*, const TVMFFIAny* arguments, int32_t count,
                                                   TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  jit_kernel::cuda::launch(arguments, count);
  result->type_index = kTVMFFINone;
  result->v_int64 = 0;
  TVM_FFI_SAFE_CALL_END();
}
