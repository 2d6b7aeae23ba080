// Arguments of a call as cuLaunchKernel wants them, checked against a kernel's own parameters.
#ifndef JIT_KERNEL_CUDA_PACKED_ARGUMENTS_H_
#define JIT_KERNEL_CUDA_PACKED_ARGUMENTS_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::cuda {

constexpr int kMaxArguments = 96;

// A kernel's parameters, a letter each: how it is passed and, of a pointer, what it points to, in
// the letters of entry_table.cuh. `elements`, and with commas between `sizes` and `names`, may be
// empty.
struct Signature {
  std::string title, types, elements, sizes, names;

  char element(size_t index) const { return index < elements.size() ? elements[index] : '*'; }

  size_t size(size_t index) const {
    const std::string text = part(sizes, index);
    return text.empty() ? 0 : std::stoul(text);
  }

  // "argument 2, weight," or "argument 2".
  std::string argument(size_t index) const {
    const std::string name = part(names, index);
    return "argument " + std::to_string(index) + (name.empty() ? "" : ", " + name + ",");
  }

 private:
  static std::string part(const std::string& list, size_t index) {
    std::istringstream rest(list);
    std::string found;
    for (size_t i = 0; i <= index; ++i) {
      if (!std::getline(rest, found, ',')) found.clear();
    }
    return found;
  }
};

