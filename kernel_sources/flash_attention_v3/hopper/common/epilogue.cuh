// Pieces of an epilogue: the sink's exponent, and rows as 16-byte stores.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"
#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/math.cuh"

namespace jit_kernel::hopper {

// Half, so that the product of no finite sink is infinite.
template <class Element, class Params>
__device__ __forceinline__ float half_sink_log2(const Params& params, int head) {
  if (params.sinks == nullptr) return minus_infinity();
  const float sink = params.sinks_are_elements ? load_element<Element>(params.sinks, head)
                                               : static_cast<const float*>(params.sinks)[head];
  const float kHalfLog2E = 0.721347520444f;
  return __fmul_rn(sink, kHalfLog2E);  // a product within a difference would leave its rounding
}

// 16 bytes, predicated: a branch would end the overlap of the code before and after.
__device__ __forceinline__ void store_16_if(void* destination, const u32 (&words)[4], bool stores) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::
          "l"(destination),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(static_cast<u32>(stores))
      : "memory");
}

// Transposes 4 x 4 words over the four threads of a row: thread t gets word t of each thread, in
// their order. So each thread holds 8 neighbouring columns, 16 bytes, in place of 2 columns of four
// groups.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4], int thread) {
  const bool odd = thread & 1;
  const bool high = thread & 2;
  const u32 from_0 = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
  const u32 from_1 = __shfl_xor_sync(0xffffffffu, odd ? words[2] : words[3], 1);
  const u32 a[2] = {odd ? from_0 : words[0], odd ? words[1] : from_0};
  const u32 b[2] = {odd ? from_1 : words[2], odd ? words[3] : from_1};
  const u32 got_0 = __shfl_xor_sync(0xffffffffu, high ? a[0] : b[0], 2);
  const u32 got_1 = __shfl_xor_sync(0xffffffffu, high ? a[1] : b[1], 2);
  words[0] = high ? got_0 : a[0];
  words[1] = high ? got_1 : a[1];
  words[2] = high ? b[0] : got_0;
  words[3] = high ? b[1] : got_1;
}

}  // namespace jit_kernel::hopper
