// Keys of a tile that several blocks share. Each part leaves what its warps hold, and the warp that
// comes last of those with the same rows joins them in the order of their keys, whoever it is.
//
// A thread of every part holds the same places of output, so it leaves them as they are and reads
// its namesakes'. Nothing waits for another block, and the counters are zero again afterwards.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_factors.cuh"
#include "jit_kernel/cuda/memory.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

// Parts that the keys of each tile are cut into, and where these leave blocks idle, how many tiles
// there are for each of those: their keys' ends are then parts as well, which the idle take.
class PartCut {
 public:
  // As many ends as there are tiles of which most blocks are idle: some 100.
  __device__ __forceinline__ explicit PartCut(int parts, int ends = 0)
      : packed_(parts + (ends > 0) | ends << kShift) {}
  // Of a tile, its end with them.
  __device__ __forceinline__ int parts() const { return packed_ & ((1 << kShift) - 1); }

  // The blocks of keys of each part but an end, of so many.
  __device__ __forceinline__ int blocks_of_part(int blocks) const {
    const int whole = parts() - (ends() > 0), even = (blocks + whole - 1) / whole;
    // All ends of an idle block take as long as a part, with what it costs to begin and end them.
    const int fewer = (ends() * (blocks + kBlocksOfEnd + whole)) / (1 + whole * ends());
    return ends() > 0 && fewer + kBlocksOfEnd <= even ? fewer : even;
  }

 private:
  static constexpr int kShift = 20;
  __device__ __forceinline__ int ends() const { return packed_ >> kShift; }
  int packed_;  // one register: the scheduler warp has few
};

// All lanes of a warp together, and every block finds the same. With num_splits 0 the least that
// fills its last round of blocks within 15 % of the best, where a round is not nearly filled by
// whole tiles: FlashAttention's rule.
template <class C>
__device__ __forceinline__ PartCut parts_of_tiles(const CachedParams& params) {
  if (params.most_parts == 0 || params.num_splits == 1) return PartCut(1);
  if (params.num_splits > 1) return PartCut(params.num_splits);
  const int lane = threadIdx.x % 32, blocks = gridDim.x;
  int tiles = 0, longest = 0;
  for (int i = lane; i < params.batch; i += 32) {
    const int len_q = sequence_length(i, params.seqlen_q, params.cu_seqlens_q, params.seqused_q);
    tiles += (tile_rows<C>(params, len_q) + C::kRows - 1) / C::kRows;
    longest = max(longest, key_count<C>(params, i));
  }
  tiles = __reduce_add_sync(0xffffffffu, min(tiles, 1 << 12)) * heads_of_tiles<C>(params);
  longest = __reduce_max_sync(0xffffffffu, longest);
  if (tiles == 0 || 10 * tiles >= 8 * blocks) return PartCut(1);
  const int keys = min(longest, min(longest, params.window_left) +
                                    min(longest, params.window_right) + int(C::kRows));
  const int most =
      min(min(int(kMostPartsOfTile), keys / int(kLeastKeysOfPart)), params.most_parts / tiles);
  const auto fill = [&](int parts) {
    const int work = tiles * parts, rounds = (work + blocks - 1) / blocks;
    return __fdividef(static_cast<float>(work), static_cast<float>(rounds * blocks));
  };
  float best = 0.f;
  for (int parts = 1 + lane; parts <= most; parts += 32) best = fmaxf(best, fill(parts));
  best = __int_as_float(__reduce_max_sync(0xffffffffu, __float_as_int(best)));
  int least = kMostPartsOfTile;
  for (int parts = 1 + lane; parts <= most; parts += 32) {
    if (fill(parts) >= 0.85f * best) least = min(least, parts);
  }
  const int parts = most <= 1 ? 1 : __reduce_min_sync(0xffffffffu, least);
  const int idle = blocks - tiles * parts;
  // Of several sequences, or sections of heads, the ends of one come before the parts of the next.
  const bool has_ends = idle > 0 && parts > 1 && (parts + 1) * tiles <= params.most_parts &&
                        params.batch == 1 && heads_of_tiles<C>(params) <= kHeadsOfSection;
  return PartCut(parts, has_ends ? (tiles + idle - 1) / idle : 0);
}

