// The arguments of an exported function, read one after the other.
//
// tvm-ffi's typed export unpacks every argument with code of its own: for the 33 arguments of a
// forward that is half of the library and of its compile time.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <optional>

namespace jit_kernel {

using tvm::ffi::TensorView;

class FfiArguments {
 public:
  FfiArguments(const char* function, const TVMFFIAny* values, int32_t count, int32_t expected)
      : function_(function), values_(reinterpret_cast<const tvm::ffi::AnyView*>(values)) {
    if (count == expected) return;
    TVM_FFI_THROW(TypeError) << function << " takes " << expected << " arguments, not " << count;
  }

  TensorView tensor() { return read<TensorView>("a tensor"); }
  double number() { return read<double>("a number"); }
  int64_t integer() { return read<int64_t>("an integer"); }
  bool boolean() { return read<bool>("a bool"); }

  // Of Python's type of this name and no other: a bool is no integer, and an integer no float.
  double exact_number() { return exact<double>(tvm::ffi::TypeIndex::kTVMFFIFloat, "a float"); }
  int64_t exact_integer() { return exact<int64_t>(tvm::ffi::TypeIndex::kTVMFFIInt, "an int"); }
  bool exact_boolean() { return exact<bool>(tvm::ffi::TypeIndex::kTVMFFIBool, "a bool"); }

  // One of these, or nothing for None.
  std::optional<double> maybe_exact_number() {
    return skips_none() ? std::nullopt : std::optional<double>(exact_number());
  }
  std::optional<int64_t> maybe_exact_integer() {
    return skips_none() ? std::nullopt : std::optional<int64_t>(exact_integer());
  }
  std::optional<TensorView> maybe_tensor() { return maybe<TensorView>("a tensor"); }
  std::optional<double> maybe_number() { return maybe<double>("a number"); }
  std::optional<int64_t> maybe_integer() { return maybe<int64_t>("an integer"); }

 private:
  bool skips_none() {
    const bool is_none = values_[next_] == nullptr;
    next_ += is_none;
    return is_none;
  }

  template <class T>
  __attribute__((noinline)) std::optional<T> maybe(const char* what) {
    if (skips_none()) return std::nullopt;
    return read<T>(what);
  }

  template <class T>
  T exact(int32_t type, const char* what) {
    if (values_[next_].type_index() != type) refuse(what);
    return read<T>(what);
  }

  [[noreturn]] __attribute__((noinline)) void refuse(const char* what) {
    TVM_FFI_THROW(TypeError) << function_ << ": argument " << next_ << " is not " << what;
    __builtin_unreachable();
  }

  template <class T>
  __attribute__((noinline)) T read(const char* what) {
    std::optional<T> value = values_[next_].try_cast<T>();
    if (!value.has_value()) refuse(what);
    ++next_;
    return *value;
  }

  const char* function_;
  const tvm::ffi::AnyView* values_;
  int32_t next_ = 0;
};

}  // namespace jit_kernel

// Exports function(FfiArguments&) as `name`, which takes `count` arguments and returns nothing.
#define JIT_KERNEL_EXPORT(name, count, function)                                                \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* values, int32_t n, \
                                                     TVMFFIAny*) {                              \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                  \
    ::jit_kernel::FfiArguments arguments(#name, values, n, count);                              \
    function(arguments);                                                                        \
    TVM_FFI_SAFE_CALL_END();                                                                    \
  }

// The same for a function that returns a number of `type`: kTVMFFIBool or kTVMFFIInt.
#define JIT_KERNEL_EXPORT_ANSWER(name, count, function, type)                                   \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* values, int32_t n, \
                                                     TVMFFIAny* result) {                       \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                  \
    ::jit_kernel::FfiArguments arguments(#name, values, n, count);                              \
    const int64_t answer = function(arguments);                                                 \
    result->type_index = type;                                                                  \
    result->zero_padding = 0;                                                                   \
    result->v_int64 = answer;                                                                   \
    TVM_FFI_SAFE_CALL_END();                                                                    \
  }

// The same for a function that returns a bool.
#define JIT_KERNEL_EXPORT_QUESTION(name, count, function) \
  JIT_KERNEL_EXPORT_ANSWER(name, count, function, kTVMFFIBool)
