// A consumer warpgroup: 64 queries of each tile, scores and output in registers.
//
// One step of the main loop issues the product of queries and the next block of keys, then that of the
// last block's probabilities and values, and works on the next scores while the second one runs. At a
// tile's end the next tile's first scores are issued before the output is stored.
#pragma once

#include "flash_attention_v3/hopper/epilogue.cuh"
#include "flash_attention_v3/hopper/mask.cuh"
#include "jit_kernel/warpgroup.cuh"

namespace jit_kernel::hopper {

constexpr int kPingPongBarrier = 1;  // named barriers 1 to 3; 0 is the block's

template <class C>
struct Consumer {
  using Element = typename C::Element;

  const ForwardParams& params;
  Shared<C> shared;
  const int warpgroup;
  RingPosition<C::kStagesQ> q_at;
  RingPosition<C::kStages> k_at, v_at;
  Softmax softmax;
  KeyInterval rows[2];  // of this thread
  int unmasked_low, unmasked_high;  // keys that every row of the warpgroup sees
  float scores[C::kKeys / 2];
  float output[C::kHeadDimV / 2];
  u32 probabilities[C::kKeys / 4];

  __device__ __forceinline__ void release(u32 barrier) {
    mbarrier_arrive_if(barrier, threadIdx.x % 32 == 0);
  }

  __device__ __forceinline__ void issue_scores(bool keys_come = true) {
    constexpr int kSteps = C::kPanel / 16;  // of k in a panel
    if (keys_come) mbarrier_wait(shared.k_full(k_at.stage), k_at.parity);
    const u64 q = wgmma_descriptor<C::kPanel * 2>(shared.q(q_at.stage, warpgroup), 16,
                                                  8 * C::kPanel * 2);
    const u64 k = wgmma_descriptor<C::kPanel * 2>(shared.k(k_at.stage), 16, 8 * C::kPanel * 2);
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const int inside = i % kSteps * 32;
      wgmma_ss<Element>(scores, q + ((i / kSteps * kRowsPerWarpgroup * C::kPanel * 2 + inside) >> 4),
                        k + ((i / kSteps * C::kKeys * C::kPanel * 2 + inside) >> 4), i != 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_output(int accumulate) {
    mbarrier_wait(shared.v_full(v_at.stage), v_at.parity);
    const u64 v = wgmma_descriptor<C::kPanelV * 2>(
        shared.v(v_at.stage), C::kKeys * C::kPanelV * 2, 8 * C::kPanelV * 2);
    pin_registers(output);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
      wgmma_rs<Element>(output, probabilities[4 * i], probabilities[4 * i + 1],
                        probabilities[4 * i + 2], probabilities[4 * i + 3],
                        v + (i * 16 * C::kPanelV * 2 >> 4), i == 0 ? accumulate : 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void set_rows(const TileInfo& tile) {
    const int first = tile.row + warpgroup * kRowsPerWarpgroup;
    const int row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    rows[0] = visible_keys<C::kMasked>(params, row, tile.len_q, tile.len_k);
    rows[1] = visible_keys<C::kMasked>(params, row + 8, tile.len_q, tile.len_k);
    unmasked_high = visible_keys<C::kMasked>(params, first, tile.len_q, tile.len_k).high;
    unmasked_low = visible_keys<C::kMasked>(params, first + kRowsPerWarpgroup - 1, tile.len_q,
                                            tile.len_k).low;
  }

  template <bool kFirst>
  __device__ __forceinline__ void work_on_scores(int block) {
    if constexpr (C::kSoftcap) {
#pragma unroll
      for (float& score : scores) score = tanh_fast(score * params.softcap_scale);
    }
    const int column = block * C::kKeys;
    if (column + C::kKeys > unmasked_high || (C::kMasked && column < unmasked_low)) {
      mask_scores(scores, rows, column + threadIdx.x % 4 * 2);
    }
    softmax_step<kFirst, C::kPolynomialEighths>(scores, softmax, params.scale_log2);
  }

  // After the scores of a block have arrived; with those of the last block the queries are done with.
  __device__ __forceinline__ void release_scores(bool last) {
    pin_registers(scores);
    release(shared.k_empty(k_at.stage));
    k_at.advance();
    if (last) {
      release(shared.q_empty(q_at.stage, warpgroup));
      q_at.advance();
    }
  }

  __device__ __forceinline__ void release_output() {
    pin_registers(output);
    release(shared.v_empty(v_at.stage));
    v_at.advance();
  }

  // Blocks after the first: scores of `block` beside the output of the one before it in the walk.
  __device__ __forceinline__ void step(int block, bool last, int accumulate) {
    if constexpr (C::kPingPong) named_barrier_sync(kPingPongBarrier + warpgroup, 256);
    issue_scores();
    issue_output(accumulate);
    if constexpr (C::kPingPong) {
      named_barrier_arrive(kPingPongBarrier + (warpgroup + 1) % C::kWarpgroups, 256);
    }
    wgmma_wait<1>();
    release_scores(last);
    work_on_scores<false>(block);
    wgmma_wait<0>();
    release_output();
    rescale_output(output, softmax);
    pack_probabilities<Element>(scores, probabilities);
  }

  // The same in all lanes, and known to be so: a loop bound that may differ between lanes would make
  // ptxas serialise every wgmma.
  __device__ __forceinline__ TileInfo read_tile(int count) {
    mbarrier_wait(shared.q_full(q_at.stage, warpgroup), q_at.parity);
    TileInfo tile = *shared.tile(count);
    int* const fields = &tile.batch;
#pragma unroll
    for (int i = 0; i < int(sizeof(TileInfo) / sizeof(int)); ++i) {
      fields[i] = __shfl_sync(0xffffffffu, fields[i], 0);
    }
    return tile;
  }

  __device__ __forceinline__ void run() {
    if (C::kPingPong && warpgroup == C::kWarpgroups - 1) named_barrier_arrive(kPingPongBarrier, 256);
    int count = 0;
    TileInfo tile = read_tile(count);
    if (tile.batch < 0) return;
    issue_scores();
    wgmma_wait<0>();
    while (true) {
      set_rows(tile);
      int block = tile.block_end - 1;
      release_scores(block == tile.block_begin);
      work_on_scores<true>(block);
      pack_probabilities<Element>(scores, probabilities);
      int accumulate = 0;
      while (--block >= tile.block_begin) {
        step(block, block == tile.block_begin, accumulate);
        accumulate = 1;
      }
      issue_output(accumulate);
      // After the last tile this multiplies what lies in shared memory, and nobody looks at the result:
      // a branch between the two products would make ptxas serialise them.
      const TileInfo next = read_tile(++count);
      issue_scores(next.batch >= 0);
      wgmma_wait<1>();
      release_output();
      store_tile<C>(params, tile, output, softmax, params.scale_log2, warpgroup);
      wgmma_wait<0>();
      if (next.batch < 0) return;
      tile = next;
    }
  }
};

}  // namespace jit_kernel::hopper
