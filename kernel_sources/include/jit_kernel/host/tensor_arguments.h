// The arguments of an exported function, by tvm-ffi's C interface alone: its C++ headers take 1.7 s
// of every library's compilation, and the functions of a small kernel need none of them.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace jit_kernel {

class TensorArguments {
 public:
  TensorArguments(const char* function, const TVMFFIAny* values, int32_t count, int32_t expected)
      : function_(function), values_(values) {
    if (count == expected) return;
    throw std::invalid_argument(function_ + " takes " + std::to_string(expected) +
                                " arguments, not " + std::to_string(count));
  }

  const DLTensor& tensor() {
    const DLTensor* found = maybe_tensor();
    if (!found) refuse("a tensor", next_ - 1);
    return *found;
  }
  // Null for None.
  const DLTensor* maybe_tensor() {
    const TVMFFIAny& value = values_[next_++];
    if (value.type_index == kTVMFFINone) return nullptr;
    if (value.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(value.v_ptr);
    if (value.type_index != kTVMFFITensor) refuse("a tensor or None", next_ - 1);
    // A managed tensor's DLTensor lies behind the header of its object.
    return reinterpret_cast<const DLTensor*>(reinterpret_cast<const char*>(value.v_obj) +
                                             sizeof(TVMFFIObject));
  }
  int64_t integer() {
    const TVMFFIAny& value = values_[next_++];
    if (value.type_index != kTVMFFIInt && value.type_index != kTVMFFIBool) {
      refuse("an integer", next_ - 1);
    }
    return value.v_int64;
  }
  bool boolean() { return integer() != 0; }
  float number() {
    const TVMFFIAny& value = values_[next_++];
    if (value.type_index == kTVMFFIInt) return static_cast<float>(value.v_int64);
    if (value.type_index != kTVMFFIFloat) refuse("a number", next_ - 1);
    return static_cast<float>(value.v_float64);
  }

 private:
  [[noreturn]] void refuse(const char* what, int32_t index) const {
    throw std::invalid_argument(function_ + ": argument " + std::to_string(index) + " is not " +
                                what);
  }

  const std::string function_;
  const TVMFFIAny* values_;
  int32_t next_ = 0;
};

// Runs function(arguments) and hands an exception on to Python: out_of_range as an IndexError.
template <class Function>
inline int call_with_arguments(const char* name, const TVMFFIAny* values, int32_t count,
                               int32_t expected, Function&& function) {
  try {
    TensorArguments arguments(name, values, count, expected);
    function(arguments);
    return 0;
  } catch (const std::out_of_range& error) {
    TVMFFIErrorSetRaisedFromCStr("IndexError", error.what());
  } catch (const std::invalid_argument& error) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", error.what());
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
  }
  return -1;
}

}  // namespace jit_kernel

// Exports function(TensorArguments&) as `name`, which takes `count` arguments and returns nothing.
#define JIT_KERNEL_EXPORT_PLAIN(name, count, function)                           \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name(        \
      void*, const TVMFFIAny* values, int32_t n, TVMFFIAny* result) {            \
    result->type_index = kTVMFFINone;                                            \
    result->zero_padding = 0;                                                    \
    result->v_int64 = 0;                                                         \
    return ::jit_kernel::call_with_arguments(#name, values, n, count, function); \
  }
