// The consumer's blocks of an e4m3 cache: both products take their first operand from registers.
//
// Two blocks at a time where there are registers for them: the way from a block's keys to its part
// of the output takes 2,000 cycles, of which the next block's way shares most. What comes out is
// the same to the bit as block after block: where a reference or the unit of the values must change
// in between, that is what happens.
#pragma once

#include "flash_attention_v3/hopper/decode/consumer.cuh"

namespace jit_kernel::hopper {

// Of a block with scales of tokens: those of the thread's two keys' values, and the exponent of the
// block's largest.
template <class C>
struct DecodeConsumer<C>::ValueScales {
  float of_keys[2] = {1.f, 1.f};
  int exponent = 0;
};

// Waits for a block's keys and values, so that no branch stands beside a product. What no query
// sees becomes 0.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::wait_mixed(const DecodeItem& item, int row,
                                                              RingPosition<C::kStages>& ahead,
                                                              ValueScales& scales) {
  mbarrier_wait(shared.full(ahead.stage()), ahead.parity());
  ahead.advance();
  mbarrier_wait(shared.full(ahead.stage()), ahead.parity());
  const bool hides = row < item.low || row + kDecodeKeys > item.high;
  if (hides || has_drafts(item, row)) clear_values(item, row, ahead.stage());
  if (params.v.scales != nullptr) {
    const float* const of_block = shared.scales(ahead.stage(), stream);
    scales.of_keys[0] = of_block[first_key()];
    scales.of_keys[1] = of_block[first_key() + 8];
    scales.exponent = largest_exponent(of_block);
  }
  ahead.advance();
}

template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::clear_values(const DecodeItem& item, int row,
                                                                int stage) {
  clear_hidden_values(item, row, tile_of(stage));
  if (has_drafts(item, row)) {
    clear_unseen_values(item, row, tile_of(stage));
    const int key = threadIdx.x % 128;
    if (key < kDecodeKeys && !is_seen(item, row + key)) shared.scales(stage, stream)[key] = 0.f;
  }
  proxy_fence();  // the copy engine overwrites them
  stream_sync(stream);
}

// The unit is the stream's: all its threads find the same one.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::raise_value_unit(int exponent) {
  const int growth = exponent - value_exponent();
  if (growth <= 0) return;
  const float factor = growth > 126 ? 0.f : __int_as_float((127 - growth) << 23);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
    for (float& value : output[panel]) value *= factor;
  }
  set_value_exponent(exponent);
}

// Scores of queries in fp16 and keys in e4m3 become those of what they stand for.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::scale_scores(Scores (&scores)[C::kBlocksAtOnce],
                                                                int count) {
#pragma unroll
  for (int i = 0; i < kQueries; i += 2) {
    const float2 factor = *reinterpret_cast<const float2*>(shared.score_factors(stream) +
                                                           i / 2 * 8 + threadIdx.x % 4 * 2);
#pragma unroll
    for (Scores& of_block : scores) {
      of_block[2 * i] *= factor.x;
      of_block[2 * i + 1] *= factor.y;
      of_block[2 * i + 2] *= factor.x;
      of_block[2 * i + 3] *= factor.y;
    }
  }
  if (params.k.scales == nullptr) return;
#pragma unroll
  for (int block = 0; block < C::kBlocksAtOnce; ++block) {
    const float* const of_key =
        shared.scales(stage_behind(block < count ? 2 * block : 0), stream) + first_key();
    const float of_keys[2] = {of_key[0], of_key[8]};
#pragma unroll
    for (int i = 0; i < C::kRows / 2; ++i) scores[block][i] *= of_keys[i / 2 % 2];
  }
}

template <class C>
template <int kFirst, int kEnd>
__device__ __forceinline__ void DecodeConsumer<C>::multiply_values_mixed(Values& values, u32 p) {
  const u32 low = wgmma_descriptor_low(p, 16);
#pragma unroll
  for (int i = kFirst; i < kEnd; ++i) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const u32(&of)[4] = values[i][panel];
      wgmma_rs<fp16, false>(output[panel], of[0], of[1], of[2], of[3],
                            wgmma_descriptor<128>(low + (i * 32 >> 4)), 1);
    }
  }
  wgmma_commit();
}