// The place of a thread's pieces of 16 bytes in a part.
template <class C>
struct PartMemory {
  enum : int { kThreads = 2 * C::kRows, kPieces = C::kHeadDimV / 8 + 1 };
  float* base;
  __device__ __forceinline__ PartMemory(const CachedParams& params, int part, int thread)
      : base(params.parts + 4 * (static_cast<long long>(part) * kPieces * kThreads + thread)) {}
  __device__ __forceinline__ float* piece(int i) const { return base + 4 * i * kThreads; }
};

// Leaves what a warp holds of a tile; true where all parts of its rows have been left.
template <class C>
__device__ __forceinline__ bool leave_part(const CachedParams& params, const CachedTileInfo& tile,
                                           const float (&output)[C::kHeadDimV / 2],
                                           const Softmax& state, int thread) {
  constexpr int kOutputs = C::kHeadDimV / 8;
  const PartMemory<C> own(params, tile.first_part + tile.part, thread);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    store_16(own.piece(i), output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]);
  }
  const float to2 = tile_factors(params, tile).scale_log2;
  store_16(own.piece(kOutputs), half_reference<typename C::Element>(state, 0, to2),
           half_reference<typename C::Element>(state, 1, to2), state.sum[0], state.sum[1]);
  __threadfence();
  __syncwarp();
  int* const arrivals = params.arrivals + tile.ordinal * (C::kRows / 16) + thread / 32;
  int before = 0;
  if (thread % 32 == 0) before = atomicAdd(arrivals, 1);
  if (uniform(before) != tile.parts - 1) return false;
  if (thread % 32 == 0) *arrivals = 0;
  __threadfence();
  return true;
}

// The factor of a part whose rows have half a reference, where the highest one of all parts is
// `top`.
__device__ __forceinline__ float part_factor(float half_reference, float top) {
  return exp2_fast(2.f * (half_reference - (top == minus_infinity() ? 0.f : top)));
}

// Output and state of all parts of a warp's rows.
template <class C>
__device__ __forceinline__ void read_parts(const CachedParams& params, const CachedTileInfo& tile,
                                           float (&output)[C::kHeadDimV / 2], Softmax& state,
                                           int thread) {
  constexpr int kOutputs = C::kHeadDimV / 8;
  // Loads of so many are on their way: as registers allow.
  constexpr int kAtOnce = C::kHeadDimV > 64 && C::kHeadDimV <= 128 ? 2 : 1;
  float top[2] = {minus_infinity(), minus_infinity()};
#pragma unroll 4  // loads that wait together: one after the other, 8 parts take 3 us
  for (int part = 0; part < tile.parts; ++part) {
    const PartMemory<C> memory(params, tile.first_part + part, thread);
    const float4 rows = load_16(memory.piece(kOutputs));
    top[0] = fmaxf(top[0], rows.x);
    top[1] = fmaxf(top[1], rows.y);
  }
  state.sum[0] = state.sum[1] = 0.f;
#pragma unroll
  for (float& value : output) value = 0.f;
#pragma unroll kAtOnce
  for (int part = 0; part < tile.parts; ++part) {
    const PartMemory<C> memory(params, tile.first_part + part, thread);
    const float4 rows = load_16(memory.piece(kOutputs));
    const float factor[2] = {part_factor(rows.x, top[0]), part_factor(rows.y, top[1])};
    state.sum[0] = fmaf(rows.z, factor[0], state.sum[0]);
    state.sum[1] = fmaf(rows.w, factor[1], state.sum[1]);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const float4 values = load_16(memory.piece(i));
      output[4 * i] = fmaf(values.x, factor[0], output[4 * i]);
      output[4 * i + 1] = fmaf(values.y, factor[0], output[4 * i + 1]);
      output[4 * i + 2] = fmaf(values.z, factor[1], output[4 * i + 2]);
      output[4 * i + 3] = fmaf(values.w, factor[1], output[4 * i + 3]);
    }
  }
  state.reference[0] = 2.f * top[0];
  state.reference[1] = 2.f * top[1];
  state.rows = RowsState::kSettled;
}

// The end of one part of a tile: true where its warp is the last one, and holds output and state of
// all keys. No product may be in flight.
template <class C>
__device__ __forceinline__ bool join_parts(const CachedParams& params, const CachedTileInfo& tile,
                                           float (&output)[C::kHeadDimV / 2], Softmax& state,
                                           int warpgroup) {
  const int thread = warpgroup * 128 + threadIdx.x % 128;
  if (!leave_part<C>(params, tile, output, state, thread)) return false;
  read_parts<C>(params, tile, output, state, thread);
  return true;
}

}  // namespace jit_kernel::hopper
