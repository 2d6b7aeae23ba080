// Online softmax of a tile that two consumer warpgroups share: each has the scores of every second
// 64 keys, and half of the output's columns. A thread holds two rows, as in common/softmax.cuh.
//
// Each row has a reference in units of scores, which is raised only where a score exceeds it by
// more than 2^8 (decode/softmax.cuh): a row's numbers depend on its own scores alone.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/decode/epilogue.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

// The largest score of each of a thread's rows.
__device__ __forceinline__ void find_tops(const float (&scores)[32], float (&tops)[2]) {
  tops[0] = largest_score(scores, 0);
  tops[1] = largest_score(scores, 1);
}

// References that are too low are raised; factors of what was summed with the ones before.
__device__ __forceinline__ void raise_rows(const float (&tops)[2], float scale,
                                           float (&references)[2], float (&factors)[2]) {
  const float threshold = fminf(kRescaleThreshold / scale, kLargestFloat);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = references[r];
    const bool grows = tops[r] > before + threshold;
    factors[r] = grows ? exp2_fast((before - tops[r]) * scale) : 1.f;
    references[r] = grows ? tops[r] : before;
  }
}

// Scores become probabilities; adds them to `sums`.
__device__ __forceinline__ void exponentiate_rows(float (&scores)[32], const float (&references)[2],
                                                  float scale, float (&sums)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float base = base_of(references[r]);
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& a = scores[4 * i + 2 * r];
      float& b = scores[4 * i + 2 * r + 1];
      a = probability(a, base, scale);
      b = probability(b, base, scale);
      even += a;
      odd += b;
    }
    sums[r] += even + odd;
  }
}

// One 16-column step of a first operand of wgmma, of probabilities times their rows' factors.
template <class Element>
__device__ __forceinline__ void pack_step(const float (&values)[32], int step,
                                          const float (&factors)[2], u32 (&packed)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float factor = factors[i % 2];
    packed[i] =
        pack<Element>(values[8 * step + 2 * i] * factor, values[8 * step + 2 * i + 1] * factor);
  }
}

// A step to shared memory, where the other warpgroup's products find it: 128-byte swizzle.
__device__ __forceinline__ void store_step(u32 base, int step, const u32 (&packed)[4]) {
  const int lane = threadIdx.x % 32;
  const int row = first_row_of_warp() + lane % 16;
  const u32 address = base + row * 128 + ((2 * step + lane / 16) ^ (row % 8)) * 16;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
               : "memory");
}

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&output)[kCount], const float (&factors)[2]) {
  if (!__any_sync(0xffffffffu, factors[0] != 1.f || factors[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) output[i] *= factors[i / 2 % 2];
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

}  // namespace jit_kernel::hopper