template <class C>
template <int kFirst, int kEnd>
__device__ __forceinline__ void DecodeConsumer<C>::load_value_steps(Values& values, int stage) {
  const ValuePlaces places = value_places<C>(tile_of(stage));
#pragma unroll
  for (int i = kFirst; i < kEnd; ++i) load_values<C>(places, i, values[i]);
}

template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::load_value_stage(Values& values, int block,
                                                                    int count) {
  const int stage = stage_behind(block < count ? 2 * block + 1 : 1);
  load_value_steps<0, kDecodeKeys / 16>(values, stage);
  mbarrier_arrive_if(shared.empty(stage), threadIdx.x % 32 == 0 && block < count);
}

// A block's probabilities, and its part of the output. raises: references may be too low.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::settle_block(const Scores& scores,
                                                                const ValueScales& scales, u32 p,
                                                                Values& values, bool raises) {
  const float scale = params.scale_log2;
  const float threshold = fminf(kRescaleThreshold / scale, kLargestFloat);
  float of_keys[2] = {1.f, 1.f};
  if (params.v.scales != nullptr) {
    raise_value_unit(scales.exponent);
    const float unit = to_unit_of_values(value_exponent());
    of_keys[0] = scales.of_keys[0] * unit;
    of_keys[1] = scales.of_keys[1] * unit;
  }
  float sums[kQueries];
#pragma unroll 1
  while (true) {  // once, or again with references that were raised
    if (raises) raise(scores, threshold);
    u32 packed[C::kRows / 4];
    const bool grew = exponentiate<C>(scores, softmax, scale, threshold, of_keys, sums, packed);
    store_probabilities<C>(p, packed);
    proxy_fence();
    raises = stream_any(stream, grew);
    if (!raises) break;
  }
#pragma unroll
  for (int i = 0; i < kQueries; ++i) softmax.sum[i] += sums[i];
  constexpr int kSteps = kDecodeKeys / 16;
  if constexpr (C::kEarlyValues) {
    pin_output();
    wgmma_fence();
    multiply_values_mixed<0, kSteps>(values, p);
  } else {
    // The second half is converted while the first one is multiplied.
    const int stage = stage_behind(1);
    load_value_steps<0, kSteps / 2>(values, stage);
    pin_output();
    wgmma_fence();
    multiply_values_mixed<0, kSteps / 2>(values, p);
    load_value_steps<kSteps / 2, kSteps>(values, stage);
    release(shared.empty(stage));
    wgmma_fence();
    multiply_values_mixed<kSteps / 2, kSteps>(values, p);
  }
  wgmma_wait<0>();
  pin_output();
}

// Raw scores of blocks. One that is not there has the first one's keys, of which no query sees any.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::multiply_scores_mixed(
    Scores (&scores)[C::kBlocksAtOnce], int count) {
  u32 keys[C::kBlocksAtOnce][C::kHeadDim / 16][4];
#pragma unroll
  for (int i = 0; i < C::kBlocksAtOnce; ++i) {
    load_keys<C>(tile_of(stage_behind(i < count ? 2 * i : 0)), keys[i]);
  }
  const u32 q = wgmma_descriptor_low(shared.q(stream), 16);
#pragma unroll
  for (int i = 0; i < C::kBlocksAtOnce; ++i) {
    pin_registers(scores[i]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 16; ++j) {
      const u32 at_step = j / 4 * C::kRows * 128 + j % 4 * 32;
      wgmma_rs<fp16, false>(scores[i], keys[i][j][0], keys[i][j][1], keys[i][j][2], keys[i][j][3],
                            wgmma_descriptor<128>(q + (at_step >> 4)), j != 0);
    }
    wgmma_commit();
  }
}

template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::load_value_stages(
    Values (&values)[C::kBlocksAtOnce], int count) {
#pragma unroll
  for (int i = 0; i < C::kBlocksAtOnce; ++i) load_value_stage(values[i], i, count);
}

