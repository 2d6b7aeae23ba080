// Rows of elements as kernels that read once and write once want them: 16 bytes at a time, float32
// in between, one row to the threads of one y of a block.
//
// blockDim.x threads share a row: a power of two up to 32, or whole warps with blockDim.y == 1.
// `Wide` rows have addresses, strides and sizes that are multiples of a piece; others are read by
// elements.
#pragma once

#include "jit_kernel/cuda/element_types.h"
#if __CUDA_ARCH__ >= 900
#include "jit_kernel/cuda/overlap.cuh"
#endif

namespace jit_kernel {

using Index = long long;

template <class T>
constexpr int kElementBytes = ElementSize<T>::kBytes;
template <>
constexpr int kElementBytes<float> = 4;

// The most threads of a block: 128 registers for each.
constexpr int kMostThreads = 512;

// Elements in 16 bytes.
template <class T>
constexpr int kPiece = 16 / kElementBytes<T>;

// A kernel that was launched to overlap the one before it waits here, and lets the next one start.
__device__ __forceinline__ void meet_neighbours() {
#if __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
  let_next_kernel_start();
#endif
}

// float8_e4m3fn, to nearest even; what is too large becomes 448. Two in the low half of a word.
__device__ __forceinline__ unsigned e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
#else
  unsigned packed = 0;
  const float x[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned bits = __float_as_uint(x[i]), magnitude = bits & 0x7fffffffu;
    const unsigned normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - 0x3c000000u) >> 20;
    // The last bit of the sum is worth 2^-9.
    const unsigned subnormal = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000u;
    unsigned code = magnitude < 0x3c800000u ? subnormal : normal;
    code = magnitude >= 0x43e80000u ? 0x7eu : code;
    code = magnitude > 0x7f800000u ? 0x7fu : code;
    packed |= (bits >> 24 & 0x80u | code) << 8 * i;
  }
  return packed;
#endif
}

__device__ __forceinline__ float from_e4m3(unsigned byte) {
  const unsigned sign = (byte & 0x80u) << 24, magnitude = byte & 0x7fu;
  const float small = static_cast<float>(magnitude) * 0x1p-9f;
  float x = magnitude >= 8 ? __uint_as_float((magnitude << 20) + 0x3c000000u) : small;
  x = magnitude == 0x7f ? __uint_as_float(0x7fc00000u) : x;
  return __uint_as_float(__float_as_uint(x) | sign);
}

// A test that runs kernels on a CPU has functions of its own in place of these instructions.
#ifndef JIT_KERNEL_WITHOUT_PTX
__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned fp16_pair(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ void from_fp16_pair(unsigned word, float& low, float& high) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}
#endif

// The elements of a register as float32, and back, rounded once.
template <class T>
struct Word;

template <>
struct Word<float> {
  enum : int { kElements = 1 };
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = __uint_as_float(word);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) { return __float_as_uint(x[0]); }
};

template <>
struct Word<bf16> {
  enum : int { kElements = 2 };
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) { return bf16_pair(x[0], x[1]); }
};

template <>
struct Word<fp16> {
  enum : int { kElements = 2 };
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
    from_fp16_pair(word, x[0], x[1]);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) { return fp16_pair(x[0], x[1]); }
};

template <>
struct Word<e4m3> {
  enum : int { kElements = 4 };
  static __device__ __forceinline__ void unpack(unsigned word, float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = from_e4m3(word >> 8 * i & 0xffu);
  }
  static __device__ __forceinline__ unsigned pack(const float* x) {
    return e4m3_pair(x[0], x[1]) | e4m3_pair(x[2], x[3]) << 16;
  }
};

template <class T, int kCount>
constexpr int kWords = kCount * kElementBytes<T> / 4;

template <class T>
__device__ __forceinline__ const char* address(const T* base, Index element) {
  return reinterpret_cast<const char*>(base) + element * kElementBytes<T>;
}
template <class T>
__device__ __forceinline__ char* address(T* base, Index element) {
  return reinterpret_cast<char*>(base) + element * kElementBytes<T>;
}

