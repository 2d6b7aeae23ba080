// Of 64 rows and an e4m3 cache: a consumer warpgroup converts the keys that it scores, in place.
//
// A row of 128 columns in e4m3 is as long as its second 64 columns are in fp16. So it is loaded to
// where those belong, under the same swizzle, and a warp that has read some rows whole overwrites
// them: no other row is touched.
#pragma once

#include "flash_attention_v3/hopper/decode/e4m3.cuh"
#include "flash_attention_v3/hopper/mla/shared_memory.cuh"

namespace jit_kernel::hopper {

// 16 bytes, which a row's other lanes have read as well, to the 32 that they stand for: two pieces,
// of which `place` is the first one's place before the swizzle of the row.
__device__ __forceinline__ void store_converted(const u32 (&bytes)[4], u32 row, int place,
                                                int swizzled) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const HalvesOfWord first = widen(bytes[2 * i]), second = widen(bytes[2 * i + 1]);
    asm volatile(
        "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(row + ((place + i) ^ swizzled) * 16),
        "r"(first.low), "r"(first.high), "r"(second.low), "r"(second.high)
        : "memory");
  }
}

// By a warpgroup: two panels from `low` on. A warp has every fourth four rows; lanes 8 i to 8 i + 7
// have four pieces of a row and the other four of the next one, so that their loads, and their
// stores to either panel, are in different banks.
__device__ __forceinline__ void convert_pair(u32 low) {
  constexpr int kSteps = kMlaKeys / 16;
  const int thread = thread_of_block(), lane = thread % 32;
  const int upper = lane / 4 % 2, side = lane / 8 % 2 ^ upper, piece = lane % 4;
  const int row = thread / 32 * 4 + lane / 16 * 2 + upper, swizzled = row % 8;
  const u32 from = low + kMlaBytesPanel + row * 128 + ((piece + 4 * side) ^ swizzled) * 16;
  const u32 to = low + side * kMlaBytesPanel + row * 128;
  u32 bytes[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) load_shared(bytes[i], from + i * 16 * 128);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    store_converted(bytes[i], to + i * 16 * 128, 2 * piece, swizzled);
  }
}

// The panel of k, whose rows in e4m3 are half as long.
__device__ __forceinline__ void convert_k(u32 panel) {
  const int thread = thread_of_block(), piece = thread % 4, swizzled = thread % 32 / 4;
  const u32 row = panel + (thread / 32 * 8 + swizzled) * 128;
  u32 bytes[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    load_shared(bytes[i], row + i * 32 * 128 + (piece ^ swizzled) * 16);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) store_converted(bytes[i], row + i * 32 * 128, 2 * piece, swizzled);
}

}  // namespace jit_kernel::hopper
