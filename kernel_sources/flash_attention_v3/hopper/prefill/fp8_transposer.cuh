// Values of e4m3, transposed in shared memory: of 8-bit operands wgmma wants those side by side
// that are summed over, the keys of a column, and memory has the columns of a key.
//
// Two 8-bit columns of a key travel as one 16-bit element through ldmatrix's transposition, and
// byte permutations part them. That leaves two orders that cost nothing to allow for:
// - Keys: of 16, place 4 t + r is key 8 (r / 2) + 2 t + r % 2, so that the scores that a thread
// holds
//   are the probabilities of its register operand (pack_probabilities).
// - Columns: of 16, the even ones come first, 2 p at row p, and then the odd ones, so that the 8
// rows
//   which stmatrix writes at a time lie in different banks. fp8_epilogue.cuh puts them back.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"
#include "flash_attention_v3/hopper/prefill/shared_memory.cuh"

namespace jit_kernel::hopper {

__device__ __forceinline__ void load_transposed(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// From 32 keys of 16 columns: of 16 keys each, the even columns and the odd ones.
__device__ __forceinline__ void store_columns(u32 address, const u32 (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(__byte_perm(words[0], words[1], 0x6420)), "r"(__byte_perm(words[0], words[1], 0x7531)),
      "r"(__byte_perm(words[2], words[3], 0x6420)), "r"(__byte_perm(words[2], words[3], 0x7531))
      : "memory");
}

// One of C::kTransposers warps, which share the blocks of keys, 32 at a time.
template <class C>
struct Transposer {
  static constexpr int kPanelBytes = C::kPanelV * C::kElementBytes;
  static constexpr int kPieces = kPanelBytes / 16;  // of a row of a panel
  static constexpr int kInFlight = 2;

  const typename C::Params& params;
  Shared<C> shared;
  int warp;
  RingPosition<C::kStagesLoaded> from;
  RingPosition<C::kStages> to;

  __device__ __forceinline__ void transpose_keys(int group) {
    const int lane = threadIdx.x % 32;
    const int swizzled = kPieces == 8 ? lane % 8 : lane / 2 % 4;
    const u32 source =
        shared.loaded_v(from.stage()) + (32 * group + lane) * kPanelBytes + swizzled * 16;
    const u32 target = shared.v(to.stage()) + lane % 16 * C::kKeys +
                       ((2 * group + lane / 16) ^ (C::kKeys == 128 ? lane % 8 : lane / 2 % 4)) * 16;
#pragma unroll 1
    for (int first = 0; first < C::kHeadDimV / 16; first += kInFlight) {
      u32 words[kInFlight][4];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int panel = (first + i) / kPieces, piece = (first + i) % kPieces;
        load_transposed(words[i], (source ^ piece * 16) + panel * C::kKeys * kPanelBytes);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        store_columns(target + (first + i) * 16 * C::kKeys, words[i]);
      }
    }
  }

  // Zeros for a key in front of the first one that a row of the tile sees: it may hold anything,
  // and a probability of 0 times NaN is NaN. Behind the last one the copy engine fills zeros.
  __device__ __forceinline__ void clear_hidden(int group, int hidden) {
    const int key = 32 * group + threadIdx.x % 32;
    if (key < hidden) {
#pragma unroll 1
      for (int i = 0; i < C::kHeadDimV / 16; ++i) {
        store_zeros(shared.loaded_v(from.stage()) + i / kPieces * C::kKeys * kPanelBytes +
                    key * kPanelBytes + i % kPieces * 16);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void transpose_block(int hidden) {
    mbarrier_wait(shared.loaded_v_full(from.stage()), from.parity());
    mbarrier_wait(shared.v_empty(to.stage()), to.parity() ^ 1);
#pragma unroll 1
    for (int group = warp; group < C::kKeys / 32; group += C::kTransposers) {
      if (C::kMasked && hidden > 32 * group) clear_hidden(group, hidden);
      transpose_keys(group);
    }
    proxy_fence();
    __syncwarp();
    const bool is_first = threadIdx.x % 32 == 0;
    mbarrier_arrive_if(shared.loaded_v_empty(from.stage()), is_first);
    mbarrier_arrive_if(shared.v_full(to.stage()), is_first);
    from.advance();
    to.advance();
  }

  __device__ __forceinline__ void transpose_tile(const typename C::Info& tile) {
    const int low = C::kMasked ? seen_keys<C>(params, tile, tile.row).low : 0;
#pragma unroll 1
    for (int block = tile.block_end - 1; block >= tile.block_begin; --block) {
      transpose_block(low - block * C::kKeys);
    }
  }
};

template <class C>
__device__ __forceinline__ void transpose_values(const typename C::Params& params,
                                                 const Shared<C>& shared, int warp) {
  Transposer<C> transposer{params, shared, warp};
  RingPosition<kTileSlots> at;
  while (true) {
    mbarrier_wait(shared.tile_full(at.stage()), at.parity());
    const typename C::Info& tile = *shared.tile(at.stage());
    if (tile.batch < 0) return;
    transposer.transpose_tile(tile);
    __syncwarp();
    mbarrier_arrive_if(shared.tile_empty(at.stage()), threadIdx.x % 32 == 0);
    at.advance();
  }
}

}  // namespace jit_kernel::hopper
