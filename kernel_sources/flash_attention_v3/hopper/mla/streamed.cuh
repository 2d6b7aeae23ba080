// Up to 32 packed query rows over an e4m3 cache: keys and values as register operands in fp16,
// converted by the consumers as in decode/, in the order of decode/e4m3.cuh.
//
// Shared memory holds e4m3 alone: two buffers of 64 keys for each warpgroup, of which one is on its
// way. Converted by others, each byte would pass through shared memory six times in place of three.
#pragma once

#include "flash_attention_v3/hopper/mla/swapped.cuh"

namespace jit_kernel::hopper {

// The columns of a panel of this warp's 16 keys: piece 4 m + lane % 4 of a row, and of the row
// eight behind.
template <class C>
__device__ __forceinline__ void MlaSwapped<C>::load_keys_of(RawKeys& raw, int panel) {
  if (panel % 2 == 0) mbarrier_wait(shared.full(buffer(), panel / 2), parity());
  const int row = first_key(), piece = panel % 2 * 4 + threadIdx.x % 4;
  const u32 from = shared.keys(buffer(), panel / 2) + row * 128 + (piece ^ (row % 8)) * 16;
  load_shared(raw[0], from);
  load_shared(raw[1], from + 8 * 128);
}

__device__ __forceinline__ void widen_keys(u32 (&keys)[4][4], const u32 (&raw)[2][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const HalvesOfWord a = widen(raw[0][j]), b = widen(raw[1][j]);
    keys[j][0] = a.low;
    keys[j][1] = b.low;
    keys[j][2] = a.high;
    keys[j][3] = b.high;
  }
}

// Whether there are registers for what is loaded ahead, and for values of two steps.
template <class C>
constexpr bool kStreamsAhead = C::kRows * C::kPanelsV <= 128;

// A panel is converted, and the next one loaded, while the one before is multiplied.
template <class C>
__device__ __forceinline__ void MlaSwapped<C>::multiply_scores_streamed() {
  const u32 q = wgmma_descriptor_low(shared.queries(0), 16);
  constexpr bool kAhead = kStreamsAhead<C>;
  RawKeys raw[2];
  Keys keys[2];
  pin_registers(scores);
  if (kAhead) load_keys_of(raw[0], 0);
#pragma unroll
  for (int i = 0; i < C::kPanels; ++i) {
    if (kAhead && i + 1 < C::kPanels) load_keys_of(raw[(i + 1) % 2], i + 1);
    if (i >= 2) wgmma_wait<1>();
    if (!kAhead) load_keys_of(raw[i % 2], i);
    widen_keys(keys[i % 2], raw[i % 2]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32(&of)[4] = keys[i % 2][j];
      wgmma_rs<Element, false>(scores, of[0], of[1], of[2], of[3],
                               wgmma_descriptor<128>(q + (i * C::kBytesPanelQ + j * 32 >> 4)),
                               i + j != 0);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  pin_registers(scores);
#pragma unroll
  for (int i = 0; i < kQueries; i += 2) {
    const float2 factor =
        *reinterpret_cast<const float2*>(shared.score_factors() + i / 2 * 8 + threadIdx.x % 4 * 2);
    scores[2 * i] *= factor.x;
    scores[2 * i + 1] *= factor.y;
    scores[2 * i + 2] *= factor.x;
    scores[2 * i + 3] *= factor.y;
  }
}

// Values of 16 keys. A thread has dv / 32 neighbouring columns of four keys; columns 2 i and 2 i +
// 1 of them are its two rows of panel i.
template <class C>
__device__ __forceinline__ void MlaSwapped<C>::load_values_of(RawValues& raw, int step) {
  constexpr int kColumns = C::kHeadDimV / 32;
  const int thread = thread_of_block(), lane = thread % 32;
  const int key = lane % 4 * 2, other = key_of_row(key + 1);
  const int column = thread / 32 * (C::kHeadDimV / 4) + lane / 4 * kColumns;
  const u32 tile = shared.keys(buffer(), column / 128) + step * 16 * 128 + column % 16;
  const u32 first = tile + key * 128 + ((column % 128 / 16) ^ (key % 8)) * 16;
  const u32 second = tile + other * 128 + ((column % 128 / 16) ^ (other % 8)) * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_shared(raw[half][0], first + half * 8 * 128);
    load_shared(raw[half][1], second + half * 8 * 128);
  }
}

template <int kPanels, int kWords>
__device__ __forceinline__ void widen_values(u32 (&values)[kPanels][4],
                                             const u32 (&raw)[2][2][kWords]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const HalvesOfWord keys = widen(
          __byte_perm(raw[half][0][i / 2], raw[half][1][i / 2], i % 2 == 0 ? 0x5140 : 0x7362));
      values[i][2 * half] = keys.low;
      values[i][2 * half + 1] = keys.high;
    }
  }
}

template <class C>
__device__ __forceinline__ void MlaSwapped<C>::multiply_values_streamed() {
  constexpr int kSteps = kMlaKeys / 16, kSets = kStreamsAhead<C> ? 2 : 1;
  const u32 p = wgmma_descriptor_low(decode().p(stream, probabilities), 16);
  RawValues raw[kSets];
  Values values[kSets];
  if (kSets > 1) load_values_of(raw[0], 0);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (kSets > 1 && i + 1 < kSteps) load_values_of(raw[(i + 1) % kSets], i + 1);
    if (i >= kSets) wgmma_wait<kSets - 1>();
    if (kSets == 1) load_values_of(raw[0], i);
    widen_values(values[i % kSets], raw[i % kSets]);
    if (i == kSteps - 1) {
      __syncwarp();
      release(0);
      release(1);
    }
    pin_output();
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < C::kPanelsV; ++panel) {
      const u32(&of)[4] = values[i % kSets][panel];
      wgmma_rs<Element, false>(output[panel], of[0], of[1], of[2], of[3],
                               wgmma_descriptor<128>(p + (i * 32 >> 4)), 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  pin_output();
}

// This warpgroup's numbers of one half of the columns, which are two warps', to the rows' place.
template <class C>
__device__ __forceinline__ void MlaSwapped<C>::store_half_streamed(int half, bool adds,
                                                                   const float (&by)[kQueries]) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (warp / 2 != half) return;
  const int column = warp % 2 * (C::kHeadDimV / 4) + lane / 4 * (C::kHeadDimV / 32);
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int query = i / 2 * 8 + lane % 4 * 2 + i % 2;
    float2* const to = reinterpret_cast<float2*>(result() + query * C::kResultPitch + column);
#pragma unroll
    for (int panel = 0; panel < C::kPanelsV; ++panel) {
      const float* const from = output[panel] + i / 2 * 4 + i % 2;
      const float2 before = adds ? to[panel] : float2{0.f, 0.f};
      to[panel] = {before.x + from[0] * by[i], before.y + from[2] * by[i]};
    }
  }
}

}  // namespace jit_kernel::hopper
