// Addresses of tensors as tvm-ffi hands them over.
#ifndef JIT_KERNEL_CUDA_TENSOR_H_
#define JIT_KERNEL_CUDA_TENSOR_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>

namespace jit_kernel::cuda {

inline void* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

inline void* data_of(const tvm::ffi::TensorView& tensor) {
  return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

// Null for an absent tensor.
template <typename T>
T* data_of(const tvm::ffi::Optional<tvm::ffi::TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(data_of(tensor.value())) : nullptr;
}

}  // namespace jit_kernel::cuda

#endif  // JIT_KERNEL_CUDA_TENSOR_H_
