// e4m3 to 16 bits, exactly: both hold every one of its numbers.
#pragma once

#include "jit_kernel/cuda/element.cuh"

namespace jit_kernel {

// The first and the second pair of four e4m3 as fp16.
struct HalvesOfWord {
  u32 low, high;
};
__device__ __forceinline__ HalvesOfWord widen(u32 word) {
  HalvesOfWord halves;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\n"
      "cvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(halves.low), "=r"(halves.high)
      : "r"(word));
  return halves;
}

// Two of them, from fp16.
template <class Element>
__device__ __forceinline__ u32 from_halves(u32 halves) {
  if constexpr (!kIsBf16<Element>) return halves;
  float low, high;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  return pack<bf16>(low, high);
}

}  // namespace jit_kernel
