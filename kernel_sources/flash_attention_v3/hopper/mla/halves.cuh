// The two consumer warpgroups of a tile of 64 packed query rows, which take turns.
//
// Of a block of 128 keys the first one scores the 64 of the first buffer, the second one the 64 of
// the second; each multiplies all probabilities with its own half of the values' columns, 64 x 256
// numbers in registers. While one works on its scores, the other's products keep the tensor cores
// busy. A step of the first, with its products in the order in which they are begun:
//   scores of its keys; references raised, then told; own probabilities x values; told how the
//   second raised them, its own probabilities stored; the second's probabilities x values
// and of the second:
//   scores of its keys; told how the first raised the references, raised, then told; probabilities
//   stored; own probabilities x values; the first's probabilities x values
#pragma once

#include "flash_attention_v3/hopper/common/fragments.cuh"
#include "flash_attention_v3/hopper/mla/drafts.cuh"
#include "flash_attention_v3/hopper/mla/merge.cuh"
#include "flash_attention_v3/hopper/mla/mixed.cuh"
#include "flash_attention_v3/hopper/mla/softmax.cuh"

namespace jit_kernel::hopper {

// Named barriers at which one warpgroup arrives and the other waits.
constexpr int kMlaFirstRaised = 4, kMlaSecondRaised = 5, kMlaFirstStored = 6, kMlaSecondStored = 7;

// kSide: the buffer whose keys it scores, and the half of the columns that it puts out.
template <class C, int kSide>
struct MlaHalf {
  using Element = typename C::Element;
  static constexpr int kOther = 1 - kSide;
  static constexpr int kFirstPanel = kSide * C::kHalf;  // of its half of the values

  const MlaParams& params;
  const MlaShared<C> shared;
  u32 parity;  // of the buffers' present phase
  float references[2], sums[2];
  float scores[32];
  float output[C::kHeadDimV / 4];
  u32 rope[16];  // q as the first operand

  __device__ __forceinline__ void release(int buffer, bool does = true) {
    mbarrier_arrive_if(shared.empty(buffer, kSide), does && threadIdx.x % 32 == 0);
  }
  __device__ __forceinline__ void own_sync() { named_barrier_sync(kMlaOwnBarrier + kSide, 128); }

  // Products may begin behind it: a loop that waits ends what a fence before it has said.
  __device__ __forceinline__ void wait_keys(int panel) {
    if constexpr (C::kMixed) {
      if (panel % 2 == 0) convert_keys(panel);
    } else {
      mbarrier_wait(shared.full(kSide, panel), parity);
      if (params.box_rows == 0) proxy_fence();
    }
    wgmma_fence();
  }

  // Of an e4m3 cache, two panels or k. The other warpgroup reads its half of them behind a barrier
  // that this one reaches with all its scores.
  __device__ __forceinline__ void convert_keys(int panel) {
    mbarrier_wait(shared.full(kSide, panel / 2), parity);
    if (panel < C::kPanelsV) {
      convert_pair(shared.keys(kSide, panel));
    } else if (!params.only_qv) {
      convert_k(shared.keys(kSide, panel));
    }
    proxy_fence();
    own_sync();
  }

