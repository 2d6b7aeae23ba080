// Rotary embedding of pieces of rows, eight elements each: in float32, rounded once. A product of
// two elements has at most 22 bits, so that only the sum rounds, fused or not: the bits are the
// CPU's.
#pragma once

#include "flash_attention_v3/hopper/append/params.h"
#include "jit_kernel/cuda/element.cuh"

namespace jit_kernel::hopper {

// Eight elements, two in a register. Those of e4m3 are turned as fp16, which holds them; as they
// come they are the first two registers.
struct Chunk {
  u32 words[4];
};

template <class Element>
constexpr bool kIsE4m3 = false;
template <>
constexpr bool kIsE4m3<e4m3> = true;
template <class Element>
constexpr int kPieceBytes = kIsE4m3<Element> ? kChunkElements : kChunkBytes;

// Two e4m3 in the low half of a register as fp16. Element: of the kernel, as of pack_e4m3.
template <class Element>
__device__ __forceinline__ u32 two_halves(u32 bytes) {
  u32 halves;
  asm("{\n.reg .b16 pair;\ncvt.u16.u32 pair, %1;\ncvt.rn.f16x2.e4m3x2 %0, pair;\n}"
      : "=r"(halves)
      : "r"(bytes & 0xffffu));
  return halves;
}

// Eight e4m3 as they come.
template <bool kWide>
__device__ __forceinline__ Chunk load_bytes(const char* from) {
  if constexpr (kWide) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    return {words.x, words.y, 0, 0};
  }
  Chunk chunk = {};
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    chunk.words[i / 4] |= static_cast<u32>(bytes[i]) << i % 4 * 8;
  }
  return chunk;
}

template <class Element>
__device__ __forceinline__ Chunk widened(const Chunk& bytes) {
  return {two_halves<Element>(bytes.words[0]), two_halves<Element>(bytes.words[0] >> 16),
          two_halves<Element>(bytes.words[1]), two_halves<Element>(bytes.words[1] >> 16)};
}

// The elements of a register as float32.
template <class Element>
__device__ __forceinline__ float low_of(u32 word) {
  if constexpr (kIsBf16<Element>) return __int_as_float(word << 16);
  float value;  // of e4m3, too, which is turned as fp16
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(word));
  return value;
}

template <class Element>
__device__ __forceinline__ float high_of(u32 word) {
  if constexpr (kIsBf16<Element>) return __int_as_float(word & 0xffff0000u);
  return low_of<Element>(word >> 16);
}

// kCount elements, into the first registers of a chunk.
template <bool kWide, int kCount = kChunkElements>
__device__ __forceinline__ Chunk load_elements(const char* from) {
  Chunk chunk = {};
  if constexpr (!kWide) {
    const auto* elements = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      chunk.words[i] = elements[2 * i] | static_cast<u32>(elements[2 * i + 1]) << 16;
    }
  } else if constexpr (kCount == kChunkElements) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    chunk = {words.x, words.y, words.z, words.w};
  } else {
    static_assert(kCount == 4);
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    chunk = {words.x, words.y, 0, 0};
  }
  return chunk;
}

// A piece of a row of 16-bit elements, or of e4m3 as fp16.
template <class Element, bool kWide>
__device__ __forceinline__ Chunk load_piece(const char* row, int chunk) {
  if constexpr (kIsE4m3<Element>) {
    return widened<Element>(load_bytes<kWide>(row + chunk * kPieceBytes<Element>));
  } else {
    return load_elements<kWide>(row + chunk * kPieceBytes<Element>);
  }
}

// The first half of one.
template <class Element, bool kWide>
__device__ __forceinline__ Chunk load_half_piece(const char* row, int chunk) {
  if constexpr (kIsE4m3<Element>) {
    // Four bytes of eight that lie in the row, whose length is a multiple of eight.
    Chunk bytes = load_bytes<kWide>(row + chunk / 2 * kPieceBytes<Element>);
    bytes.words[0] = bytes.words[chunk % 2];
    return widened<Element>(bytes);
  } else {
    return load_elements<kWide, kChunkElements / 2>(row + chunk * (kPieceBytes<Element> / 2));
  }
}

