// A launcher for any kernel: loads cubins, launches them with tensors and scalars on the caller's
// stream.
//
//   prepare(device) -> multiprocessors: what a launch needs that does not depend on the kernel
//   load_kernel(image, name, types, threads, shared_bytes) -> handle of a Triton kernel
//   load_entry(image, name, types, elements, sizes, names, title) -> handle of any kernel
//   launch(handle, grid, arguments...): blocks along x, threads and memory as load_kernel was told
//   launch_entry(handle, grid, shape, arguments...): both packed as launch_shape.h says
//
// Triton's calling convention: the kernel's run-time arguments in order, then two scratch pointers,
// which are null: the compiler's side refuses a kernel that asks for scratch. To a CUDA kernel they
// make no difference, as the driver reads no more values than a kernel has.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "jit_kernel/cuda/driver.h"
#include "jit_kernel/cuda/kernel_table.h"
#include "jit_kernel/cuda/launch_shape.h"
#include "jit_kernel/cuda/packed_arguments.h"

namespace jit_kernel::cuda {

using tvm::ffi::Bytes;
using tvm::ffi::String;

struct Entry {
  Entry(std::string image, std::string name, unsigned threads, unsigned shared, Signature signature)
      : kernel(std::move(image), std::move(name), threads, shared),
        signature(std::move(signature)) {}
  Kernel kernel;
  Signature signature;
  SharedLimits limits;
};

int64_t load_kernel(Bytes image, String name, String types, int64_t threads, int64_t shared_bytes) {
  if (types.size() > kMaxArguments || threads < 32 || threads > 1024 || shared_bytes < 0) {
    TVM_FFI_THROW(ValueError) << "kernel " << std::string(name) << " has " << types.size()
                              << " arguments, " << threads << " threads and " << shared_bytes
                              << " bytes of shared memory; at most " << kMaxArguments
                              << " arguments and 32 to 1024 threads can be launched";
  }
  return KernelTable<Entry>::get().add(std::make_unique<Entry>(
      std::string(image), std::string(name), static_cast<unsigned>(threads),
      static_cast<unsigned>(shared_bytes), Signature{"launch", std::string(types), "", "", ""}));
}

int64_t load_entry(Bytes image, String name, String types, String elements, String sizes,
                   String names, String title) {
  if (types.size() > kMaxArguments) {
    TVM_FFI_THROW(ValueError) << std::string(title) << " has " << types.size()
                              << " parameters; at most " << kMaxArguments << " can be passed";
  }
  return KernelTable<Entry>::get().add(std::make_unique<Entry>(
      std::string(image), std::string(name), 0u, 0u,
      Signature{std::string(title), std::string(types), std::string(elements), std::string(sizes),
                std::string(names)}));
}

int64_t prepare(int64_t device) {
  const int index = checked_device(static_cast<int>(device));
  const ContextGuard context(index);
  return multiprocessors(index);
}

int64_t integer(const TVMFFIAny* arguments, int count, int index) {
  if (index >= count || arguments[index].type_index != kTVMFFIInt) {
    TVM_FFI_THROW(TypeError) << "launch takes a handle, a grid, launch_entry a shape too, and the "
                                "kernel's arguments";
  }
  return arguments[index].v_int64;
}

// Both on the current stream of the first tensor's device.
void launch(const TVMFFIAny* arguments, int count) {
  Entry& entry = KernelTable<Entry>::get().at(integer(arguments, count, 0));
  const int64_t grid = integer(arguments, count, 1);
  if (grid < 0 || grid > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "launch: grid is " << grid << "; it must be at most 2^31 - 1";
  }
  PackedArguments packed(entry.signature, arguments + 2, count - 2);
  if (grid == 0) return;
  entry.kernel.launch(packed.device(), {static_cast<unsigned>(grid), 1, 1}, packed.data());
}

void launch_entry(const TVMFFIAny* arguments, int count) {
  Entry& entry = KernelTable<Entry>::get().at(integer(arguments, count, 0));
  const Grid grid = grid_of(integer(arguments, count, 1));
  const Shape shape = shape_of(integer(arguments, count, 2));
  PackedArguments packed(entry.signature, arguments + 3, count - 3);
  if (grid.x == 0) return;
  launch_on(entry.kernel, entry.limits, packed.device(), grid, shape, packed.data(),
            entry.signature.title.c_str());
}

}  // namespace jit_kernel::cuda

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_kernel, jit_kernel::cuda::load_kernel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_entry, jit_kernel::cuda::load_entry);
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

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_launch_entry(void*, const TVMFFIAny* arguments,
                                                         int32_t count, TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  jit_kernel::cuda::launch_entry(arguments, count);
  result->type_index = kTVMFFINone;
  result->v_int64 = 0;
  TVM_FFI_SAFE_CALL_END();
}
