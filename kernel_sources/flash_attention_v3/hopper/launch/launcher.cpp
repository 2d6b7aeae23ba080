// The host side of the Hopper kernels: loads cubins, encodes tensor maps, launches on the caller's
// stream.
//
//   load_kernel(image, head_dim, head_dim_v, masked, cached) -> handle
//   prepare(device) -> multiprocessors: what a launch needs that does not depend on the variant
//   forward(handle, tensors..., scalars...) -> whether it was launched
//   forward_cached(handle, tensors..., scalars...) -> whether it was launched
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

#include "flash_attention_v3/hopper/launch/cached_launch.h"
#include "flash_attention_v3/hopper/launch/prefill_launch.h"

namespace jit_kernel::hopper {

int64_t prepare(int64_t device) {
  const int index = cuda::checked_device(static_cast<int>(device));
  const cuda::ContextGuard context(index);
  ProgressPool::of(index);
  return cuda::multiprocessors(index);
}

}  // namespace jit_kernel::hopper

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_kernel, jit_kernel::hopper::load_kernel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, jit_kernel::hopper::prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, jit_kernel::hopper::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_cached, jit_kernel::hopper::forward_cached);
