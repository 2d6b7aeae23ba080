// New keys and values into the cache, the keys rotated, and rotated queries beside them: one launch
// of blocks that each move rows of one of the three. A cache in e4m3 takes them quantised.
#pragma once

#include "flash_attention_v3/hopper/append/place.cuh"
#include "flash_attention_v3/hopper/append/rotary.cuh"
#include "jit_kernel/cuda/overlap.cuh"

namespace jit_kernel::hopper {

// What a thread moves: a piece of each of its rows.
struct Pieces {
  Place places[kAppendRows];
  Chunk own[kAppendRows];
  int chunk;
};

// Loads of all rows are issued before the first one is used.
template <class Element, bool kWide>
__device__ __forceinline__ void load_own(Pieces& pieces) {
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    pieces.own[r] = {};
    if (pieces.places[r].destination == nullptr) continue;
    const char* const from = pieces.places[r].source + pieces.chunk * kPieceBytes<Element>;
    if constexpr (kIsE4m3<Element>) {
      pieces.own[r] = load_bytes<kWide>(from);
    } else {
      pieces.own[r] = load_elements<kWide>(from);
    }
  }
}

// What the pieces of all rows need to be turned.
template <class Element, bool kWide>
__device__ __forceinline__ void load_turns(const AppendParams& params, const Pieces& pieces,
                                           Turn (&turns)[kAppendRows]) {
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    turns[r] = {};
    const Place& place = pieces.places[r];
    if (place.destination == nullptr) continue;
    turns[r] = load_angles<Element, kWide>(params, place.position, pieces.chunk);
    if (params.interleaved) continue;
    const int partner = partner_of(params, pieces.chunk);
    turns[r].other = load_piece<Element, kWide>(place.source, partner);
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    turns[r].other = signed_partners(params, pieces.own[r], turns[r].other, pieces.chunk);
  }
}

template <class Element, bool kWide>
__device__ __forceinline__ void move(const AppendParams& params, const AppendPart& part,
                                     Pieces& pieces) {
  load_own<Element, kWide>(pieces);
  if (part.rotates && pieces.chunk < params.rotary_chunks) {
    if constexpr (kIsE4m3<Element>) {  // what is not turned keeps its bytes, NaN's too
#pragma unroll
      for (Chunk& own : pieces.own) own = widened<Element>(own);
    }
    Turn turns[kAppendRows];
    load_turns<Element, kWide>(params, pieces, turns);
#pragma unroll
    for (int r = 0; r < kAppendRows; ++r) {
      pieces.own[r] = turned<Element>(pieces.own[r], turns[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    char* const row = pieces.places[r].destination;
    if (row == nullptr) continue;
    const u32(&words)[4] = pieces.own[r].words;
    char* const to = row + pieces.chunk * kPieceBytes<Element>;
    if constexpr (kIsE4m3<Element>) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// To a cache in e4m3: turned and divided in float32, rounded once.
template <class Element, bool kWide>
__device__ __forceinline__ void move_quantised(const AppendParams& params, const AppendPart& part,
                                               Pieces& pieces) {
  load_own<Element, kWide>(pieces);
  const bool turns_piece = part.rotates && pieces.chunk < params.rotary_chunks;
  Turn turns[kAppendRows];
  if (turns_piece) load_turns<Element, kWide>(params, pieces, turns);
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    const Place& place = pieces.places[r];
    if (place.destination == nullptr) continue;
    u32 words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = pieces.own[r].words[i];
      TwoFloats pair = {low_of<Element>(x), high_of<Element>(x)};
      if (turns_piece) pair = turned_pair<Element>(x, turns[r], i);
      words[i / 2] |= pack_e4m3<Element>(pair.low / place.factor, pair.high / place.factor)
                      << i % 2 * 16;
    }
    *reinterpret_cast<uint2*>(place.destination + pieces.chunk * kChunkElements) =
        make_uint2(words[0], words[1]);
  }
}

template <class Element, bool kQuantises>
__device__ __forceinline__ void append_rows(const AppendParams& params, unsigned block,
                                            unsigned thread) {
  const int kind = (block >= params.parts[kNewValues].first_block) +
                   (block >= params.parts[kQueries].first_block);
  const AppendPart& part = params.parts[kind];
  Pieces pieces;
  pieces.chunk = static_cast<int>(thread & ((1u << part.lanes_shift) - 1));
  if (pieces.chunk >= part.chunks) return;
  // Neighbouring lanes have neighbouring rows, so that a warp's accesses lie side by side.
  const unsigned rows = kAppendThreads >> part.lanes_shift;
  const unsigned first =
      (block - part.first_block) * kAppendRows * rows + (thread >> part.lanes_shift);
  find_places<kQuantises>(params, part, kind == kQueries, first, rows, pieces.places);
  if (kQuantises && kind != kQueries) {
    if (part.wide) {
      move_quantised<Element, true>(params, part, pieces);
    } else {
      move_quantised<Element, false>(params, part, pieces);
    }
  } else if (part.wide) {
    move<Element, true>(params, part, pieces);
  } else {
    move<Element, false>(params, part, pieces);
  }
}

}  // namespace jit_kernel::hopper

// The kernel of a variant.
#define JIT_KERNEL_EXPORT_APPEND(element, quantises, threads)                                  \
  static_assert(threads == jit_kernel::hopper::kAppendThreads, "what the launcher counts on"); \
  extern "C" __global__ void __launch_bounds__(threads)                                        \
      append(const __grid_constant__ jit_kernel::hopper::AppendParams params) {                \
    jit_kernel::wait_for_previous_kernel();                                                    \
    jit_kernel::let_next_kernel_start();                                                       \
    jit_kernel::hopper::append_rows<jit_kernel::element, quantises>(params, blockIdx.x,        \
                                                                    threadIdx.x);              \
  }
