// Tensors and numbers of a call that nobody has checked: what a library that looks at them itself
// asks of each. It may decline any call: then Python checks, and names the argument.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <limits>

namespace jit_kernel {

using tvm::ffi::TensorView;

// What Python's checks allow (fa3/checks/values.py); a test compares them.
constexpr double kLargestNumber = 3.4e38, kSmallestNumber = 1.2e-38;
constexpr int64_t kMostSplits = 256;
constexpr int64_t kMostIndex = std::numeric_limits<int32_t>::max();
// The address of a tensor without memory is its offset into a storage that it has not, and below
// this one.
constexpr uintptr_t kSureAddress = uintptr_t{1} << 44;
constexpr DLDataType kIndexType = {kDLInt, 32, 1};

inline bool is_number(double x) { return x >= kSmallestNumber && x <= kLargestNumber; }

// In memory of this device, of this type and number of dimensions, none of them empty. Tensors of
// torch's transforms and wrappers have no memory, and an address that is their offset into none.
inline bool is_strided(const TensorView& t, DLDevice device, uintptr_t lowest, DLDataType dtype,
                       int32_t dims) {
  if (t.device().device_type != device.device_type || t.device().device_id != device.device_id ||
      t.ndim() != dims) {
    return false;
  }
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) < lowest) return false;
  if (t.dtype().code != dtype.code || t.dtype().bits != dtype.bits || t.dtype().lanes != 1) {
    return false;
  }
  for (int32_t i = 0; i < dims; ++i) {
    if (t.size(i) < 1 || t.size(i) > kMostIndex) return false;
  }
  return true;
}

// The same, with unit stride in the last dimension.
inline bool is_dense(const TensorView& t, DLDevice device, uintptr_t lowest, DLDataType dtype,
                     int32_t dims) {
  return is_strided(t, device, lowest, dtype, dims) &&
         (t.stride(dims - 1) == 1 || t.size(dims - 1) == 1);
}

// The same sizes in all dimensions but the last.
inline bool have_same_rows(const TensorView& a, const TensorView& b) {
  for (int32_t i = 0; i + 1 < b.ndim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// The range of addresses from the first byte of a tensor to behind its last.
struct Extent {
  const char* begin;
  const char* end;
};

inline Extent extent_of(const TensorView& t) {
  const char* begin = static_cast<const char*>(t.data_ptr()) + t.byte_offset();
  int64_t last = 0;
  for (int32_t i = 0; i < t.ndim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * (t.dtype().bits / 8)};
}

// Unless each stride, from the smallest up, leaves everything below it behind, as in every slice of
// a dense tensor. Python looks at the rest.
inline bool may_overlap_itself(const TensorView& t) {
  for (int64_t reach = 0, below = -1;;) {
    int32_t next = -1;
    for (int32_t i = 0; i < t.ndim(); ++i) {
      if (t.size(i) < 2 || t.stride(i) <= below) continue;
      if (next >= 0 && t.stride(i) == t.stride(next)) return true;
      if (next < 0 || t.stride(i) < t.stride(next)) next = i;
    }
    if (next < 0) return false;
    below = t.stride(next);
    if (below <= reach) return true;
    reach += (t.size(next) - 1) * below;
  }
}

inline bool are_apart(const Extent& a, const Extent& b) {
  return a.end <= b.begin || b.end <= a.begin;
}

}  // namespace jit_kernel