inline const DLTensor* tensor_of(const TVMFFIAny& value) {
  if (value.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(value.v_ptr);
  if (value.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(value.v_obj);
  return nullptr;
}

// Whether a tensor's elements are those that a parameter points to. Integers are told by their
// size alone: words serve as bits, too.
inline bool are_elements(DLDataType dtype, char letter) {
  const auto is = [&](int code, int bits) {
    return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
  };
  switch (letter) {
    case 'f':
      return is(kDLFloat, 32);
    case 'd':
      return is(kDLFloat, 64);
    case 'h':
      return is(kDLFloat, 16);
    case 'b':
      return is(kDLBfloat, 16);
    case '8':
      return is(kDLFloat8_e4m3fn, 8);
    case '9':
      return is(kDLFloat8_e5m2, 8);
    case 'i':
      return is(kDLInt, 32) || is(kDLUInt, 32);
    case 'l':
      return is(kDLInt, 64) || is(kDLUInt, 64);
    default:
      return true;
  }
}

inline const char* words_of(char type, char element) {
  switch (type == 'p' ? element : type) {
    case 'f':
      return type == 'p' ? "a float32 tensor on CUDA" : "a float";
    case 'd':
      return type == 'p' ? "a float64 tensor on CUDA" : "a float";
    case '?':
      return "a bool";
    case '8':
      return "a float8_e4m3fn tensor on CUDA";
    case '9':
      return "a float8_e5m2 tensor on CUDA";
    case '*':
      return "a tensor on CUDA, or None";
    default:
      break;
  }
  if (type != 'p') return "an int";
  return element == 'h'   ? "a float16 tensor on CUDA"
         : element == 'b' ? "a bfloat16 tensor on CUDA"
         : element == 'i' ? "an int32 tensor on CUDA"
                          : "an int64 tensor on CUDA";
}

class PackedArguments {
 public:
  PackedArguments(const Signature& signature, const TVMFFIAny* values, int count)
      : signature_(signature) {
    if (static_cast<size_t>(count) != signature.types.size()) {
      TVM_FFI_THROW(TypeError) << signature.title << ": " << count
                               << " kernel arguments; it must be " << signature.types.size()
                               << (signature.names.empty() ? "" : ": " + signature.names);
    }
    for (int i = 0; i < count; ++i) {
      add(values[i], signature.types[static_cast<size_t>(i)], static_cast<size_t>(i));
    }
    for (int i = count; i < count + 2; ++i) {  // Triton's scratch
      values_[i].pointer = nullptr;
      pointers_[i] = &values_[i];
    }
  }

  // Of the first tensor.
  int device() const {
    if (device_ < 0) {
      TVM_FFI_THROW(TypeError) << signature_.title
                               << ": no argument is a tensor, and the stream is that of the first "
                                  "tensor's device; it must be given at least one";
    }
    return device_;
  }
  void** data() { return pointers_; }

 private:
  union Value {
    void* pointer;
    int64_t wide;
    float real;
    double precise;
  };

  void add(const TVMFFIAny& value, char type, size_t index) {
    Value& slot = values_[index];
    pointers_[index] = &slot;
    if (type == 'p') {
      slot.pointer = address(value, index);
    } else if (type == 'f' || type == 'd') {
      const bool whole = value.type_index == kTVMFFIInt;
      if (!whole && value.type_index != kTVMFFIFloat) refuse(value, index);
      const double number = whole ? static_cast<double>(value.v_int64) : value.v_float64;
      if (type == 'f') slot.real = static_cast<float>(number);
      if (type == 'd') slot.precise = number;
    } else if (type == 'x') {
      pointers_[index] = bytes_of(value, index);
    } else if (type == '?') {
      if (value.type_index != kTVMFFIBool) refuse(value, index);
      slot.wide = value.v_int64 != 0;  // all bytes, for a kernel of Triton's reads one too
    } else {
      if (value.type_index != kTVMFFIInt) refuse(value, index);
      slot.wide = value.v_int64;  // little-endian: the first bytes are those of the narrow ones
      if (!fits(value.v_int64, type)) {
        fail(index, std::to_string(value.v_int64) +
                        (type == 'L' ? ", which is negative"
                                     : ", an int that " + bits(type) + " cannot hold"));
      }
    }
  }

  void* address(const TVMFFIAny& value, size_t index) {
    if (value.type_index == kTVMFFINone) return nullptr;
    const DLTensor* const tensor = tensor_of(value);
    if (tensor == nullptr) refuse(value, index);
    if (tensor->device.device_type != kDLCUDA) fail(index, "a tensor that is not on CUDA");
    if (device_ < 0) device_ = tensor->device.device_id;
    if (tensor->device.device_id != device_) {
      fail(index, "a tensor on cuda:" + std::to_string(tensor->device.device_id) +
                      ", and the first is on cuda:" + std::to_string(device_));
    }
    if (!are_elements(tensor->dtype, signature_.element(index))) {
      const tvm::ffi::String dtype = tvm::ffi::DLDataTypeToString(tensor->dtype);
      fail(index, "a tensor of " + std::string(dtype));
    }
    return data_of(*tensor);
  }

  // The driver copies them as they lie there.
  void* bytes_of(const TVMFFIAny& value, size_t index) const {
    TVMFFIByteArray found{nullptr, 0};
    if (value.type_index == kTVMFFIByteArrayPtr) {
      found = *static_cast<const TVMFFIByteArray*>(value.v_ptr);
    } else if (value.type_index == kTVMFFISmallBytes) {
      found = {value.v_bytes, value.small_str_len};
    } else if (value.type_index == kTVMFFIBytes) {
      found = *TVMFFIBytesGetByteArrayPtr(value.v_obj);
    } else {
      refuse(value, index);
    }
    if (found.size != signature_.size(index)) fail(index, std::to_string(found.size) + " bytes");
    return const_cast<char*>(found.data);
  }

  static bool fits(int64_t value, char type) {
    switch (type) {
      case 'b':
        return value == static_cast<int8_t>(value);
      case 'B':
        return value == static_cast<uint8_t>(value);
      case 'h':
        return value == static_cast<int16_t>(value);
      case 'H':
        return value == static_cast<uint16_t>(value);
      case 'i':
        return value == static_cast<int32_t>(value);
      case 'I':
        return value == static_cast<uint32_t>(value);
      case 'L':
        return value >= 0;
      default:
        return true;
    }
  }

  static std::string bits(char type) {
    const char low = static_cast<char>(type | 0x20);
    return (type < 'a' ? std::string("unsigned ") : std::string()) +
           (low == 'b'   ? "8"
            : low == 'h' ? "16"
                         : "32") +
           " bits";
  }

  [[noreturn]] void refuse(const TVMFFIAny& value, size_t index) const {
    const char* what = "of another type";
    switch (value.type_index) {
      case kTVMFFINone:
        what = "None";
        break;
      case kTVMFFIInt:
        what = "an int";
        break;
      case kTVMFFIBool:
        what = "a bool";
        break;
      case kTVMFFIFloat:
        what = "a float";
        break;
      default:
        if (tensor_of(value) != nullptr) what = "a tensor";
    }
    fail(index, what);
  }

  [[noreturn]] void fail(size_t index, const std::string& what) const {
    const char type = signature_.types[index];
    TVM_FFI_THROW(TypeError) << signature_.title << ": " << signature_.argument(index) << " is "
                             << what << "; it must be "
                             << (type == 'x'
                                     ? "bytes of length " + std::to_string(signature_.size(index))
                                     : words_of(type, signature_.element(index)));
    __builtin_unreachable();
  }

  const Signature& signature_;
  Value values_[kMaxArguments + 2];
  void* pointers_[kMaxArguments + 2];
  int device_ = -1;
};

}  // namespace jit_kernel::cuda

#endif  // JIT_KERNEL_CUDA_PACKED_ARGUMENTS_H_
