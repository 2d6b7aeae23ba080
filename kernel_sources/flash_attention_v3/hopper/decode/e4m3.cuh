// Keys and values in e4m3 as wgmma's register operand in fp16, and queries to match.
//
// e4m3 to fp16 is exact, two numbers an instruction. A product's sum over columns, or over keys,
// has any order that both operands share, so that a thread takes what lies side by side in memory:
// of keys 16 neighbouring columns of a row, whose queries are stored in the same order; of values a
// few columns of two keys, interleaved by one PRMT. Nothing is transposed in shared memory, and no
// load has a bank conflict.
#pragma once

#include "flash_attention_v3/hopper/decode/shared_memory.cuh"
#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

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

// This thread of its warpgroup. What follows from it is worked out again for each block, not in
// front of the loop over them, for which 64 query rows leave no registers.
__device__ __forceinline__ int thread_of_block() {
  int thread = threadIdx.x % 128;
  asm volatile("" : "+r"(thread));
  return thread;
}

// The key of a row of the first product's eight: where rows are 128 bytes, neighbouring ones have
// their pieces in different banks. The second product takes keys in the same order.
__device__ __forceinline__ int key_of_row(int row) { return row ^ (row & 1) << 2; }

// Where 16 bytes of a tile's row lie, as the copy engine swizzles them.
template <class C>
__device__ __forceinline__ u32 place_of_piece(int row, int piece) {
  constexpr int kPieces = C::kPanelBytes / 16;
  const int swizzled = kPieces == 8 ? row % 8 : row / 2 % 4;
  return piece / kPieces * (kDecodeKeys * C::kPanelBytes) + row * C::kPanelBytes +
         ((piece % kPieces) ^ swizzled) * 16;
}

__device__ __forceinline__ void load_shared(u32 (&words)[4], u32 address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&words)[2], u32 address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}
// Four bytes, or two where a thread has two columns.
template <int kBytes>
__device__ __forceinline__ void load_shared(u32 (&words)[1], u32 address) {
  if constexpr (kBytes == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  } else {
    unsigned short half;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(half) : "r"(address) : "memory");
    words[0] = half;
  }
}

// The keys of a block: columns 16 p + 4 j + {0, 1} of piece p = 4 m + thread % 4 are columns
// 2 (thread % 4) + {0, 1} of step 4 m + j, and + {2, 3} are those 8 behind.
template <class C>
__device__ __forceinline__ void load_keys(u32 tile, u32 (&fragments)[C::kHeadDim / 16][4]) {
  const int thread = thread_of_block(), lane = thread % 32;
  const int row = thread / 32 * 16 + key_of_row(lane / 4);
#pragma unroll
  for (int m = 0; m < C::kHeadDim / 64; ++m) {
    u32 upper[4], lower[4];
    const u32 address = tile + place_of_piece<C>(row, 4 * m + lane % 4);
    load_shared(upper, address);
    load_shared(lower, address + 8 * C::kPanelBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const HalvesOfWord a = widen(upper[j]), b = widen(lower[j]);
      fragments[4 * m + j][0] = a.low;
      fragments[4 * m + j][1] = b.low;
      fragments[4 * m + j][2] = a.high;
      fragments[4 * m + j][3] = b.high;
    }
  }
}

// Where a thread's columns of a block's values lie: of the two keys of its first pair.
struct ValuePlaces {
  u32 first, second;
};
template <class C>
__device__ __forceinline__ ValuePlaces value_places(u32 tile) {
  const int thread = thread_of_block(), lane = thread % 32;
  const int column = thread / 32 * C::kWarpStep + lane / 4 * C::kLaneStep;
  const int key = lane % 4 * 2;
  return {tile + place_of_piece<C>(key, column / 16) + column % 16,
          tile + place_of_piece<C>(key_of_row(key + 1), column / 16) + column % 16};
}

// The values of 16 keys, step `step` of the second product. A thread's columns 2 i and 2 i + 1 are
// its two rows of panel i.
template <class C>
__device__ __forceinline__ void load_values(const ValuePlaces& at, int step,
                                            u32 (&fragments)[C::kPanels][4]) {
  constexpr int kBytes = C::kLaneStep, kWords = (kBytes + 3) / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 offset = (step * 16 + half * 8) * C::kPanelBytes;
    u32 first[kWords], second[kWords];
    if constexpr (kWords == 2) {
      load_shared(first, at.first + offset);
      load_shared(second, at.second + offset);
    } else {
      load_shared<kBytes>(first, at.first + offset);
      load_shared<kBytes>(second, at.second + offset);
    }
#pragma unroll
    for (int i = 0; i < C::kPanels; ++i) {
      const HalvesOfWord keys =
          widen(__byte_perm(first[i / 2], second[i / 2], i % 2 == 0 ? 0x5140 : 0x7362));
      fragments[i][2 * half] = keys.low;
      fragments[i][2 * half + 1] = keys.high;
    }
  }
}

// Eight neighbouring columns of a query to shared memory, in the order of load_keys. `piece`: which
// eight.
template <class C>
__device__ __forceinline__ void store_query(u32 queries, int index, int piece,
                                            const u32 (&words)[4]) {
  const int thread = piece / 2 % 4, step = piece / 8 * 4 + piece % 2 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {                 // two columns each
    const int at = (step + i / 2) * 2 + i % 2;  // in 16 bytes
    const u32 address = queries + at / 8 * C::kRows * 128 + index * 128 +
                        ((at % 8) ^ (index % 8)) * 16 + thread * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(words[i]) : "memory");
  }
}

// bf16 has exponents that fp16 lacks. A row is multiplied by a power of two that takes its largest
// element to [2^13, 2^14), so that what is lost is 2^-37 of it; returns the inverse. By all threads
// of a row, kPieces of them.
template <int kPieces>
__device__ __forceinline__ float scale_to_fp16(u32 (&words)[4]) {
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest = max(largest, max(words[i] << 16 & 0x7fffffffu, words[i] & 0x7fff0000u));
  }
#pragma unroll
  for (int step = 1; step < kPieces; step *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  // Both powers of two are normal numbers.
  const int exponent = min(max(static_cast<int>(largest >> 23) - 127, -113), 127);
  const float scale = __int_as_float((127 + 13 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack<fp16>(__int_as_float(words[i] << 16) * scale,
                          __int_as_float(words[i] & 0xffff0000u) * scale);
  }
  return __int_as_float((127 - 13 + exponent) << 23);
}

// The largest exponent of a block's scales, and at least one whose power of two has an inverse. The
// same in all threads: a lane has two keys.
__device__ __forceinline__ int largest_exponent(const float* scales) {
  constexpr u32 kLeast = 8;
  const float2 two = reinterpret_cast<const float2*>(scales)[threadIdx.x % 32];
  const u32 largest =
      max(__float_as_uint(two.x) & 0x7fffffffu, __float_as_uint(two.y) & 0x7fffffffu);
  return static_cast<int>(max(__reduce_max_sync(0xffffffffu, largest) >> 23, kLeast));
}

// Probabilities of a block are multiplied by its keys' scales over a power of two: the largest
// scale so far becomes [2^6, 2^7), and a probability is no more than 2^8.
constexpr int kRoomOfValues = 6;
__device__ __forceinline__ float to_unit_of_values(int exponent) {
  return __int_as_float((2 * 127 + kRoomOfValues - exponent) << 23);
}
__device__ __forceinline__ float from_unit_of_values(int exponent) {
  return __int_as_float((exponent - kRoomOfValues) << 23);
}

}  // namespace jit_kernel::hopper
