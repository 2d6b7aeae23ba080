// A consumer warpgroup of the backward kernel at head sizes above 128, whose gradients of 64 keys
// take twice the registers of a thread: both warpgroups have the same keys, and half of the columns
// of grad_k, grad_v and grad_q each.
//
// The first computes scores and probabilities, the second the gradients of probabilities and those
// of scores, which it gets from both; they exchange them through shared memory, from where all
// other products take them. The exponentials run beside grad_k of the tile before, the gradients of
// scores beside grad_v.
#pragma once

#include "flash_attention_v3/hopper/backward/scores.cuh"

namespace jit_kernel::hopper {

template <class C>
struct WideConsumer : ScoresOfKeys<C> {
  using Element = typename C::Element;
  using Base = ScoresOfKeys<C>;
  using Base::kScores, Base::params, Base::shared, Base::tile, Base::warpgroup;
  static constexpr int kColumns = C::kHeadDim / C::kWarpgroups;
  static_assert(C::kTurns == 2, "see step()");

  float grad_k[kColumns / 2], grad_v[kColumns / 2];
  float sums[32];         // of a part of grad_q
  float scores[kScores];  // of the second warpgroup: the gradients of probabilities
  RingPosition<C::kStages> q_at;
  RingPosition<C::kStagesGradOut> grad_at;

  __device__ __forceinline__ WideConsumer(const BackwardParams& params,
                                          const BackwardShared<C>& shared, const KeyTile& tile,
                                          int warpgroup)
      : Base(params, shared, tile, warpgroup, 0) {}

  __device__ __forceinline__ u32 probabilities(int buffer) const { return shared.scores(buffer); }
  __device__ __forceinline__ u32 gradients(int buffer) const {
    return shared.scores(C::kStages + buffer);
  }

  // keys x queries: K Q^T of the first warpgroup, V dO^T of the second.
  __device__ __forceinline__ void issue_scores() {
    const bool first = warpgroup == 0;
    const u32 a = wgmma_descriptor_low(first ? shared.k() : shared.v(), 16);
    const u32 b =
        wgmma_descriptor_low(first ? shared.q(q_at.stage()) : shared.grad_out(grad_at.stage()), 16);
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const u32 of_a = i / 4 * C::kPanelKeys + i % 4 * 32;
      const u32 of_b = i / 4 * C::kPanelQueries + i % 4 * 32;
      wgmma_ss<Element>(scores, wgmma_descriptor<128>(a + (of_a >> 4)),
                        wgmma_descriptor<128>(b + (of_b >> 4)), i != 0);
    }
    wgmma_commit();
  }

