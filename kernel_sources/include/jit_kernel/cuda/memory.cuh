// 16 bytes of memory at a time.
#pragma once

#include "jit_kernel/cuda/mbarrier.cuh"

namespace jit_kernel {

__device__ __forceinline__ void store_16(float* destination, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}

// From the L2 cache: what other multiprocessors wrote in the same launch.
__device__ __forceinline__ float4 load_16(const float* source) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

// 16 bytes of shared memory.
__device__ __forceinline__ void load_16_shared(u32 (&words)[4], u32 address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_16_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

}  // namespace jit_kernel