  // Scores over the columns of one half of the values; with the right half goes q k.
  template <int kHalf, bool kBegins>
  __device__ __forceinline__ void issue_scores() {
    const u32 q = wgmma_descriptor_low(shared.queries(0), 16);
    const u32 k = wgmma_descriptor_low(shared.keys(kSide, 0), 16);
#pragma unroll
    for (int panel = kHalf * C::kHalf; panel < (kHalf + 1) * C::kHalf; ++panel) {
      wait_keys(panel);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = panel * kMlaBytesPanel + i * 32 >> 4;
        const bool begins = kBegins && panel == kHalf * C::kHalf && i == 0;
        wgmma_ss<Element>(scores, wgmma_descriptor<128>(q + at), wgmma_descriptor<128>(k + at),
                          !begins);
      }
    }
    if constexpr (kHalf == 1) {
      wait_keys(C::kPanelsV);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = C::kPanelsV * kMlaBytesPanel + i * 32 >> 4;
        wgmma_rs<Element, false>(scores, rope[4 * i], rope[4 * i + 1], rope[4 * i + 2],
                                 rope[4 * i + 3], wgmma_descriptor<128>(k + at), 1);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ u64 values(int buffer, int step) const {
    const u32 v = wgmma_descriptor_low(shared.keys(buffer, kFirstPanel), kMlaBytesPanel);
    return wgmma_descriptor<128>(v + (step * 16 * 128 >> 4));
  }

  __device__ __forceinline__ void issue_own(const u32 (&packed)[4][4]) {
    pin_registers(output);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma_rs<Element, true>(output, packed[i][0], packed[i][1], packed[i][2], packed[i][3],
                              values(kSide, i), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_others() {
    const u32 p = wgmma_descriptor_low(shared.probabilities(kOther), 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma_ss<Element, false, true>(output, wgmma_descriptor<128>(p + (i * 32 >> 4)),
                                     values(kOther, i), 1);
    }
    wgmma_commit();
  }

  // Softcap, and -inf for keys that a row does not see. `row`: the cache's row of the first key.
  __device__ __forceinline__ void work_on_scores(const MlaItem& item, int row) {
    if constexpr (C::kMixed) {
      float factors[2];
      hear(shared.score_factors(), factors);
#pragma unroll
      for (int i = 0; i < 32; ++i) scores[i] *= factors[i / 2 % 2];
    }
    if (params.softcap_scale != 0.f) {
#pragma unroll
      for (float& score : scores) score = tanh_fast(score * params.softcap_scale);
    }
    const bool all_see = row >= shared.query(C::kRows - 1)->low &&
                         row + kMlaKeys <= min(shared.query(0)->high, item.plain_end);
    if (uniform(all_see) != 0) return;
    const int mine = accumulator_row(0);
    const DecodeQuery first = *shared.query(mine), second = *shared.query(mine + 8);
    const KeyInterval rows[2] = {{first.low, first.high}, {second.low, second.high}};
    mask_scores<true>(scores, rows, accumulator_column(row));
    mask_scores<false>(scores, rows, accumulator_column(row));
    if (uniform(has_mla_drafts(params, item, row)) == 0) return;
    mask_drafts<0>(drafts_of(params, item, first.token, row));
    mask_drafts<1>(drafts_of(params, item, second.token, row));
  }

  // -inf for the keys that one of the thread's rows does not see.
  template <int kRow>
  __device__ __forceinline__ void mask_drafts(u64 seen) {
    const u64 of_thread = seen >> accumulator_column(0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[4 * i + 2 * kRow + c];
        score = (of_thread >> (8 * i + c) & 1) != 0 ? score : minus_infinity();
      }
    }
  }

  // Zeros for this half's values of keys that no row sees: they may hold anything, and 0 times NaN
  // is NaN.
  __device__ __forceinline__ void clear_hidden(const MlaItem& item, int row, int buffer) {
    const u64 seen = seen_keys<C>(params, shared, item, row);
    const u32 v = shared.keys(buffer, kFirstPanel);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < C::kHalf * kMlaKeys * 8; i += 128) {
      const int key = i % (kMlaKeys * 8) / 8;
      if ((seen >> key & 1) == 0) store_zeros(v + i * 16);
    }
  }

  __device__ __forceinline__ void after_clearing() {
    proxy_fence();
    own_sync();
  }

  // The rows' numbers of a warpgroup, one thread of four.
  __device__ __forceinline__ void tell(float* to, const float (&numbers)[2]) const {
    if (threadIdx.x % 4 == 0) {
      to[accumulator_row(0)] = numbers[0];
      to[accumulator_row(8)] = numbers[1];
    }
  }
  __device__ __forceinline__ void hear(const float* from, float (&numbers)[2]) const {
    numbers[0] = from[accumulator_row(0)];
    numbers[1] = from[accumulator_row(8)];
  }

  __device__ __forceinline__ void run_block_of_first(const MlaItem& item, int block) {
    pin_registers(scores);
    issue_scores<0, true>();
    issue_scores<1, false>();
    wgmma_wait<0>();
    pin_registers(scores);
    work_on_scores(item, block * kMlaBlockKeys);
    float tops[2], factors[2];
    find_tops(scores, tops);
    raise_rows(tops, params.scale_log2, references, factors);
    tell(shared.references(0), references);
    tell(shared.factors(0), factors);
    named_barrier_arrive(kMlaFirstRaised, 256);
    sums[0] *= factors[0];
    sums[1] *= factors[1];
    exponentiate_rows(scores, references, params.scale_log2, sums);
    const float ones[2] = {1.f, 1.f};
    u32 packed[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pack_step<Element>(scores, i, ones, packed[i]);
    scale_rows(output, factors);
    own_sync_if_cleared(item, block, 0, true);
    issue_own(packed);
    named_barrier_sync(kMlaSecondRaised, 256);
    hear(shared.references(1), references);
    hear(shared.factors(1), factors);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 scaled[4];
      pack_step<Element>(scores, i, factors, scaled);
      store_step(shared.probabilities(0), i, scaled);
    }
    proxy_fence();
    named_barrier_arrive(kMlaFirstStored, 256);
    sums[0] *= factors[0];
    sums[1] *= factors[1];
    wgmma_wait<0>();
    pin_registers(output);
    release(0);
    scale_rows(output, factors);
    named_barrier_sync(kMlaSecondStored, 256);
    own_sync_if_cleared(item, block, 1, false);
    pin_registers(output);
    issue_others();
    wgmma_wait<0>();
    pin_registers(output);
    release(1);
  }

  // Clears what is hidden of a buffer. meets: the warps may still read it for scores.
  __device__ __forceinline__ void own_sync_if_cleared(const MlaItem& item, int block, int buffer,
                                                      bool meets) {
    const int row = block * kMlaBlockKeys + buffer * kMlaKeys;
    const bool all_seen = row >= item.low && row + kMlaKeys <= item.plain_end;
    if (uniform(all_seen) != 0) return;
    if (meets) own_sync();
    clear_hidden(item, row, buffer);
    after_clearing();
  }

  __device__ __forceinline__ void run_block_of_second(const MlaItem& item, int block) {
    pin_registers(scores);
    issue_scores<1, true>();
    issue_scores<0, false>();
    wgmma_wait<0>();
    pin_registers(scores);
    work_on_scores(item, block * kMlaBlockKeys + kMlaKeys);
    float tops[2], before[2], factors[2];
    find_tops(scores, tops);
    named_barrier_sync(kMlaFirstRaised, 256);
    hear(shared.references(0), references);
    hear(shared.factors(0), before);
    raise_rows(tops, params.scale_log2, references, factors);
    tell(shared.references(1), references);
    tell(shared.factors(1), factors);
    named_barrier_arrive(kMlaSecondRaised, 256);
    factors[0] *= before[0];
    factors[1] *= before[1];
    sums[0] *= factors[0];
    sums[1] *= factors[1];
    exponentiate_rows(scores, references, params.scale_log2, sums);
    const float ones[2] = {1.f, 1.f};
    u32 packed[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pack_step<Element>(scores, i, ones, packed[i]);
      store_step(shared.probabilities(1), i, packed[i]);
    }
    proxy_fence();
    named_barrier_arrive(kMlaSecondStored, 256);
    scale_rows(output, factors);
    own_sync_if_cleared(item, block, 1, false);
    own_sync_if_cleared(item, block, 0, false);
    issue_own(packed);
    named_barrier_sync(kMlaFirstStored, 256);
    issue_others();
    wgmma_wait<1>();
    release(1);
    wgmma_wait<0>();
    pin_registers(output);
    release(0);
  }

  __device__ __forceinline__ void run_blocks(const MlaItem& item) {
    const int begin = uniform(item.begin[0]), end = uniform(item.end[0]);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      if constexpr (kSide == 0) {
        run_block_of_first(item, block);
      } else {
        run_block_of_second(item, block);
      }
      parity ^= 1;
    }
  }

