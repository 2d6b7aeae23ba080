// The blocks of keys of a tile in a consumer warpgroup, in e4m3.
//
// Exponentials leave seven of eight issue slots free. The additions of the block before, or of a
// part of this one, and the conversion to probabilities take some of them, in stretches of code
// without a branch, written in the order in which they should run. Additions between the two
// products took 9 % of a step at d 128, as registers that the tensor cores use come late, and the
// conversion behind the exponentials another 10 %.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/config.h"
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

template <class C>
struct Consumer;

// Exponents of four keys, those of one packed register, become probabilities.
template <int kCount>
__device__ __forceinline__ void take_four(float (&scores)[kCount], int packed,
                                          float (&sums)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& score = scores[first_packed(packed) + i % 2 + i / 2 * 4];
    score = exp2_fast(score);
    sums[packed % 2][i % 2] += score;
  }
}

// Of packed registers kFirst to kEnd.
template <int kFirst, int kEnd, int kCount>
__device__ __forceinline__ void take_packed(float (&scores)[kCount], float (&sums)[2][2]) {
#pragma unroll
  for (int i = kFirst; i < kEnd; ++i) take_four(scores, i, sums);
}

// The same, and beside them what the tensor cores summed is added to the
// output.
template <int kFirst, int kEnd, int kCount, int kAdded>
__device__ __forceinline__ void take_and_add(float (&scores)[kCount], float (&sums)[2][2],
                                             float* output, const float (&added)[kAdded]) {
  constexpr int kEach = kAdded / (kEnd - kFirst);
#pragma unroll
  for (int i = 0; i < kEnd - kFirst; ++i) {
    take_four(scores, kFirst + i, sums);
#pragma unroll
    for (int j = i * kEach; j < (i + 1) * kEach; ++j) output[j] += added[j];
  }
}

__device__ __forceinline__ void add_row_sums(Softmax& state, const float (&sums)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) state.sum[r] += sums[r][0] + sums[r][1];
}

// Whether references changed, and with them the factors of what blocks before left.
//
// Most blocks need none of what a branch leads to: each jump over code that is not run costs 15 to
// 25 cycles, as the instructions behind it are not there yet. Were it asked first whether rows are
// far, the vote's answer would go through four registers, 45 cycles. The last branch must stay in
// front of the wait for products that comes next: within one basic block ptxas moves that wait
// above the exponents.
template <class C>
__device__ __forceinline__ bool find_exponents(Consumer<C>& at, int block) {
  const int column = block * C::kKeys;
  bool is_plain = !at.changes_scores && column + C::kKeys <= at.every_high;
  if (C::kMasked) is_plain = is_plain && column >= at.every_low;
  if (!is_plain || at.softmax.rows != RowsState::kSettled) {
    at.change_and_mask(block);
    settle_rows<e4m3>(at.scores, at.softmax, at.scale);
  }
  int highest[2];
  find_exponents<e4m3>(at.scores, at.softmax, at.scale, highest);
  const bool far = at.softmax.rows == RowsState::kFar;
  const bool rescales = exceed_threshold<e4m3>(highest) | far;
  if (rescales && !far) raise_references<e4m3>(at.scores, at.softmax, at.scale, highest);
  return rescales;
}

// What blocks before the present one left, where it has a new reference.
template <class C>
__device__ __forceinline__ void rescale_sums(Consumer<C>& at) {
#pragma unroll
  for (int i = 0; i < C::kHeadDimV / 2; ++i) at.output[i] *= at.softmax.rescale[i / 2 % 2];
#pragma unroll
  for (int r = 0; r < 2; ++r) at.softmax.sum[r] *= at.softmax.rescale[r];
}

// Of a tile's first block: there is nothing to add to, nor to rescale.
template <class C>
__device__ __forceinline__ void take_first_block(Consumer<C>& at) {
  find_exponents(at, at.block_end - 1);
  float sums[2][2] = {};
  take_packed<0, C::kKeys / 8>(at.scores, sums);
  add_row_sums(at.softmax, sums);
  pack_probabilities<e4m3>(at.scores, at.probabilities);
}

// All blocks but the output of the last one; the first one's scores have arrived. The next tile's
// queries have a stage of their own, so that these are given back at the end.
template <class C>
__device__ __forceinline__ void run_whole(Consumer<C>& at) {
  static_assert(C::kStagesQ > 1, "queries are given back late");
  constexpr int kPacked = C::kKeys / 8;
  at.release_scores(false);
  take_first_block(at);
  for (int block = at.block_end - 2; block >= at.block_begin; --block) {
    at.take_turn();
    at.wait_keys();
    at.issue_scores();
    at.issue_output(0);
    at.pass_turn();
    wgmma_wait<1>();
    at.release_scores(false);
    const bool rescales = find_exponents(at, block);
    wgmma_wait<0>();  // the output was done before the exponents were
    pin_registers(at.of_block);
    at.release_output();
    if (rescales) {
      at.add_part(0);
      rescale_sums(at);
#pragma unroll
      for (float& each : at.of_block) each = 0.f;  // it is added below once more
    }
    float sums[2][2] = {};
    take_and_add<0, kPacked>(at.scores, sums, at.output, at.of_block);
    add_row_sums(at.softmax, sums);
    pack_probabilities<e4m3>(at.scores, at.probabilities);
  }
  at.release_queries();
}

// The same with four parts of the output: one in flight beside the scores' product, the others
// beside the exponentials.
template <class C>
__device__ __forceinline__ void run_in_parts(Consumer<C>& at) {
  constexpr int kStep = C::kKeys / 32;  // packed registers between two parts
  constexpr int kPart = C::kPartColumns / 2;
  at.release_scores(at.block_end - 1 == at.block_begin);
  take_first_block(at);
  for (int block = at.block_end - 2; block >= at.block_begin; --block) {
    at.take_turn();
    at.issue_output(0);
    at.wait_keys();
    at.issue_scores();
    at.pass_turn();
    wgmma_wait<1>();
    at.add_part(0);
    at.issue_part(1);
    wgmma_wait<1>();
    at.release_scores(block == at.block_begin);
    const bool rescales = find_exponents(at, block);
    wgmma_wait<0>();
    pin_registers(at.of_block);
    float sums[2][2] = {};
    take_and_add<0, kStep>(at.scores, sums, at.output + kPart, at.of_block);
    at.issue_part(2);
    take_packed<kStep, 2 * kStep>(at.scores, sums);
    wgmma_wait<0>();
    pin_registers(at.of_block);
    take_and_add<2 * kStep, 3 * kStep>(at.scores, sums, at.output + 2 * kPart, at.of_block);
    at.issue_part(3);
    take_packed<3 * kStep, 4 * kStep>(at.scores, sums);
    wgmma_wait<0>();
    at.release_output();
    at.add_part(3);
    if (rescales) rescale_sums(at);
    add_row_sums(at.softmax, sums);
    pack_probabilities<e4m3>(at.scores, at.probabilities);
  }
}

template <class C>
__device__ __forceinline__ void run_fp8_blocks(Consumer<C>& consumer) {
  if constexpr (C::kParts > 1) {
    run_in_parts(consumer);
  } else {
    run_whole(consumer);
  }
}

}  // namespace jit_kernel::hopper
