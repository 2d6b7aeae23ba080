// Operands of wgmma from shared memory into registers.
#pragma once

#include "flash_attention_v3/hopper/common/warpgroups.h"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

// The first kSteps * 16 columns of this warpgroup's 64 rows as wgmma's register operand, from
// panels of kPanel columns at `base` as the copy engine swizzled them.
template <int kSteps, int kPanel, int kCount>
__device__ __forceinline__ void load_fragments(u32 (&fragments)[kCount], u32 base) {
  constexpr int kSwizzle = 2 * kPanel;
  const int lane = threadIdx.x % 32;
  const int row = first_row_of_warp() + lane % 16;
  const int swizzled = kPanel == 64 ? row % 8 : row / 2 % 4;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = i * 16 % kPanel / 8 + lane / 16;  // in units of 16 bytes
    const u32 address = base + i * 16 / kPanel * kRowsPerWarpgroup * kSwizzle + row * kSwizzle +
                        (column ^ swizzled) * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[4 * i]), "=r"(fragments[4 * i + 1]), "=r"(fragments[4 * i + 2]),
                   "=r"(fragments[4 * i + 3])
                 : "r"(address)
                 : "memory");
  }
}

}  // namespace jit_kernel::hopper