// What a piece needs to be turned: every element's partner, with its sign, and its angle.
struct Turn {
  Chunk other, cos, sin;
};

template <class Element>
constexpr u32 kTwoOnes = kIsBf16<Element> ? 0x3f803f80u : 0x3c003c00u;

// Four elements, each twice.
__device__ __forceinline__ Chunk doubled(const Chunk& chunk) {
  return {__byte_perm(chunk.words[0], 0, 0x1010), __byte_perm(chunk.words[0], 0, 0x3232),
          __byte_perm(chunk.words[1], 0, 0x1010), __byte_perm(chunk.words[1], 0, 0x3232)};
}

// Piece `chunk` of a row of a table. Interleaved, an angle turns two neighbours; else one element
// of each half. A position past the table is the caller's mistake: it is not read, and turns
// nothing.
template <class Element, bool kWide>
__device__ __forceinline__ Chunk load_table(const AppendParams& params, const char* table,
                                            long long stride, int position, int chunk,
                                            u32 outside) {
  if (static_cast<unsigned>(position) >= static_cast<unsigned>(params.rotary_positions)) {
    return {outside, outside, outside, outside};
  }
  const char* row = table + position * stride;
  if (params.interleaved) {
    return doubled(load_half_piece<Element, kWide>(row, chunk));
  }
  const int half = params.rotary_chunks / 2;
  return load_piece<Element, kWide>(row, chunk < half ? chunk : chunk - half);
}

template <class Element, bool kWide>
__device__ __forceinline__ Turn load_angles(const AppendParams& params, int position, int chunk) {
  Turn turn = {};
  turn.cos = load_table<Element, kWide>(params, params.rotary_cos, params.cos_stride, position,
                                        chunk, kTwoOnes<Element>);
  turn.sin =
      load_table<Element, kWide>(params, params.rotary_sin, params.sin_stride, position, chunk, 0);
  return turn;
}

// The piece that holds the partners of piece `chunk`, where it is another one.
__device__ __forceinline__ int partner_of(const AppendParams& params, int chunk) {
  const int half = params.rotary_chunks / 2;
  return chunk < half ? chunk + half : chunk - half;
}

// The partners of a piece: its own neighbours when interleaved, else those of the other half. The
// first of a pair takes the second negated.
__device__ __forceinline__ Chunk signed_partners(const AppendParams& params, const Chunk& own,
                                                 const Chunk& other, int chunk) {
  Chunk result;
  const u32 negated = chunk < params.rotary_chunks / 2 ? 0x80008000u : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.words[i] = params.interleaved ? __byte_perm(own.words[i], 0, 0x1032) ^ 0x8000u
                                         : other.words[i] ^ negated;
  }
  return result;
}

// Two neighbours of a piece, turned.
struct TwoFloats {
  float low, high;
};
template <class Element>
__device__ __forceinline__ TwoFloats turned_pair(u32 x, const Turn& turn, int i) {
  const u32 y = turn.other.words[i], cos = turn.cos.words[i], sin = turn.sin.words[i];
  return {
      low_of<Element>(x) * low_of<Element>(cos) + low_of<Element>(y) * low_of<Element>(sin),
      high_of<Element>(x) * high_of<Element>(cos) + high_of<Element>(y) * high_of<Element>(sin)};
}

template <class Element>
__device__ __forceinline__ Chunk turned(const Chunk& own, const Turn& turn) {
  Chunk result = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const TwoFloats pair = turned_pair<Element>(own.words[i], turn, i);
    if constexpr (kIsE4m3<Element>) {
      result.words[i / 2] |= pack_e4m3<Element>(pair.low, pair.high) << i % 2 * 16;
    } else {
      result.words[i] = pack<Element>(pair.low, pair.high);
    }
  }
  return result;
}

}  // namespace jit_kernel::hopper
