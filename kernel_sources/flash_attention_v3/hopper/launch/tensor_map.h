// Tensor maps for the copy engine, encoded on the host; params.h says how a sequence is addressed.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "flash_attention_v3/hopper/common/params.h"
#include "jit_kernel/cuda/driver.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::hopper {

// ABI of cuda.h: the enumerations are ints.
using EncodeTiled = cuda::Result(TensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*,
                                 const uint32_t*, const uint32_t*, int, int, int, int);
constexpr int kUint8 = 0, kFloat16 = 6, kBfloat16 = 9;  // CU_TENSOR_MAP_DATA_TYPE_*
constexpr int kSwizzle64 = 2, kSwizzle128 = 3;          // CU_TENSOR_MAP_SWIZZLE_*
constexpr int kPromote128 = 2;                          // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
constexpr int kRank = 5;
constexpr int64_t kBound = int64_t{1} << 30;  // rows of a map that does not bound a sequence itself
constexpr int64_t kWrap = int64_t{1} << 34;   // kBound * kWrap is 2^64: nothing, as an address
constexpr int64_t kMostPlaces = (int64_t{1} << 31) - 1;

// Strides in bytes of a (batch, row, head, column) or (row, head, column) tensor; 16 where a
// dimension of one element leaves them open.
struct ByteStrides {
  explicit ByteStrides(const tvm::ffi::TensorView& x) {
    const int64_t size = x.dtype().bits / 8;
    const auto stride = [&](int i) { return x.size(i) > 1 ? x.stride(i) * size : int64_t{16}; };
    row = stride(x.ndim() - 3);
    head = stride(x.ndim() - 2);
    batch = x.ndim() == 4 ? stride(0) : 0;
  }
  int64_t row, head, batch;
};

// How the base of a bounded map is moved to a sequence: in steps of the strides' common divisor.
struct Places {
  explicit Places(const tvm::ffi::TensorView& x) {
    const ByteStrides strides(x);
    unit = std::max<int64_t>(16, std::gcd(strides.row, strides.batch));
    batch_step = strides.batch / unit;
    row_step = strides.row / unit;
    const int64_t batch = x.ndim() == 4 ? x.size(0) : 1, length = x.size(x.ndim() - 3);
    reach_all = (batch - 1) * batch_step + (length + 1) * row_step <= kMostPlaces;
  }
  int64_t unit, batch_step, row_step;
  bool reach_all;  // whether there are enough of them for the tensor
};

inline int map_type(const tvm::ffi::TensorView& x) {
  if (x.dtype().bits == 8) return kUint8;
  return x.dtype().code == kDLBfloat ? kBfloat16 : kFloat16;
}

// A map of a tensor of 8- or 16-bit elements at `data`; steps in bytes, of the dimensions but the
// first.
inline void encode_tiled(TensorMap& map, const tvm::ffi::TensorView& x, void* data,
                         const uint64_t (&sizes)[kRank], const uint64_t (&steps)[kRank - 1],
                         const uint32_t (&box)[kRank]) {
  static EncodeTiled* const encode = cuda::driver_function<EncodeTiled>("cuTensorMapEncodeTiled");
  const uint32_t every[kRank] = {1, 1, 1, 1, 1};
  const int swizzle = box[0] * x.dtype().bits == 1024 ? kSwizzle128 : kSwizzle64;
  cuda::check(
      encode(&map, map_type(x), kRank, data, sizes, steps, box, every, 0, swizzle, kPromote128, 0),
      "cuTensorMapEncodeTiled");
}

// Fills `rows` for boxes of `box_rows` x `panel` elements. `bounded`: the kernel says where a
// sequence ends, by a length from the device or by what a tile of queries sees. A tensor without
// elements takes the address of `stand_in`: all of it is past the end and never read.
inline void encode_map(TensorRows& rows, const char* name, const tvm::ffi::TensorView& x, int panel,
                       int box_rows, bool bounded, const tvm::ffi::TensorView& stand_in) {
  const ByteStrides strides(x);
  const uint64_t columns = static_cast<uint64_t>(x.size(x.ndim() - 1));
  const uint64_t heads = static_cast<uint64_t>(x.size(x.ndim() - 2));
  const int64_t length = x.size(x.ndim() - 3);
  const int64_t batch = x.ndim() == 4 ? x.size(0) : 1;
  uint64_t sizes[kRank] = {columns, static_cast<uint64_t>(length), heads,
                           static_cast<uint64_t>(batch), 1};
  uint64_t steps[kRank - 1] = {static_cast<uint64_t>(strides.row),
                               static_cast<uint64_t>(strides.head),
                               static_cast<uint64_t>(x.ndim() == 4 ? strides.batch : 16), 16};
  rows.batch_step = 1;
  if (bounded) {
    const Places places(x);
    if (!places.reach_all) {
      TVM_FFI_THROW(ValueError) << name << " has strides of " << strides.batch
                                << " bytes a sequence and " << strides.row
                                << " a row; with lengths on the device their common "
                                   "divisor must reach all of the tensor in 2^31 steps";
    }
    sizes[1] = kBound;
    sizes[3] = kMostPlaces;
    sizes[4] = kBound + 1;
    steps[2] = static_cast<uint64_t>(places.unit);
    steps[3] = static_cast<uint64_t>(kWrap - strides.row);
    rows.bound = static_cast<int>(kBound);
    rows.batch_step = static_cast<int>(places.batch_step);
    rows.row_step = static_cast<int>(places.row_step);
    rows.wrap = static_cast<int>(kBound);
  }
  const uint32_t box[kRank] = {static_cast<uint32_t>(panel), static_cast<uint32_t>(box_rows), 1, 1,
                               1};
  encode_tiled(rows.map, x, length * batch > 0 ? cuda::data_of(x) : cuda::data_of(stand_in), sizes,
               steps, box);
}

}  // namespace jit_kernel::hopper