  // keys x this warpgroup's columns, from scores in shared memory and a tile of queries.
  __device__ __forceinline__ void issue_gradient(float (&to)[kColumns / 2], u32 from, u32 queries) {
    const u32 a = wgmma_descriptor_low(from, 16);
    const u32 b = wgmma_descriptor_low(
        queries + warpgroup * (kColumns / C::kPanel) * C::kPanelQueries, C::kPanelQueries);
    pin_registers(to);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      wgmma_ss<Element, false, true>(to, wgmma_descriptor<128>(a + (i * 32 >> 4)),
                                     wgmma_descriptor<128>(b + (i * 16 * 128 >> 4)), 1);
    }
    wgmma_commit();
  }

  // queries x 64 of this warpgroup's columns: all of them would take the registers of scores.
  __device__ __forceinline__ void issue_sums(u32 from, int turn) {
    const u32 a = wgmma_descriptor_low(from, 16);
    const u32 b =
        wgmma_descriptor_low(shared.k() + (warpgroup * C::kTurns + turn) * C::kPanelKeys, 16);
    pin_registers(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
      wgmma_ss<Element, true, true>(sums, wgmma_descriptor<128>(a + (i * 16 * 128 >> 4)),
                                    wgmma_descriptor<128>(b + (i * 16 * 128 >> 4)), i != 0);
    }
    wgmma_commit();
  }

  // Of the first warpgroup: 16 queries at a time to probabilities; with softcap what the second
  // multiplies, the slope's product, lies where it puts the gradients of scores.
  __device__ __forceinline__ void make_probabilities(int row, int buffer) {
    const u32 lse = shared.lse(q_at.stage()) + accumulator_column(0) * 4;
    float slopes[C::kSoftcap ? kScores : 1];
#pragma unroll
    for (int i = 0; i < C::kQueries / 8; ++i) {
      const float2 two = load_two(lse + 32 * i);
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4; ++j) {
        if constexpr (C::kSoftcap) scores[j] = tanh_fast(scores[j] * params.softcap_scale);
        if constexpr (C::kSoftcap) slopes[j] = fmaf(-scores[j], scores[j], 1.f);
        scores[j] = exp2_fast(fmaf(scores[j], params.scale_log2, j % 2 ? -two.y : -two.x));
      }
    }
    if (this->is_masked(row)) this->mask(scores, row);
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = pack<Element>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
      }
      store_matrices(this->matrices(probabilities(buffer), 0, i), words);
      if constexpr (C::kSoftcap) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          words[j] = pack<Element>(scores[8 * i + 2 * j] * slopes[8 * i + 2 * j],
                                   scores[8 * i + 2 * j + 1] * slopes[8 * i + 2 * j + 1]);
        }
        store_matrices(this->matrices(gradients(buffer), 0, i), words);
      }
    }
  }

  // Of the second: P (dP - D).
  __device__ __forceinline__ void make_gradients(int row, int buffer) {
    const u32 delta = shared.delta(grad_at.stage()) + accumulator_column(0) * 4;
    const u32 from = C::kSoftcap ? gradients(buffer) : probabilities(buffer);
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      u32 words[4];
      load_matrices(this->matrices(from, 0, i), words);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = load_two(delta + 32 * (2 * i + j / 2));
        const float2 p = unpack<Element>(words[j]);
        scores[8 * i + 2 * j] = p.x * (scores[8 * i + 2 * j] - two.x);
        scores[8 * i + 2 * j + 1] = p.y * (scores[8 * i + 2 * j + 1] - two.y);
      }
    }
    if (this->is_masked(row)) this->mask(scores, row);
    if constexpr (C::kSoftcap) __syncwarp();
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = pack<Element>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
      }
      store_matrices(this->matrices(gradients(buffer), 0, i), words);
    }
  }

  __device__ __forceinline__ void wait_for_scores_operand() {
    if (warpgroup == 0) {
      mbarrier_wait(shared.q_full(q_at.stage()), q_at.parity());
    } else {
      mbarrier_wait(shared.grad_out_full(grad_at.stage()), grad_at.parity());
    }
  }

  // One tile of queries, whose scores have arrived. Of the tile behind the last one scores are
  // issued as well, of what lies there, and not used.
  __device__ __forceinline__ void step(int row, bool last) {
    const int buffer = q_at.stage();
    const u32 q = shared.q(q_at.stage()), grad_out = shared.grad_out(grad_at.stage());
    if (warpgroup == 0) {
      make_probabilities(row, buffer);
      proxy_fence();
      mbarrier_wait(shared.grad_out_full(grad_at.stage()), grad_at.parity());
    } else {
      mbarrier_wait(shared.q_full(q_at.stage()), q_at.parity());
    }
    named_barrier_sync(kScoresBarrier, 256);
    this->clear_blind_queries(row, q, grad_out);
    issue_gradient(grad_v, probabilities(buffer), grad_out);
    if (warpgroup == 1) {
      make_gradients(row, buffer);
      proxy_fence();
    }
    named_barrier_sync(kScoresBarrier + 1, 256);
    issue_sums(gradients(buffer), 0);
    wgmma_wait<1>();
    pin_registers(grad_v);
    this->release(shared.grad_out_empty(grad_at.stage()));
    const u32 q_empty = shared.q_empty(q_at.stage());
    q_at.advance();
    grad_at.advance();
    issue_gradient(grad_k, gradients(buffer), q);
    wgmma_wait<1>();
    pin_registers(sums);
    this->store_part(sums);
    issue_sums(gradients(buffer), 1);
    if (!last) wait_for_scores_operand();
    issue_scores();
    wgmma_wait<1>();
    pin_registers(sums);
    this->store_part(sums);
    this->release(q_empty);
    wgmma_wait<0>();
    pin_registers(scores);
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) grad_k[i] = grad_v[i] = 0.f;
    const int tiles = uniform(tile.end - tile.begin);
    if (tiles == 0) return;
    mbarrier_wait(shared.keys_full(), 0);
    this->clear_hidden_keys();
    wait_for_scores_operand();
    issue_scores();
    wgmma_wait<0>();
    pin_registers(scores);
    int row = tile.begin * C::kQueries;
    const int end = tile.end * C::kQueries;
    for (int left = tiles * params.group; left > 0; --left) {
      step(row, left == 1);
      row += C::kQueries;
      if (row == end) row = tile.begin * C::kQueries;
    }
    pin_registers(grad_k);
    pin_registers(grad_v);
  }
};

}  // namespace jit_kernel::hopper
