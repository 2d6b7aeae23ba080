// New keys and values into the cache, the keys rotated, and rotated queries beside them: one launch
// of blocks that each move rows of one of the three.
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
template <bool kWide>
__device__ __forceinline__ void load_own(Pieces& pieces) {
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    pieces.own[r] = {};
    if (pieces.places[r].destination == nullptr) continue;
    pieces.own[r] = load_elements<kWide>(pieces.places[r].source + pieces.chunk * kChunkBytes);
  }
}

template <class Element, bool kWide>
__device__ __forceinline__ void rotate(const AppendParams& params, Pieces& pieces) {
  if (pieces.chunk >= params.rotary_chunks) return;
  Turn turns[kAppendRows];
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    turns[r] = {};
    const Place& place = pieces.places[r];
    if (place.destination == nullptr) continue;
    turns[r] = load_angles<Element, kWide>(params, place.position, pieces.chunk);
    if (params.interleaved) continue;
    const int partner = partner_of(params, pieces.chunk);
    turns[r].other = load_elements<kWide>(place.source + partner * kChunkBytes);
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    turns[r].other = signed_partners(params, pieces.own[r], turns[r].other, pieces.chunk);
    pieces.own[r] = turned<Element>(pieces.own[r], turns[r]);
  }
}

template <class Element, bool kWide>
__device__ __forceinline__ void move(const AppendParams& params, const AppendPart& part,
                                     Pieces& pieces) {
  load_own<kWide>(pieces);
  if (part.rotates) rotate<Element, kWide>(params, pieces);
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    char* const row = pieces.places[r].destination;
    if (row == nullptr) continue;
    const Chunk& words = pieces.own[r];
    *reinterpret_cast<uint4*>(row + pieces.chunk * kChunkBytes) =
        make_uint4(words.words[0], words.words[1], words.words[2], words.words[3]);
  }
}

template <class Element>
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
  find_places(params, part, kind == kQueries, first, rows, pieces.places);
  if (part.wide) {
    move<Element, true>(params, part, pieces);
  } else {
    move<Element, false>(params, part, pieces);
  }
}

}  // namespace jit_kernel::hopper

// The kernel of a variant.
#define JIT_KERNEL_EXPORT_APPEND(element, threads)                                             \
  static_assert(threads == jit_kernel::hopper::kAppendThreads, "what the launcher counts on"); \
  extern "C" __global__ void __launch_bounds__(threads)                                        \
      append(const __grid_constant__ jit_kernel::hopper::AppendParams params) {                \
    jit_kernel::wait_for_previous_kernel();                                                    \
    jit_kernel::let_next_kernel_start();                                                       \
    jit_kernel::hopper::append_rows<jit_kernel::element>(params, blockIdx.x, threadIdx.x);     \
  }
