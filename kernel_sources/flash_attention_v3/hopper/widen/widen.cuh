// Keys and values of a call's sequences from a cache in e4m3 to 16 bits, for the prefill kernels on
// cached keys: a row of the cache has the same number in its sequence's room, so that the kernel
// gives the bits that it gives over a cache of 16 bits. e4m3 is exact in both types; the factors of
// sequences and heads go into a table, in float32.
//
// Only rows that some query may see are touched: what page tables hold of others may be anything.
#pragma once

#include "flash_attention_v3/hopper/append/place.cuh"
#include "flash_attention_v3/hopper/append/rotary.cuh"
#include "flash_attention_v3/hopper/common/epilogue.cuh"
#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_factors.cuh"
#include "flash_attention_v3/hopper/widen/params.h"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

// What the functions of cached keys ask of a kernel's configuration.
struct WidenConfig {
  static constexpr bool kCached = true, kMasked = true;
  using Params = CachedParams;
};

// The rows of the cache that some query of a sequence sees, from its first query's to its last's.
__device__ __forceinline__ KeyInterval rows_of_sequence(const CachedParams& params, int batch) {
  const int len_q = sequence_length(batch, params.seqlen_q, params.cu_seqlens_q, params.seqused_q);
  const int len_k = key_count<WidenConfig>(params, batch);
  if (len_q == 0) return {0, 0};
  const int low = visible_keys<true>(params, 0, len_q, len_k).low;
  const int high = visible_keys<true>(params, len_q - 1, len_q, len_k).high;
  const int before = left_padding(params, batch);
  return {before + low, before + high};
}

// A piece of a row: of which row and head, which one it is, and where it goes. Destinations follow
// each other as items do, whether there is such a row or not.
struct WidenPlace {
  int row, head, piece, page;
  char* destination;
};

__device__ __forceinline__ int load_int_if(const int* from, bool loads, int otherwise) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1];\n}"
               : "+r"(otherwise)
               : "l"(from), "r"(static_cast<u32>(loads))
               : "memory");
  return otherwise;
}

// Its page is asked for; nothing here waits for it.
__device__ __forceinline__ WidenPlace place_of_item(const WidenParams& params,
                                                    const WidenPart& part, int batch, int cache_row,
                                                    const KeyInterval& rows, unsigned item) {
  const unsigned row_and_head = divide(item, part.pieces);
  const unsigned of_rows = divide(row_and_head, params.heads);
  WidenPlace place;
  place.piece = static_cast<int>(item - row_and_head * part.pieces.divisor);
  place.head = static_cast<int>(row_and_head - of_rows * params.heads.divisor);
  place.row = rows.low + static_cast<int>(of_rows);
  const long long target =
      (static_cast<long long>(batch) * params.capacity + place.row) * params.heads.divisor +
      place.head;
  place.destination =
      part.destination + (target * part.pieces.divisor + place.piece) * (2 * kWidenPieceElements);
  const bool exists = place.row < rows.high;
  const int* const entry =
      params.page_table + cache_row * params.table_stride + page_of(params, place.row);
  place.page = load_int_if(entry, exists && params.page_table != nullptr, exists ? cache_row : -1);
  return place;
}

// Null where there is no such row.
__device__ __forceinline__ const char* source_of(const WidenParams& params, const WidenPart& part,
                                                 const WidenPlace& place) {
  if (static_cast<unsigned>(place.page) >= static_cast<unsigned>(params.pages)) return nullptr;
  const CacheRows& from = part.source;
  const int slot = place.row - page_of(params, place.row) * params.page_size;
  return from.base + place.page * from.page_stride + slot * from.row_stride +
         place.head * from.head_stride + place.piece * kWidenPieceElements;
}

// Two fp16 as they are, or as bf16.
template <bool kToBf16>
__device__ __forceinline__ u32 of_halves(u32 halves) {
  if constexpr (!kToBf16) return halves;
  return pack<bf16>(low_of<fp16>(halves), high_of<fp16>(halves));
}

// 16 bytes that are read once, predicated: all of a thread's loads are on their way together.
__device__ __forceinline__ void load_16_if(u32 (&words)[4], const char* source, bool loads) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "@p ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "l"(source), "r"(static_cast<u32>(loads))
      : "memory");
}

