// A consumer warpgroup: 64 queries of each tile, scores and output in registers.
//
// With overlap, a step issues the scores of the next block of keys and then the output of this one,
// and works on the scores while the second product runs. Without, a block's two products follow
// each other and the other warpgroups keep the tensor cores busy; that takes fewer registers. At a
// tile's end the next tile's first scores are issued before the output is stored.
//
// Of e4m3 the tensor cores keep some 14 bits of a sum, so that each block's output is a sum of its
// own, added to the tile's in float32; of 256 columns part by part, as registers are few.
#pragma once

#include "flash_attention_v3/hopper/common/fragments.cuh"
#include "flash_attention_v3/hopper/prefill/cached_drafts.cuh"
#include "flash_attention_v3/hopper/prefill/cached_epilogue.cuh"
#include "flash_attention_v3/hopper/prefill/cached_keys.cuh"
#include "flash_attention_v3/hopper/prefill/cached_parts.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_epilogue.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_factors.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_products.cuh"
#include "flash_attention_v3/hopper/prefill/hidden_values.cuh"
#include "flash_attention_v3/hopper/prefill/shared_memory.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"

namespace jit_kernel::hopper {

constexpr int kPingPongBarrier = 1;  // the first of one named barrier a warpgroup; 0 is the block's
enum : int { kClearBarrier = 5 };    // as well; an enumerator leaves no symbol in cubins without it

template <class C>
struct Consumer {
  using Element = typename C::Element;

  const typename C::Params& params;
  Shared<C> shared;
  const int warpgroup;
  const u32 q_low, k_low, v_low;  // descriptors of stage 0
  RingPosition<C::kStagesQ> q_at;
  RingPosition<C::kStages> k_at, v_at;
  RingPosition<kTileSlots> tile_at;
  Softmax softmax;
  int every_low, every_high;   // keys that every row of the warpgroup sees
  int block_begin, block_end;  // blocks that some row of the warpgroup sees
  float scores[C::kKeys / 2];
  float output[C::kHeadDimV / 2];
  float of_block[C::kFp8 ? C::kPartColumns / 2 : 1];  // the sums of a block's products, or a part
  u32 probabilities[C::kKeys * C::kElementBytes / 8];
  float scale;         // of scores to exponents of 2
  int changes_scores;  // with factors of a tile: scores are multiplied before they are masked
  u32 queries[C::kQuerySteps > 0 ? 4 * C::kQuerySteps : 1];

  __device__ __forceinline__ Consumer(const typename C::Params& params, const Shared<C>& shared,
                                      int warpgroup)
      : params(params),
        shared(shared),
        warpgroup(warpgroup),
        q_low(wgmma_descriptor_low(shared.q(0, warpgroup), 16)),
        k_low(wgmma_descriptor_low(shared.k(0), 16)),
        v_low(wgmma_descriptor_low(shared.v(0), C::kFp8 ? 16 : C::kKeys * C::kPanelV * 2)),
        scale(params.scale_log2) {}

  __device__ __forceinline__ void release(u32 barrier) {
    mbarrier_arrive_if(barrier, threadIdx.x % 32 == 0);
  }

  __device__ __forceinline__ void release_values() {
    mbarrier_arrive_if(shared.v_empty(v_at.stage()), gives_values_back<C>(params));
  }

  __device__ __forceinline__ void issue_scores() {
    constexpr int kSwizzle = C::kElementBytes * C::kPanel;
    constexpr int kSteps = kSwizzle / 32;  // of k in a panel
    const u32 q = q_low + q_at.stage() * (C::kWarpgroups * C::kBytesQ >> 4);
    const u32 k = k_low + k_at.stage() * (C::kBytesK >> 4);
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim * C::kElementBytes / 32; ++i) {
      const int inside = i % kSteps * 32;
      const int of_q = i / kSteps * kRowsPerWarpgroup * kSwizzle + inside;
      const int of_k = i / kSteps * C::kKeys * kSwizzle + inside;
      const u64 keys = wgmma_descriptor<kSwizzle>(k + (of_k >> 4));
      if constexpr (C::kQuerySteps > 0) {
        if (i < C::kQuerySteps) {
          wgmma_rs<Element, false>(scores, queries[4 * i], queries[4 * i + 1], queries[4 * i + 2],
                                   queries[4 * i + 3], keys, i != 0);
          continue;
        }
      }
      const u64 rows = wgmma_descriptor<kSwizzle>(q + (of_q >> 4));
      if constexpr (C::kFp8) {
        wgmma_ss_e4m3(scores, rows, keys, i != 0);
      } else {
        wgmma_ss<Element>(scores, rows, keys, i != 0);
      }
    }
    wgmma_commit();
  }

