// 16-bit element types: which there are, to and from float32.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

// Element types of the inputs; the kernels only move, multiply and pack them.
struct bf16 {};
struct fp16 {};
template <class Element>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Two float32 to one register of two elements, the first in the low half.
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

template <class Element>
__device__ __forceinline__ float load_element(const void* pointer, int index) {
  const u32 bits = static_cast<const unsigned short*>(pointer)[index];
  float value;
  if constexpr (kIsBf16<Element>) return __int_as_float(bits << 16);
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(bits));
  return value;
}

}  // namespace jit_kernel