template <int kN>
__device__ __forceinline__ void load_words(const char* from, unsigned (&words)[kN]) {
  if constexpr (kN == 1) {
    words[0] = *reinterpret_cast<const unsigned*>(from);
  } else if constexpr (kN == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else {
    static_assert(kN % 4 == 0, "whole 16 bytes");
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
}

template <int kN>
__device__ __forceinline__ void store_words(char* to, const unsigned (&words)[kN]) {
  if constexpr (kN == 1) {
    *reinterpret_cast<unsigned*>(to) = words[0];
  } else if constexpr (kN == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    static_assert(kN % 4 == 0, "whole 16 bytes");
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      reinterpret_cast<uint4*>(to)[i / 4] =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

// One element as the low bits of a word, and back.
template <class T>
__device__ __forceinline__ unsigned load_bits(const char* from) {
  if constexpr (kElementBytes<T> == 4) return *reinterpret_cast<const unsigned*>(from);
  if constexpr (kElementBytes<T> == 2) return *reinterpret_cast<const unsigned short*>(from);
  return *reinterpret_cast<const unsigned char*>(from);
}
template <class T>
__device__ __forceinline__ void store_bits(char* to, unsigned bits) {
  if constexpr (kElementBytes<T> == 4) {
    *reinterpret_cast<unsigned*>(to) = bits;
  } else if constexpr (kElementBytes<T> == 2) {
    *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(bits);
  } else {
    *reinterpret_cast<unsigned char*>(to) = static_cast<unsigned char>(bits);
  }
}

// Elements [begin, begin + kCount) of a row of `size`, packed; zeros past its end. Wide: begin and
// size are multiples of kCount.
template <class T, bool kWide, int kCount>
__device__ __forceinline__ void load_packed(const T* row, Index begin, Index size,
                                            unsigned (&words)[kWords<T, kCount>]) {
  if constexpr (kWide) {
    if (begin < size) {
      load_words(address(row, begin), words);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kWords<T, kCount>; ++i) words[i] = 0;
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i >= size) break;
      constexpr int kPerWord = Word<T>::kElements;
      words[i / kPerWord] |= load_bits<T>(address(row, begin + i))
                             << i % kPerWord * 8 * kElementBytes<T>;
    }
  }
}

template <class T, bool kWide, int kCount>
__device__ __forceinline__ void store_packed(T* row, Index begin, Index size,
                                             const unsigned (&words)[kWords<T, kCount>]) {
  if constexpr (kWide) {
    if (begin < size) store_words(address(row, begin), words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i >= size) break;
      constexpr int kPerWord = Word<T>::kElements;
      store_bits<T>(address(row, begin + i),
                    words[i / kPerWord] >> i % kPerWord * 8 * kElementBytes<T>);
    }
  }
}

template <class T, int kCount>
__device__ __forceinline__ void unpack(const unsigned (&words)[kWords<T, kCount>],
                                       float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kWords<T, kCount>; ++i) Word<T>::unpack(words[i], x + i * Word<T>::kElements);
}

template <class T, int kCount>
__device__ __forceinline__ void pack(const float (&x)[kCount],
                                     unsigned (&words)[kWords<T, kCount>]) {
#pragma unroll
  for (int i = 0; i < kWords<T, kCount>; ++i) words[i] = Word<T>::pack(x + i * Word<T>::kElements);
}

template <class T, bool kWide, int kCount>
__device__ __forceinline__ void load_floats(const T* row, Index begin, Index size,
                                            float (&x)[kCount]) {
  unsigned words[kWords<T, kCount>];
  load_packed<T, kWide, kCount>(row, begin, size, words);
  unpack<T>(words, x);
}

template <class T, bool kWide, int kCount>
__device__ __forceinline__ void store_floats(T* row, Index begin, Index size,
                                             const float (&x)[kCount]) {
  unsigned words[kWords<T, kCount>];
  pack<T>(x, words);
  store_packed<T, kWide, kCount>(row, begin, size, words);
}

// The row of this thread among all rows; those of the last block may be past the end.
__device__ __forceinline__ Index own_row() {
  return static_cast<Index>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Row `row` of two nested dimensions, the inner of `inner` rows.
template <class T>
__device__ __forceinline__ T* nested_row(T* base, Index row, int inner, Index outer_stride,
                                         Index inner_stride) {
  // One dimension has no outer rows: a division is 60 cycles before the first load.
  const unsigned outer =
      row < inner ? 0u : static_cast<unsigned>(row) / static_cast<unsigned>(inner);
  const unsigned rest = static_cast<unsigned>(row) - outer * static_cast<unsigned>(inner);
  const Index element = outer * outer_stride + rest * inner_stride;
  return reinterpret_cast<T*>(const_cast<char*>(address(base, element)));
}

struct Sum {
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Largest {
  static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

// Join of several numbers over the row's threads, at most a warp: their shuffles overlap.
template <class Join, int kCount>
__device__ __forceinline__ void over_lanes(float (&x)[kCount]) {
  for (unsigned offset = blockDim.x / 2; offset; offset /= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      x[n] = Join::join(x[n], __shfl_xor_sync(0xffffffffu, x[n], offset));
    }
  }
}

// Join, of which 0 changes nothing, over the row's threads, in each of them. All threads of a block
// come here, once a kernel.
template <class Join>
__device__ __forceinline__ float over_row(float x) {
  const unsigned threads = blockDim.x;
  for (unsigned offset = (threads < 32 ? threads : 32) / 2; offset; offset /= 2) {
    x = Join::join(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  if (threads > 32) {
    constexpr unsigned kWarps = kMostThreads / 32;
    __shared__ float of_warp[kWarps];
    const unsigned lane = threadIdx.x % kWarps;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < threads / 32 ? of_warp[lane] : 0.0f;
#pragma unroll
    for (unsigned offset = kWarps / 2; offset; offset /= 2) {
      x = Join::join(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
  }
  return x;
}

}  // namespace jit_kernel
