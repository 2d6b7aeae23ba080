// A consumer warpgroup of the backward kernel: 64 keys, whose gradients it keeps in registers over
// all queries.
//
// Scores and the gradients of probabilities are computed with keys as rows, so that probabilities
// and the gradients of scores are operands of the next products where they lie; the latter also go
// to shared memory for grad_q, of which each warpgroup computes a part from all keys of the block.
// Each product in flight has work of the warps beside it: the exponentials run beside the gradients
// of probabilities, the gradients of scores beside grad_v, the store of grad_q beside grad_k and
// the next tile's scores.
#pragma once

#include "flash_attention_v3/hopper/backward/scores.cuh"

namespace jit_kernel::hopper {

template <class C>
struct BackwardConsumer : ScoresOfKeys<C> {
  using Element = typename C::Element;
  using Base = ScoresOfKeys<C>;
  using Base::kScores, Base::params, Base::shared, Base::tile, Base::warpgroup;

  float grad_k[C::kHeadDim / 2], grad_v[C::kHeadDim / 2];
  float scores[kScores], grads[kScores];  // the gradients of probabilities
  float sums[32];
  u32 packed[kScores / 2];        // probabilities
  u32 packed_grads[kScores / 2];  // gradients of scores
  RingPosition<C::kStages> at;

  __device__ __forceinline__ BackwardConsumer(const BackwardParams& params,
                                              const BackwardShared<C>& shared, const KeyTile& tile,
                                              int warpgroup)
      : Base(params, shared, tile, warpgroup, warpgroup * kRowsPerWarpgroup) {}

  // keys x queries, of two tiles with the head size as k: K Q^T, V dO^T.
  __device__ __forceinline__ void issue_scores(float (&to)[kScores], u32 keys, u32 queries) {
    const u32 a = wgmma_descriptor_low(keys + warpgroup * kRowsPerWarpgroup * 128, 16);
    const u32 b = wgmma_descriptor_low(queries, 16);
    pin_registers(to);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const u32 of_a = i / 4 * C::kPanelKeys + i % 4 * 32;
      const u32 of_b = i / 4 * C::kPanelQueries + i % 4 * 32;
      wgmma_ss<Element>(to, wgmma_descriptor<128>(a + (of_a >> 4)),
                        wgmma_descriptor<128>(b + (of_b >> 4)), i != 0);
    }
    wgmma_commit();
  }

