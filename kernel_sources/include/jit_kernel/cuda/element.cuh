// Element types to and from float32.
#pragma once

#include "jit_kernel/cuda/element_types.h"
#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

template <class Element>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Two float32 to one register of two 16-bit elements, the first in the low half.
template <class Element>
__device__ __forceinline__ u32 pack(float low, float high);

template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ u32 pack<fp16>(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Two float32 to two e4m3 in the low half of a register, to nearest even; what is too large becomes
// the largest number. Element: of the kernel, which may be compiled for another machine.
template <class Element>
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four float32 to one register of e4m3, the first in the lowest byte; larger ones become 448.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u32 packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

template <class Element>
__device__ __forceinline__ float load_element(const void* pointer, int index) {
  const u32 bits = static_cast<const unsigned short*>(pointer)[index];
  float value;
  if constexpr (kIsBf16<Element>) return __int_as_float(bits << 16);
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(bits));
  return value;
}

template <>
__device__ __forceinline__ float load_element<e4m3>(const void* pointer, int index) {
  const u32 bits = static_cast<const unsigned char*>(pointer)[index];
  float value;  // by way of fp16, which holds every e4m3
  asm("{\n.reg .b16 pair, low, high;\n.reg .b32 halves;\ncvt.u16.u32 pair, %1;\n"
      "cvt.rn.f16x2.e4m3x2 halves, pair;\nmov.b32 {low, high}, halves;\ncvt.f32.f16 %0, low;\n}"
      : "=f"(value)
      : "r"(bits));
  return value;
}

}  // namespace jit_kernel