  // Of e4m3, its first part, for which there is nothing to add to.
  __device__ __forceinline__ void issue_output(int accumulate, bool values_are_here = false) {
    if (!values_are_here) mbarrier_wait(shared.v_full(v_at.stage()), v_at.parity());
    if constexpr (C::kFp8) {
      issue_part(0);
    } else {
      issue_16_bit_output(accumulate);
    }
  }

  __device__ __forceinline__ void issue_16_bit_output(int accumulate) {
    const u32 v = v_low + v_at.stage() * (C::kBytesV >> 4);
    pin_registers(output);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
      wgmma_rs<Element, true>(output, probabilities[4 * i], probabilities[4 * i + 1],
                              probabilities[4 * i + 2], probabilities[4 * i + 3],
                              wgmma_descriptor<2 * C::kPanelV>(v + (i * 16 * C::kPanelV * 2 >> 4)),
                              i == 0 ? accumulate : 1);
    }
    wgmma_commit();
  }

  // Of e4m3: a part of the block's output.
  __device__ __forceinline__ void issue_part(int i) {
    multiply_part<C>(of_block, probabilities,
                     v_low + (v_at.stage() * C::kBytesV + i * C::kPartColumns * C::kKeys >> 4));
  }

  // Adds a part that has arrived to the tile's output.
  __device__ __forceinline__ void add_part(int i) {
    pin_registers(of_block);
#pragma unroll
    for (int j = 0; j < C::kPartColumns / 2; ++j) {
      output[i * (C::kPartColumns / 2) + j] += of_block[j];
    }
  }

  // Waits for part i - 1, adds it and issues part i.
  __device__ __forceinline__ void next_part(int i) {
    wgmma_wait<0>();
    add_part(i - 1);
    issue_part(i);
  }

  // Waits for the scheduler's tile. False: there are no more.
  __device__ __forceinline__ bool open_tile() {
    mbarrier_wait(shared.tile_full(tile_at.stage()), tile_at.parity());
    const typename C::Info& tile = *shared.tile(tile_at.stage());
    const int first = tile.row + warpgroup * kRowsPerWarpgroup;
    const int rows = tile_rows<C>(params, tile.len_q);
    const int last = max(tile.row, min(first + kRowsPerWarpgroup, rows) - 1);
    const KeyInterval of_first = seen_keys<C>(params, tile, first);
    const KeyInterval of_last = seen_keys<C>(params, tile, last);
    every_low = uniform(of_last.low);
    every_high = uniform(of_first.high);
    if constexpr (C::kCached) {
      if (params.draft_words > 0) {
        every_high = min(every_high, uniform(first_drafted(params, tile)));
      }
    }
    block_begin = uniform(tile.block_begin);
    block_end = uniform(tile.block_end);
    if constexpr (C::kMasked && !C::kPingPong) {
      // Rows of other warpgroups may see more blocks; taking turns needs equal numbers of steps.
      // Keys are skipped before the values behind them are given back, so no more of them than the
      // ring of values lets the producer run ahead, over the end of one tile and the start of the
      // next; with one more it deadlocks (tests/hopper/test_ring_model.py).
      constexpr int kMostLast = C::kStages / 2, kMostFirst = C::kStages - kMostLast;
      const int tile_begin = block_begin;
      const int end = uniform((of_last.high + C::kKeys - 1) / C::kKeys);
      const int begin = uniform(of_first.low / C::kKeys);
      block_end = min(block_end, max(max(tile_begin + 1, block_end - kMostFirst), end));
      block_begin = max(tile_begin, min(min(block_end - 1, tile_begin + kMostLast), begin));
    }
    return uniform(tile.batch) >= 0;
  }

  // Blocks of the tile before and behind those of this warpgroup.
  __device__ __forceinline__ int skipped_first() {
    if constexpr (!C::kMasked || C::kPingPong) return 0;
    return uniform(shared.tile(tile_at.stage())->block_end) - block_end;
  }
  __device__ __forceinline__ int skipped_last() {
    if constexpr (!C::kMasked || C::kPingPong) return 0;
    return block_begin - uniform(shared.tile(tile_at.stage())->block_begin);
  }

  // Only blocks at the mask's edge come here, so the rows' intervals are not kept in registers.
  template <bool kHigh>
  __device__ __forceinline__ void mask_block(int column) {
    const typename C::Info& tile = *shared.tile(tile_at.stage());
    const int row = accumulator_row(tile.row + warpgroup * kRowsPerWarpgroup);
    const KeyInterval rows[2] = {seen_keys<C>(params, tile, row),
                                 seen_keys<C>(params, tile, row + 8)};
    mask_scores<kHigh>(scores, rows, accumulator_column(column));
    if constexpr (C::kCached && kHigh) {
      if (params.draft_words > 0) {
        mask_drafts(scores, params, tile, row, accumulator_column(column));
      }
    }
  }

  template <class Between>
  __device__ __forceinline__ void work_on_scores(int block, Between between) {
    if constexpr (C::kTileFactors) {
      if (changes_scores) {
        const float before = tile_factors(params, *shared.tile(tile_at.stage())).before;
        change_scores(scores, before, params.softcap_scale > 0.f);
      }
    } else if constexpr (C::kSoftcap) {
#pragma unroll
      for (float& score : scores) score = tanh_fast(score * params.softcap_scale);
    }
    const int column = block * C::kKeys;
    if (column + C::kKeys > every_high) mask_block<true>(column);
    if (C::kMasked && column < every_low) mask_block<false>(column);
    softmax_step<Element>(scores, softmax, score_scale(), between);
  }
  __device__ __forceinline__ void work_on_scores(int block) {
    work_on_scores(block, [](int) {});
  }

  // After the scores of a block have arrived; with those of the last block the queries are done
  // with.
  __device__ __forceinline__ void release_scores(bool last) {
    pin_registers(scores);
    release(shared.k_empty(k_at.stage()));
    k_at.advance();
    if (last && !C::kQueriesInRegisters) release_queries();
  }

  __device__ __forceinline__ void release_queries() {
    release(shared.q_empty(q_at.stage(), warpgroup));
    q_at.advance();
  }

  __device__ __forceinline__ void release_output() {
    if constexpr (!C::kFp8) pin_registers(output);
    release_values();
    v_at.advance();
  }

  __device__ __forceinline__ void wait_keys() {
    mbarrier_wait(shared.k_full(k_at.stage()), k_at.parity());
  }

  // Blocks that no row of this warpgroup sees.
  __device__ __forceinline__ void skip_keys(int blocks) {
    for (int i = 0; i < blocks; ++i) {
      wait_keys();
      release(shared.k_empty(k_at.stage()));
      k_at.advance();
    }
  }

  __device__ __forceinline__ void skip_values(int blocks) {
    for (int i = 0; i < blocks; ++i) {
      mbarrier_wait(shared.v_full(v_at.stage()), v_at.parity());
      release_values();
      v_at.advance();
    }
  }

  // Before the output of a tile's last block, the one with the lowest keys: zeros for the values in
  // front of the first key that a row of the tile sees. They may hold anything, and a probability
  // of 0 times NaN is NaN. Each warpgroup writes them for itself, the same bytes, so none waits for
  // another; no product is in flight here. A row of a panel is contiguous, however it is swizzled.
  //
  // Of a cache, and of prepared values, those behind the last such key are cleared too, before the
  // output of the first block; in a cache, where no row of a block is seen, none was loaded, and
  // all of it is cleared. A draft mask may hide a key of any block that has bits from every row.
  __device__ __forceinline__ void clear_hidden_values(int block) {
    if constexpr (!C::kMasked || C::kTransposers > 0) return;
    const typename C::Info& tile = *shared.tile(tile_at.stage());
    const int low = first_seen<C>(params, tile), seen = end_in_block<C>(params, tile, block);
    const int hidden = uniform(min(low - block * C::kKeys, C::kKeys));
    const bool drafted = has_drafts(block);
    if (hidden <= 0 && seen == C::kKeys && !drafted) return;
    mbarrier_wait(shared.v_full(v_at.stage()), v_at.parity());
    if constexpr (C::kPrepared) {
      keep_prepared_values<C>(shared.base + C::kOffsetV + v_at.stage() * C::kBytesV, hidden, seen);
    } else {
      clear_values<C>(shared.v(v_at.stage()), 0, hidden);
    }
    if constexpr (C::kCached) {
      clear_values<C>(shared.v(v_at.stage()), seen, C::kKeys);
      if (drafted) clear_unseen_values<C>(shared.v(v_at.stage()), params, tile, block);
    }
    proxy_fence();
    named_barrier_sync(kClearBarrier + warpgroup, 128);
  }

  // Whether a block of keys reaches into a draft mask.
  __device__ __forceinline__ bool has_drafts(int block) {
    if constexpr (C::kCached) {
      if (params.draft_words == 0) return false;
      return (block + 1) * C::kKeys > uniform(first_drafted(params, *shared.tile(tile_at.stage())));
    }
    return false;
  }

  // All blocks but the output of the last one; the first one's scores have arrived. Returns whether
  // there is an output to add to.
  __device__ __forceinline__ bool run_overlapped() {
    int block = block_end - 1;
    release_scores(block == block_begin);
    work_on_scores(block);
    bool pending = false;
    while (true) {
      // The loop's edge keeps this wait below the exponentials: within one basic block ptxas moves
      // it above them, and they no longer overlap the product (12 % of all stalls were here).
      wgmma_wait<0>();
      if (pending) {
        release_output();
        if constexpr (!C::kFp8) rescale_output(output, softmax);
      }
      // Asked for early, the answers are back when they are needed.
      const bool keys_are_here = mbarrier_test(shared.k_full(k_at.stage()), k_at.parity());
      const bool values_are_here = mbarrier_test(shared.v_full(v_at.stage()), v_at.parity());
      pack_probabilities<Element>(scores, probabilities);
      if (--block < block_begin) {
        if constexpr (C::kFp8) add_block(pending);
        return pending;
      }
      if constexpr (C::kCached) {
        if (!pending || has_drafts(block + 1)) clear_hidden_values(block + 1);
      }
      if constexpr (C::kPingPong) named_barrier_sync(kPingPongBarrier + warpgroup, 256);
      if (!keys_are_here) wait_keys();
      issue_scores();
      if constexpr (C::kFp8) add_block(pending);
      issue_output(pending, values_are_here);
      if constexpr (C::kPingPong) {
        named_barrier_arrive(kPingPongBarrier + (warpgroup + 1) % C::kWarpgroups, 256);
      }
      pending = true;
      wgmma_wait<1>();
      release_scores(block == block_begin);
      work_on_scores(block);
    }
  }

  __device__ __forceinline__ void add_block(bool pending) {
    if (!pending) return;
    add_part(0);
    rescale_output(output, softmax);
  }

  // As run_overlapped(), with four parts of the output: one in flight beside the scores' product,
  // the others beside the work on the scores.
  __device__ __forceinline__ void run_in_parts() {
    int block = block_end - 1;
    release_scores(block == block_begin);
    work_on_scores(block);
    while (true) {
      const bool keys_are_here = mbarrier_test(shared.k_full(k_at.stage()), k_at.parity());
      const bool values_are_here = mbarrier_test(shared.v_full(v_at.stage()), v_at.parity());
      rescale_output(output, softmax);
      pack_probabilities<Element>(scores, probabilities);
      if (--block < block_begin) return;
      if (C::kPrepared && block == block_end - 2) clear_hidden_values(block + 1);
      if constexpr (C::kPingPong) named_barrier_sync(kPingPongBarrier + warpgroup, 256);
      issue_output(0, values_are_here);
      if (!keys_are_here) wait_keys();
      issue_scores();
      if constexpr (C::kPingPong) {
        named_barrier_arrive(kPingPongBarrier + (warpgroup + 1) % C::kWarpgroups, 256);
      }
      wgmma_wait<1>();
      add_part(0);
      issue_part(1);
      wgmma_wait<1>();
      release_scores(block == block_begin);
      work_on_scores(block, [this](int i) { next_part(i + 2); });
      wgmma_wait<0>();
      add_part(3);
      release_output();
    }
  }

  __device__ __forceinline__ bool run_in_turn() {
    int block = block_end - 1;
    bool pending = false;
    while (true) {
      release_scores(block == block_begin);
      work_on_scores(block);
      const bool values_are_here = mbarrier_test(shared.v_full(v_at.stage()), v_at.parity());
      const bool keys_are_here = mbarrier_test(shared.k_full(k_at.stage()), k_at.parity());
      if (pending) rescale_output(output, softmax);
      pack_probabilities<Element>(scores, probabilities);
      if (--block < block_begin) return pending;
      if constexpr (C::kCached) {
        if (!pending || has_drafts(block + 1)) clear_hidden_values(block + 1);
      }
      if constexpr (C::kPingPong) named_barrier_sync(kPingPongBarrier + warpgroup, 256);
      issue_output(pending, values_are_here);
      pending = true;
      if (!keys_are_here) wait_keys();
      wgmma_wait<0>();
      release_output();
      issue_scores();
      if constexpr (C::kPingPong) {
        named_barrier_arrive(kPingPongBarrier + (warpgroup + 1) % C::kWarpgroups, 256);
      }
      wgmma_wait<0>();
    }
  }

  __device__ __forceinline__ float score_scale() const {
    return C::kTileFactors ? scale : params.scale_log2;
  }

  __device__ __forceinline__ bool run_blocks() {
    if constexpr (C::kParts > 1) {
      run_in_parts();
      return false;
    }
    return C::kOverlap ? run_overlapped() : run_in_turn();
  }

  __device__ __forceinline__ void take_factors() {
    const TileFactors factors = tile_factors(params, *shared.tile(tile_at.stage()));
    scale = factors.scale_log2;
    changes_scores = uniform(factors.before != 1.f || params.softcap_scale > 0.f);
    if constexpr (!C::kFp8) return;
#pragma unroll
    for (float& each : output) each = 0.f;
  }

  __device__ __forceinline__ void run() {
    if (C::kPingPong && warpgroup == C::kWarpgroups - 1)
      named_barrier_arrive(kPingPongBarrier, 256);
    if (!open_tile()) return;
    wait_queries();
    issue_scores();
    wgmma_wait<0>();
    while (true) {
      if constexpr (C::kTileFactors) take_factors();
      start_row(softmax, score_scale() > largest_scale<C>(params.softcap_scale));
      skip_values(skipped_first());
      const bool pending = run_blocks();
      const int skipped = skipped_last();
      clear_hidden_values(block_begin);
      issue_output(pending);
      if constexpr (C::kParts > 1) {
#pragma unroll
        for (int i = 1; i < C::kParts; ++i) next_part(i);
      }
      if constexpr (!C::kOverlap) wgmma_wait<0>();
      skip_keys(skipped);
      const typename C::Info& tile = *shared.tile(tile_at.stage());
      bool stores = true;
      if constexpr (C::kCached) {
        if (uniform(tile.parts) > 1) {
          wgmma_wait<0>();
          pin_registers(output);
          stores = join_parts<C>(params, tile, output, softmax, warpgroup);
        }
      }
      RingPosition<kTileSlots> this_at = tile_at;
      tile_at.advance();
      const bool more = open_tile();
      if (more) wait_queries();
      // After the last tile this multiplies old contents of shared memory, and the result is not
      // used: a branch between the two products would make ptxas serialise them.
      issue_scores();
      wgmma_wait<1>();
      release_output();
      if constexpr (C::kFp8) {
        add_part(C::kParts - 1);
        store_fp8_tile<C>(params, tile, output, softmax, warpgroup);
      } else if constexpr (C::kCached) {
        if (stores) store_cached_tile<C>(params, tile, output, softmax, warpgroup);
      } else {
        store_tile<C>(params, tile, output, softmax, warpgroup);
      }
      mbarrier_arrive(shared.tile_empty(this_at.stage()));  // every lane has read the tile
      wgmma_wait<0>();
      skip_values(skipped);
      if (!more) return;
    }
  }

  // The first product of an opened tile can be issued.
  __device__ __forceinline__ void wait_queries() {
    mbarrier_wait(shared.q_full(q_at.stage(), warpgroup), q_at.parity());
    load_fragments<C::kQuerySteps, C::kPanel>(queries, shared.q(q_at.stage(), warpgroup));
    if (C::kQueriesInRegisters) {
      __syncwarp();  // every lane has read its queries
      release_queries();
    }
    skip_keys(skipped_first());
    wait_keys();
  }
};

}  // namespace jit_kernel::hopper
