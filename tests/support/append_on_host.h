// The Hopper append kernel and its launcher, compiled for the CPU: names that nvcc and the driver
// give, then the sources as they are. A launch runs every thread of every block, one by one.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define __device__
#define __forceinline__ inline

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __int_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}
inline uint64_t __cvta_generic_to_shared(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

// In place of the driver.
#define JIT_KERNEL_CUDA_DRIVER_H_
namespace jit_kernel::cuda {
struct Grid {
  unsigned x;
};
struct Kernel {
  int element;  // 0: fp16, 1: bf16, 2: e4m3
  bool quantises;
  void launch_overlapped(int device, Grid grid, unsigned cluster, void** params);
};
}  // namespace jit_kernel::cuda

#include "flash_attention_v3/hopper/append/place.cuh"
#include "flash_attention_v3/hopper/append/rotary.cuh"

// Elements whose conversions are none of the GPU's instructions.
namespace jit_kernel {
struct host_bf16 {};
struct host_fp16 {};
struct host_e4m3 {};
template <>
constexpr bool kIsBf16<host_bf16> = true;
template <>
inline u32 pack<host_bf16>(float low, float high) {
  const auto rounded = [](float x) {  // to nearest, ties to even
    const u32 bits = same_bits<u32>(x);
    return x != x ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}
// 127 numbers of each sign, in the order of their codes, then NaN.
inline float e4m3_value(u32 code) {
  if (code == 0x7f) return NAN;
  const int exponent = code >> 3 ? static_cast<int>(code >> 3) - 7 : -6;
  const float fraction = static_cast<float>((code & 7) + (code >> 3 ? 8 : 0)) / 8;
  return std::ldexp(fraction, exponent);
}
// To nearest even.
inline u32 e4m3_of(float x) {
  const u32 sign = same_bits<u32>(x) >> 31 << 7;
  const float size = x < 0 ? -x : x;
  if (size != size) return 0x7f;
  if (size >= e4m3_value(0x7e)) return sign | 0x7e;
  u32 below = 0;
  while (e4m3_value(below + 1) <= size) ++below;
  const float to_below = size - e4m3_value(below), to_above = e4m3_value(below + 1) - size;
  const bool up = to_above < to_below || (to_above == to_below && below % 2 == 1);
  return sign | (below + up);
}
template <>
inline u32 pack_e4m3<host_bf16>(float low, float high) {
  return e4m3_of(low) | e4m3_of(high) << 8;
}
template <>
inline u32 pack_e4m3<host_fp16>(float low, float high) {
  return pack_e4m3<host_bf16>(low, high);
}
template <>
inline u32 pack<host_fp16>(float low, float high) {
  const auto rounded = [](float x) {
    return static_cast<u32>(same_bits<uint16_t>(static_cast<_Float16>(x)));
  };
  return rounded(low) | rounded(high) << 16;
}
template <>
inline u32 pack_e4m3<host_e4m3>(float low, float high) {
  return pack_e4m3<host_bf16>(low, high);
}
namespace hopper {
template <>
constexpr bool kIsE4m3<host_e4m3> = true;
template <>
inline float low_of<host_fp16>(u32 word) {
  return static_cast<float>(same_bits<_Float16>(static_cast<uint16_t>(word)));
}
template <>
inline float low_of<host_e4m3>(u32 word) {
  return low_of<host_fp16>(word);
}
template <>
inline u32 two_halves<host_e4m3>(u32 bytes) {
  u32 halves = 0;
  for (int i = 0; i < 2; ++i) {
    const u32 code = bytes >> (8 * i) & 0xff;
    const auto half = static_cast<_Float16>((code & 0x80 ? -1 : 1) * e4m3_value(code & 0x7f));
    halves |= static_cast<u32>(same_bits<uint16_t>(half)) << (16 * i);
  }
  return halves;
}
}  // namespace hopper
}  // namespace jit_kernel

#include "flash_attention_v3/hopper/append/append.cuh"
#include "flash_attention_v3/hopper/launch/append_launch.h"

inline void jit_kernel::cuda::Kernel::launch_overlapped(int, Grid grid, unsigned,
                                                        void** arguments) {
  const auto& params = *static_cast<const hopper::AppendParams*>(arguments[0]);
  for (unsigned block = 0; block < grid.x; ++block) {
    for (unsigned thread = 0; thread < hopper::kAppendThreads; ++thread) {
      if (element == 2) {
        hopper::append_rows<host_e4m3, false>(params, block, thread);
      } else if (quantises) {
        element == 1 ? hopper::append_rows<host_bf16, true>(params, block, thread)
                     : hopper::append_rows<host_fp16, true>(params, block, thread);
      } else {
        element == 1 ? hopper::append_rows<host_bf16, false>(params, block, thread)
                     : hopper::append_rows<host_fp16, false>(params, block, thread);
      }
    }
  }
}

inline int64_t load(int64_t element, bool quantises) {
  using jit_kernel::cuda::Kernel;
  return jit_kernel::cuda::KernelTable<Kernel>::get().add(
      std::make_unique<Kernel>(Kernel{static_cast<int>(element), quantises}));
}

inline int64_t quotient(int64_t number, int64_t divisor) {
  return jit_kernel::hopper::divide(static_cast<unsigned>(number),
                                    jit_kernel::hopper::divisor_of(divisor));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load, load);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quotient, quotient);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, jit_kernel::hopper::append);
