// The host side of the Hopper kernels: loads cubins, encodes tensor maps, launches on the caller's
// stream.
//
//   load_kernel(image, head_dim, head_dim_v, masked, cached, fp8, prepared) -> handle, for forward,
//   forward_fp8 and forward_cached
//   load_plain(image, name, threads, shared_bytes) -> handle, for a launch that knows no variants
//   prepare(device) -> multiprocessors: what a launch needs that does not depend on the variant
//   forward(handle, tensors..., scalars...) -> whether it was launched; so forward_fp8, of e4m3
//   forward_cached(handle, tensors..., scalars...) -> whether it was launched; so forward_widened,
//   of a cache in e4m3, which the kernel of another handle widens first
//   load_backward(image, head_dim) -> handle; backward_tiles, backward_tile: of its memory
//   backward(handle, tensors..., scalars...): three kernels, one after the other
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

#include "flash_attention_v3/hopper/launch/append_launch.h"
#include "flash_attention_v3/hopper/launch/backward_launch.h"
#include "flash_attention_v3/hopper/launch/cached_launch.h"
#include "flash_attention_v3/hopper/launch/decode_launch.h"
#include "flash_attention_v3/hopper/launch/exports.h"
#include "flash_attention_v3/hopper/launch/fp8_launch.h"
#include "flash_attention_v3/hopper/launch/known_decode.h"
#include "flash_attention_v3/hopper/launch/mla_launch.h"
#include "flash_attention_v3/hopper/launch/prefill_launch.h"
#include "flash_attention_v3/hopper/launch/widened_launch.h"

namespace jit_kernel::hopper {

int64_t load_plain(tvm::ffi::Bytes image, tvm::ffi::String name, int64_t threads,
                   int64_t shared_bytes) {
  if (threads < 32 || threads > 1024 || shared_bytes < 0 || shared_bytes > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "kernel " << std::string(name) << " has " << threads
                              << " threads and " << shared_bytes
                              << " bytes of shared memory; it must have 32 to 1024 threads";
  }
  return cuda::KernelTable<cuda::Kernel>::get().add(std::make_unique<cuda::Kernel>(
      std::string(image), std::string(name), static_cast<unsigned>(threads),
      static_cast<unsigned>(shared_bytes)));
}

int64_t prepare(int64_t device) {
  const int index = cuda::checked_device(static_cast<int>(device));
  const cuda::ContextGuard context(index);
  ProgressPool::of(index);
  return cuda::multiprocessors(index);
}

}  // namespace jit_kernel::hopper

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_kernel, jit_kernel::hopper::load_kernel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, jit_kernel::hopper::prepare);
JIT_KERNEL_EXPORT_CALL(forward, jit_kernel::hopper::forward)
JIT_KERNEL_EXPORT_CALL(forward_fp8, jit_kernel::hopper::forward_fp8)
JIT_KERNEL_EXPORT_CALL(forward_cached, jit_kernel::hopper::forward_cached)
JIT_KERNEL_EXPORT_CALL(forward_widened, jit_kernel::hopper::forward_widened)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_plain, jit_kernel::hopper::load_plain);
JIT_KERNEL_EXPORT_CALL(append, jit_kernel::hopper::append)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_backward, jit_kernel::hopper::load_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_tiles, jit_kernel::hopper::backward_tiles);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_tile, jit_kernel::hopper::backward_tile);
JIT_KERNEL_EXPORT_CALL(backward, jit_kernel::hopper::backward)
JIT_KERNEL_EXPORT_KNOWN_DECODE(kDLCUDA)
