// Exports a function whose arguments are read one after the other.
//
// tvm-ffi's typed export unpacks every argument with code of its own: with five functions of 17 to
// 25 arguments g++ took 48 s for this library, 12 s without them.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "jit_kernel/host/ffi_arguments.h"

namespace jit_kernel::hopper {

template <class T>
T take_argument(FfiArguments& from) {
  if constexpr (std::is_same_v<T, tvm::ffi::TensorView>) {
    return from.tensor();
  } else if constexpr (std::is_same_v<T, tvm::ffi::Optional<tvm::ffi::TensorView>>) {
    const std::optional<tvm::ffi::TensorView> tensor = from.maybe_tensor();
    return tensor.has_value() ? T(*tensor) : T(std::nullopt);
  } else if constexpr (std::is_same_v<T, double>) {
    return from.number();
  } else if constexpr (std::is_same_v<T, bool>) {
    return from.boolean();
  } else {
    static_assert(std::is_same_v<T, int64_t>, "tensors, numbers and bools");
    return from.integer();
  }
}

template <class Result, class... Arguments>
Result call_with(const char* name, Result (*function)(Arguments...), const TVMFFIAny* values,
                 int32_t count) {
  FfiArguments from(name, values, count, static_cast<int32_t>(sizeof...(Arguments)));
  const std::tuple<Arguments...> taken{take_argument<Arguments>(from)...};  // from left to right
  return std::apply(function, taken);
}

}  // namespace jit_kernel::hopper

#define JIT_KERNEL_EXPORT_CALL(name, function)                                                    \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* values, int32_t n,   \
                                                     TVMFFIAny* result) {                         \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                    \
    const auto answer = ::jit_kernel::hopper::call_with(#name, &function, values, n);             \
    result->type_index = std::is_same_v<decltype(answer), const bool> ? kTVMFFIBool : kTVMFFIInt; \
    result->zero_padding = 0;                                                                     \
    result->v_int64 = answer;                                                                     \
    TVM_FFI_SAFE_CALL_END();                                                                      \
  }