  __device__ __forceinline__ void run_item(const MlaItem& item) {
    load_fragments<4, 64>(rope, shared.queries(C::kPanelsV));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      references[r] = minus_infinity();
      sums[r] = 0.f;
    }
#pragma unroll
    for (float& value : output) value = 0.f;
    run_blocks(item);
    if constexpr (C::kMixed) {
      const int head = static_cast<int>(blockIdx.x) / params.row_tiles;
      const float factor = descale_of_rows(params.v, item.batch, head);
#pragma unroll
      for (float& value : output) value *= factor;
    }
    const float mine[2] = {quad_sum(sums[0]), quad_sum(sums[1])};
    tell(shared.sums(kSide), mine);
    consumers_sync();
    float others[2];
    hear(shared.sums(kOther), others);
    // In one order on both sides.
    const float first[2] = {kSide == 0 ? mine[0] : others[0], kSide == 0 ? mine[1] : others[1]};
    const float second[2] = {kSide == 0 ? others[0] : mine[0], kSide == 0 ? others[1] : mine[1]};
    const float total[2] = {first[0] + second[0], first[1] + second[1]};
    if (item.parts == 1) {
      store_mla_rows<C, kSide>(params, item, shared, references, total, output);
    } else {
      store_mla_partial<C, kSide>(params, item, references, total, output);
    }
  }
};

}  // namespace jit_kernel::hopper
