// The blocks of keys of a tile in a consumer warpgroup, in e4m3.
//
// Exponentials leave seven of eight issue slots free. The additions of the block before and the
// conversion to probabilities take some of them: one stretch of code without a branch or a wait, in
// the order in which it should run. Between the two products they took 9 % of a step, as adding
// there waits for registers that the tensor cores read and write.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

template <class C>
struct Consumer;

// Exponents to probabilities, packed and summed, and the sums of a block added to the tile's.
template <int kCount, int kPacked, int kSums>
__device__ __forceinline__ void take_probabilities(const float (&scores)[kCount], Softmax& state,
                                                   u32 (&packed)[kPacked], float (&output)[kSums],
                                                   const float (&of_block)[kSums]) {
  constexpr int kAdded = kSums / kPacked;  // beside four exponentials
  float sums[2][2] = {};
#pragma unroll
  for (int i = 0; i < kPacked; ++i) {
    const int at = i / 2 * 8 + i % 2 * 2;  // as pack_probabilities()
    const float a = exp2_fast(scores[at]), b = exp2_fast(scores[at + 1]);
    const float c = exp2_fast(scores[at + 4]), d = exp2_fast(scores[at + 5]);
    packed[i] = pack_e4m3(a, b, c, d);
    sums[i % 2][0] += a;
    sums[i % 2][1] += b;
    sums[i % 2][0] += c;
    sums[i % 2][1] += d;
#pragma unroll
    for (int j = i * kAdded; j < (i + 1) * kAdded; ++j) output[j] += of_block[j];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) state.sum[r] += sums[r][0] + sums[r][1];
}

// Most blocks need none of what a branch of its own leads to: each such jump over code that is not
// run costs 15 to 25 cycles, as the instructions behind it are not there yet.
template <class C>
__device__ __forceinline__ void exponents_of_block(Consumer<C>& at, int block) {
  const int column = block * C::kKeys;
  bool is_plain = !at.changes_scores && column + C::kKeys <= at.every_high;
  if (C::kMasked) is_plain = is_plain && column >= at.every_low;
  if (!is_plain || at.softmax.rows != RowsState::kSettled) {
    at.change_and_mask(block);
    settle_rows<e4m3>(at.scores, at.softmax, at.scale);
  }
  take_exponents<e4m3>(at.scores, at.softmax, at.scale);
}

// Of all blocks before, the last one's sums with them.
template <class C>
__device__ __forceinline__ void rescale_sums(Consumer<C>& at) {
  at.add_part(0);
  rescale_output(at.output, at.softmax);
#pragma unroll
  for (float& each : at.of_block) each = 0.f;
#pragma unroll
  for (int r = 0; r < 2; ++r) at.softmax.sum[r] *= at.softmax.rescale[r];
}

// All blocks but the output of the last one; the first one's scores have arrived.
template <class C>
__device__ __forceinline__ void run_fp8_whole(Consumer<C>& at) {
  int block = at.block_end - 1;
  at.release_scores(false);
  exponents_of_block(at, block);
  take_probabilities(at.scores, at.softmax, at.probabilities, at.output, at.of_block);
  while (--block >= at.block_begin) {
    at.take_turn();
    at.wait_keys();
    at.issue_scores();
    at.issue_output(0);
    at.pass_turn();
    wgmma_wait<1>();
    at.release_scores(false);
    exponents_of_block(at, block);
    wgmma_wait<0>();
    pin_registers(at.of_block);
    at.release_output();
    if (at.softmax.must_rescale) rescale_sums(at);
    take_probabilities(at.scores, at.softmax, at.probabilities, at.output, at.of_block);
  }
  at.release_queries();
}

// As run_overlapped(), with four parts of the at.output: one in flight beside the at.scores'
// product, the others beside the work on the at.scores.
template <class C>
__device__ __forceinline__ void run_in_parts(Consumer<C>& at) {
  int block = at.block_end - 1;
  at.release_scores(block == at.block_begin);
  at.work_on_scores(block);
  while (true) {
    const bool keys_are_here = mbarrier_test(at.shared.k_full(at.k_at.stage()), at.k_at.parity());
    const bool values_are_here = mbarrier_test(at.shared.v_full(at.v_at.stage()), at.v_at.parity());
    rescale_output(at.output, at.softmax);
    pack_probabilities<e4m3>(at.scores, at.probabilities);
    if (--block < at.block_begin) return;
    at.take_turn();
    at.issue_output(0, values_are_here);
    if (!keys_are_here) at.wait_keys();
    at.issue_scores();
    at.pass_turn();
    wgmma_wait<1>();
    at.add_part(0);
    at.issue_part(1);
    wgmma_wait<1>();
    at.release_scores(block == at.block_begin);
    at.work_on_scores(block, [&](int i) { at.next_part(i + 2); });
    wgmma_wait<0>();
    at.add_part(3);
    at.release_output();
  }
}

template <class C>
__device__ __forceinline__ void run_fp8_blocks(Consumer<C>& consumer) {
  if constexpr (C::kParts > 1) {
    run_in_parts(consumer);
  } else {
    run_fp8_whole(consumer);
  }
}

}  // namespace jit_kernel::hopper