// Eight elements.
template <bool kToBf16>
__device__ __forceinline__ void store_wide(char* destination, u32 low, u32 high, bool stores) {
  const u32 words[4] = {
      of_halves<kToBf16>(two_halves<fp16>(low)), of_halves<kToBf16>(two_halves<fp16>(low >> 16)),
      of_halves<kToBf16>(two_halves<fp16>(high)), of_halves<kToBf16>(two_halves<fp16>(high >> 16))};
  store_16_if(destination, words, stores);
}

// A piece becomes 32 bytes. Two neighbouring lanes store the halves of one and then those of the
// other, as a sector of memory has 32 bytes: all lanes of a warp together.
template <bool kToBf16>
__device__ __forceinline__ void store_piece(char* destination, const u32 (&bytes)[4], bool own) {
  const bool odd = threadIdx.x % 2 == 1;
  const bool other = __shfl_xor_sync(0xffffffffu, static_cast<int>(own), 1) != 0;
  const u32 got[2] = {__shfl_xor_sync(0xffffffffu, odd ? bytes[0] : bytes[2], 1),
                      __shfl_xor_sync(0xffffffffu, odd ? bytes[1] : bytes[3], 1)};
  store_wide<kToBf16>(destination - (odd ? 16 : 0), odd ? got[0] : bytes[0],
                      odd ? got[1] : bytes[1], odd ? other : own);
  store_wide<kToBf16>(destination + (odd ? 16 : 32), odd ? bytes[2] : got[0],
                      odd ? bytes[3] : got[1], odd ? own : other);
}

// Neighbouring threads take neighbouring pieces.
__device__ __forceinline__ void widen_rows(const WidenParams& params, const WidenPart& part,
                                           int batch, unsigned block, unsigned thread) {
  const KeyInterval rows = rows_of_sequence(params, batch);
  const unsigned first = block * kWidenPieces * kWidenThreads;
  const unsigned row_pieces = params.heads.divisor * part.pieces.divisor;
  if (first >= static_cast<unsigned>(max(0, rows.high - rows.low)) * row_pieces) return;
  const int cache_row = params.cache_batch_idx != nullptr ? params.cache_batch_idx[batch] : batch;
  WidenPlace places[kWidenPieces];
  u32 bytes[kWidenPieces][4];
  bool exists[kWidenPieces];
#pragma unroll
  for (int i = 0; i < kWidenPieces; ++i) {
    places[i] =
        place_of_item(params, part, batch, cache_row, rows, first + i * kWidenThreads + thread);
  }
#pragma unroll
  for (int i = 0; i < kWidenPieces; ++i) {
    const char* const source = source_of(params, part, places[i]);
    exists[i] = source != nullptr;
    load_16_if(bytes[i], source, exists[i]);
  }
#pragma unroll
  for (int i = 0; i < kWidenPieces; ++i) {
    if (params.to_bf16) {
      store_piece<true>(places[i].destination, bytes[i], exists[i]);
    } else {
      store_piece<false>(places[i].destination, bytes[i], exists[i]);
    }
  }
}

// Blocks (pieces, sequence, keys or values).
__device__ __forceinline__ void widen_cache(const WidenParams& params) {
  const int batch = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int heads = static_cast<int>(params.heads.divisor);
  if (blockIdx.x == 0 && blockIdx.z == 0) {
    for (int head = thread; head < heads; head += kWidenThreads) {
      params.table[batch * heads + head] = factors_of(params, batch, head);
    }
  }
  widen_rows(params, params.parts[blockIdx.z], batch, blockIdx.x, threadIdx.x);
}

}  // namespace jit_kernel::hopper

#define JIT_KERNEL_EXPORT_WIDEN(threads)                                                      \
  static_assert(threads == jit_kernel::hopper::kWidenThreads, "what the launcher counts on"); \
  extern "C" __global__ void __launch_bounds__(threads)                                       \
      widen(const __grid_constant__ jit_kernel::hopper::WidenParams params) {                 \
    jit_kernel::wait_for_previous_kernel();                                                   \
    jit_kernel::let_next_kernel_start();                                                      \
    jit_kernel::hopper::widen_cache(params);                                                  \
  }
