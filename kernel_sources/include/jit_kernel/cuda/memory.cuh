// 16 bytes of global memory at a time.
#pragma once

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

}  // namespace jit_kernel
