// Types and sizes of a prefill's tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "flash_attention_v3/cpu/common/head_sizes.h"

namespace jit_kernel {

// What a prefill packs, most of the time: fp16 as integers (prefill_i16.h).
#ifdef JIT_KERNEL_I16_DOT
template <class Element>
using PackedOf = std::conditional_t<std::is_same<Element, fp16>::value, i16, MathOf<Element>>;
#else
template <class Element>
using PackedOf = MathOf<Element>;
#endif

// Whether a prefill in this math packs integers as long as they suit its numbers.
template <class Element, class Math>
constexpr bool kPacksIntegers =
    std::is_same<PackedOf<Element>, i16>::value && std::is_same<Math, float>::value;

// Keys whose probabilities share a factor when they are integers, and such chunks of a block at
// most; a tile's first key is a multiple of it then.
constexpr int64_t kI16Chunk = 128, kI16Chunks = 2;

// Elements of a dot product that one step of one lane takes.
template <class Math>
constexpr int kStep = sizeof(Math) == 2 ? 2 : 1;

// How far apart the keys are whose values are multiplied in one step: bf16 at the same place of two
// vectors of probabilities, so that these are joined without shuffling (store_probabilities).
template <class Math>
constexpr int64_t kStepApart = std::is_same<Math, bf16>::value ? simd::kLanes : 1;

// Rows of scores held at once: two AMX tiles, else 8 times the 6 rows of a register tile.
#ifdef JIT_KERNEL_AMX
template <class Math>
constexpr int64_t kTileRowsOf = sizeof(Math) == 2 ? 32 : 48;
#else
template <class Math>
constexpr int64_t kTileRowsOf = 48;
#endif
constexpr int64_t kRowStep = 96;  // whole tiles of either kind

// A thread that joins another's item packs its keys, too, which takes as long as 90 to 180 rows.
constexpr int64_t kRowsWorthJoining = 256;

struct PrefillTiles {
  int64_t block;   // keys whose scores and values are taken at once
  int64_t blocks;  // of them packed at once
  int64_t rows;    // rows that share packed keys, at most
  // Items have a multiple of so many rows: tiles must be the same ones however a sequence is cut,
  // as an AMX tile decides when maxima rise, and one of fp16 whether it is computed in integers.
  int64_t row_multiple;
};

template <class Packed>
inline PrefillTiles prefill_tiles(const HeadSizes& h) {
  [[maybe_unused]] constexpr bool kI16 = std::is_same<Packed, i16>::value;
  PrefillTiles t;
  int64_t key_bytes = (h.depth + h.dv) * int64_t{sizeof(Packed)};
  t.block = key_bytes <= 1024 ? 256 : key_bytes <= 2048 ? 128 : 64;  // 256 KiB packed
#ifdef JIT_KERNEL_AMX
  // Sums are read and written once a block, which tiles feel: 512 keys 1 to 4 % of a prefill at
  // head size 128, and 1024, whose P leaves L1 far behind, 6 % slower.
  if (sizeof(Packed) == 2 && !kI16 && key_bytes <= 512) t.block = 512;
#endif
  // Rows of q and out fill the other half of a small L2 (512 KiB). Machines with AMX have 2 MiB,
  // and products so fast that packing shows: half of it is packed keys, and rows pass by. Floats
  // take so long that packing them twice costs less than rows and sums that leave L2: half as
  // many are 4 % of a causal prefill.
#ifdef JIT_KERNEL_AMX
  constexpr bool kFloat = sizeof(Packed) == 4;
  constexpr int64_t kMostRows = kFloat ? 1024 : 2048, kRowBytes = 2048 << 10,
                    kPackedBytes = (kFloat ? 512 : 1024) << 10;
#else
  constexpr int64_t kMostRows = 512, kRowBytes = 512 << 10, kPackedBytes = 256 << 10;
#endif
  t.blocks = std::max<int64_t>(1, kPackedBytes / (t.block * key_bytes));
  int64_t row_bytes = h.depth * int64_t{sizeof(Packed)} + h.dv * int64_t{sizeof(float)};
  t.rows = std::min(kMostRows, kRowBytes / row_bytes);
  t.rows = std::max(kRowStep, t.rows / kRowStep * kRowStep);
  t.row_multiple = kTileRowsOf<Packed>;
#ifdef JIT_KERNEL_AMX
  if (kFloat || kI16) t.row_multiple = kRowStep;  // fp16 may become tiles of either kind
#endif
  return t;
}

}  // namespace jit_kernel