  // keys x head size, from registers and a tile of queries: grad_v and grad_k.
  __device__ __forceinline__ void issue_gradient(float (&to)[C::kHeadDim / 2],
                                                 const u32 (&from)[kScores / 2], u32 queries) {
    const u32 b = wgmma_descriptor_low(queries, C::kPanelQueries);
    pin_registers(to);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      wgmma_rs<Element, true>(to, from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3],
                              wgmma_descriptor<128>(b + (i * 16 * 128 >> 4)), 1);
    }
    wgmma_commit();
  }

  // This warpgroup's part of grad_q, 64 queries x 64 columns, from all keys of the block.
  __device__ __forceinline__ void issue_sums(int buffer) {
    const int row = warpgroup / C::kPartColumns, column = warpgroup % C::kPartColumns;
    const u32 a = wgmma_descriptor_low(shared.scores(buffer) + row * C::kPanelKeys, 16);
    const u32 b = wgmma_descriptor_low(shared.k() + column * C::kPanelKeys, 16);
    pin_registers(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
      wgmma_ss<Element, true, true>(sums, wgmma_descriptor<128>(a + (i * 16 * 128 >> 4)),
                                    wgmma_descriptor<128>(b + (i * 16 * 128 >> 4)), i != 0);
    }
    wgmma_commit();
  }

  // Where this thread keeps 16 bytes of each 16 queries for itself until its warp stores gradients
  // of scores there: registers are few.
  __device__ __forceinline__ u32 own_words(int buffer, int i) const {
    return shared.scores(buffer) + i / 4 * C::kPanelKeys + i % 4 * 512 + threadIdx.x % 32 * 16 +
           (warpgroup * kRowsPerWarpgroup + first_row_of_warp()) * 128;
  }

  // Scores of 16 queries to those that softcap makes of them, over the cap, and its slopes there.
  __device__ __forceinline__ void cap_scores(int stage, int i) {
    u32 slopes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& a = scores[8 * i + 2 * j];
      float& b = scores[8 * i + 2 * j + 1];
      a = tanh_fast(a * params.softcap_scale);
      b = tanh_fast(b * params.softcap_scale);
      slopes[j] = pack<Element>(fmaf(-a, a, 1.f), fmaf(-b, b, 1.f));
    }
    store_words(own_words(stage, i), slopes);
  }

  // Scores of a tile to probabilities.
  __device__ __forceinline__ void work_on_scores(int row, int stage) {
    const u32 lse = shared.lse(stage) + accumulator_column(0) * 4;
#pragma unroll
    for (int i = 0; i < C::kQueries / 8; ++i) {
      if (C::kSoftcap && i % 2 == 0) cap_scores(stage, i / 2);
      const float2 two = load_two(lse + 32 * i);
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4; ++j) {
        scores[j] = exp2_fast(fmaf(scores[j], params.scale_log2, j % 2 ? -two.y : -two.x));
      }
    }
    if (this->is_masked(row)) this->mask(scores, row);
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      packed[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // The gradients of scores, P (dP - D), of rounded probabilities: float32 ones would take the
  // registers of the next tile's scores.
  __device__ __forceinline__ void work_on_gradients(int row, int stage) {
    const u32 delta = shared.delta(stage) + accumulator_column(0) * 4;
#pragma unroll
    for (int i = 0; i < C::kQueries / 8; ++i) {
      const float2 two = load_two(delta + 32 * i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 p = unpack<Element>(packed[2 * i + r]);
        float* const grad = grads + 4 * i + 2 * r;
        grad[0] = p.x * (grad[0] - two.x);
        grad[1] = p.y * (grad[1] - two.y);
      }
      if (C::kSoftcap && i % 2 == 1) multiply_slopes(stage, i / 2);
    }
    if (this->is_masked(row)) this->mask(grads, row);
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      packed_grads[i] = pack<Element>(grads[2 * i], grads[2 * i + 1]);
    }
    if constexpr (C::kSoftcap) __syncwarp();  // all have read what store_gradients() overwrites
  }

  __device__ __forceinline__ void multiply_slopes(int stage, int i) {
    u32 slopes[4];
    load_words(own_words(stage, i), slopes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 two = unpack<Element>(slopes[j]);
      grads[8 * i + 2 * j] *= two.x;
      grads[8 * i + 2 * j + 1] *= two.y;
    }
  }

  __device__ __forceinline__ void store_gradients(int buffer) {
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      store_matrices(this->matrices(shared.scores(buffer), warpgroup * kRowsPerWarpgroup, i),
                     packed_grads + 4 * i);
    }
  }

  // One tile of queries, whose scores have arrived. Of the tile behind the last one scores are
  // issued as well, of what lies there, and not used. Where registers allow, grad_k is left in
  // flight for the next step, beside its exponentials.
  __device__ __forceinline__ void step(int row, bool first, bool last) {
    const int stage = at.stage();
    const u32 parity = at.parity();
    mbarrier_wait(shared.grad_out_full(stage), parity);
    issue_scores(grads, shared.v(), shared.grad_out(stage));
    work_on_scores(row, stage);
    this->clear_blind_queries(row, shared.q(stage), shared.grad_out(stage));
    issue_gradient(grad_v, packed, shared.grad_out(stage));
    wgmma_wait<1>();
    pin_registers(grads);
    if constexpr (C::kCarriesGradK) {
      pin_registers(grad_k);
      mbarrier_arrive_if(shared.q_empty(stage ^ 1), !first && threadIdx.x % 32 == 0);
    }
    work_on_gradients(row, stage);
    store_gradients(stage);
    proxy_fence();
    named_barrier_sync(kScoresBarrier, 256);
    issue_sums(stage);
    wgmma_wait<1>();
    this->release(shared.grad_out_empty(stage));
    at.advance();
    if constexpr (!C::kCarriesGradK) issue_gradient(grad_k, packed_grads, shared.q(stage));
    if (!last) mbarrier_wait(shared.q_full(at.stage()), at.parity());
    issue_scores(scores, shared.k(), shared.q(at.stage()));
    if constexpr (C::kCarriesGradK) issue_gradient(grad_k, packed_grads, shared.q(stage));
    wgmma_wait<2>();
    pin_registers(sums);
    this->store_part(sums);
    wgmma_wait<C::kCarriesGradK ? 1 : 0>();
    pin_registers(scores);
    if constexpr (!C::kCarriesGradK) this->release(shared.q_empty(stage));
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.f;
    const int tiles = uniform(tile.end - tile.begin);
    if (tiles == 0) return;
    mbarrier_wait(shared.keys_full(), 0);
    this->clear_hidden_keys();
    mbarrier_wait(shared.q_full(0), 0);
    issue_scores(scores, shared.k(), shared.q(0));
    wgmma_wait<0>();
    pin_registers(scores);
    int row = tile.begin * C::kQueries;
    const int end = tile.end * C::kQueries;
    for (int left = tiles * params.group; left > 0; --left) {
      step(row, left == tiles * params.group, left == 1);
      row += C::kQueries;
      if (row == end) row = tile.begin * C::kQueries;
    }
    wgmma_wait<0>();
    pin_registers(scores);
    pin_registers(grad_k);
    pin_registers(grad_v);
  }
};

}  // namespace jit_kernel::hopper