template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::run_mixed(const DecodeItem& item, int block,
                                                             int step, int count, bool is_first) {
  constexpr int kBlocks = C::kBlocksAtOnce;
  ValueScales scales[kBlocks];
  bool masks[kBlocks];
  RingPosition<C::kStages> ahead = at;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int row = (block + i * step) * kDecodeKeys;
    masks[i] = !all_see(item, row);
    if (i < count) wait_mixed(item, row, ahead, scales[i]);
  }
  Scores scores[kBlocks];
  Values values[kBlocks];
  multiply_scores_mixed(scores, count);
  // Beside the first product where there are registers, else behind it.
  constexpr bool kBeside = C::kEarlyValues && C::kRows * kBlocks <= 32;
  if constexpr (kBeside) load_value_stages(values, count);
  wgmma_wait<0>();
#pragma unroll
  for (Scores& of_block : scores) pin_registers(of_block);
  if constexpr (C::kEarlyValues && !kBeside) load_value_stages(values, count);
  scale_scores(scores, count);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    mbarrier_arrive_if(shared.empty(stage_behind(2 * i)), threadIdx.x % 32 == 0 && i < count);
    if (params.softcap_scale != 0.f) {
#pragma unroll
      for (float& score : scores[i]) score = tanh_fast(score * params.softcap_scale);
    }
    if (masks[i]) mask_scores_of(item, (block + i * step) * kDecodeKeys, scores[i]);
    if (i >= count) {
#pragma unroll
      for (float& score : scores[i]) score = minus_infinity();
    }
  }
  const u32 p = shared.p(stream, (state & 1) * kBlocks);
  state ^= 1;
  if constexpr (kBlocks == 1) {
    settle_block(scores[0], scales[0], p, values[0], is_first);
  } else if (is_first || !settle_blocks(scores, scales, p, values)) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      settle_block(scores[i], scales[i], p + i * C::kBytesP, values[i], i == 0);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    if (i < 2 * count) at.advance();
  }
}

// The same for all blocks together; false, and nothing has changed, where a reference is too low or
// the unit of the values changes in between.
template <class C>
__device__ __forceinline__ bool DecodeConsumer<C>::settle_blocks(
    const Scores (&scores)[C::kBlocksAtOnce], const ValueScales (&scales)[C::kBlocksAtOnce], u32 p,
    Values (&values)[C::kBlocksAtOnce]) {
  const float scale = params.scale_log2;
  const float threshold = fminf(kRescaleThreshold / scale, kLargestFloat);
  float unit = 1.f;
  if (params.v.scales != nullptr) {
#pragma unroll
    for (const ValueScales& of_block : scales) {
      if (of_block.exponent > value_exponent()) return false;
    }
    unit = to_unit_of_values(value_exponent());
  }
  float sums[C::kBlocksAtOnce][kQueries];
  bool grew = false;
#pragma unroll
  for (int i = 0; i < C::kBlocksAtOnce; ++i) {
    const float of_keys[2] = {scales[i].of_keys[0] * unit, scales[i].of_keys[1] * unit};
    u32 packed[C::kRows / 4];
    grew |= exponentiate<C>(scores[i], softmax, scale, threshold, of_keys, sums[i], packed);
    store_probabilities<C>(p + i * C::kBytesP, packed);
  }
  proxy_fence();
  if (stream_any(stream, grew)) return false;
  pin_output();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::kBlocksAtOnce; ++i) {
#pragma unroll
    for (int j = 0; j < kQueries; ++j) softmax.sum[j] += sums[i][j];
    multiply_values_mixed<0, kDecodeKeys / 16>(values[i], p + i * C::kBytesP);
  }
  wgmma_wait<0>();
  pin_output();
  return true;
}

// What a whole item's values have in common.
template <class C>
__device__ __forceinline__ void DecodeConsumer<C>::descale_output(const DecodeItem& item) {
  float factor = descale_of(params.v, item);
  if (value_exponent() > 0) factor *= from_unit_of_values(value_exponent());
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
    for (float& value : output[panel]) value *= factor;
  }
}

}  // namespace jit_kernel::hopper
