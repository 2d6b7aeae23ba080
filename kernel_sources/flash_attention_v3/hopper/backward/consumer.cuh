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

#include "flash_attention_v3/hopper/backward/producer.cuh"
#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

enum : int { kScoresBarrier = 1, kRowsBarrier = 2 };  // named; the latter one a warpgroup

__device__ __forceinline__ float2 load_two(u32 address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_words(u32 address, const u32 (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void load_words(u32 address, u32 (&words)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

template <class Element>
__device__ __forceinline__ float2 unpack(u32 two) {
  if constexpr (kIsBf16<Element>) {
    return {__int_as_float(two << 16), __int_as_float(two & 0xffff0000u)};
  }
  float2 value;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(two));
  return value;
}

template <class C>
struct BackwardConsumer {
  using Element = typename C::Element;
  static constexpr int kScores = C::kQueries / 2;  // registers of a tile's scores

  const BackwardParams& params;
  BackwardShared<C> shared;
  const KeyTile& tile;
  const int warpgroup;
  float grad_k[C::kHeadDim / 2], grad_v[C::kHeadDim / 2];
  float scores[kScores], grads[kScores];  // the gradients of probabilities
  float sums[32];
  u32 packed[kScores / 2];       // probabilities
  u32 packed_grads[kScores / 2]; // gradients of scores
  QueryInterval rows[2];         // that see this thread's keys
  int every_low, every_high;     // queries that see all keys of the warpgroup
  int seeing_row;                // the first that sees some key
  RingPosition<C::kStages> at;
  u32 sums_parity = 1;

  __device__ __forceinline__ BackwardConsumer(const BackwardParams& params,
                                              const BackwardShared<C>& shared, const KeyTile& tile,
                                              int warpgroup)
      : params(params), shared(shared), tile(tile), warpgroup(warpgroup) {
    const int first = tile.first_key + warpgroup * kRowsPerWarpgroup;
    const int key = accumulator_row(first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r] = seeing_queries(params, key + 8 * r, tile.len_q, tile.len_k);
      if (key + 8 * r >= tile.len_k) rows[r] = {0, 0};
    }
    const int last = first + kRowsPerWarpgroup - 1;
    every_low = uniform(seeing_queries(params, last, tile.len_q, tile.len_k).low);
    every_high = uniform(seeing_queries(params, first, tile.len_q, tile.len_k).high);
    if (uniform(last) >= uniform(tile.len_k)) every_high = -(1 << 30);
    seeing_row = uniform(tile.seeing_row);
  }

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

  // Whether some query of a tile sees some key of the warpgroup and not all of them.
  __device__ __forceinline__ bool is_masked(int row) const {
    return row < every_low || row + C::kQueries > every_high;
  }

  // Zeros where a query does not see a key; they are chosen, as what they replace may be anything.
  __device__ __forceinline__ void mask(float (&values)[kScores], int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int low = rows[r].low - accumulator_column(row);
      const int high = rows[r].high - accumulator_column(row);
#pragma unroll
      for (int i = 0; i < C::kQueries / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& value = values[4 * i + 2 * r + c];
          value = 8 * i + c >= low && 8 * i + c < high ? value : 0.f;
        }
      }
    }
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
    if (is_masked(row)) mask(scores, row);
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
    if (is_masked(row)) mask(grads, row);
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

  // The gradients of scores to shared memory, a row a key, in panels of 64 queries.
  __device__ __forceinline__ void store_gradients(int buffer) {
    const int lane = threadIdx.x % 32;
    const int key = warpgroup * kRowsPerWarpgroup + first_row_of_warp() + lane % 16;
    const u32 base = shared.scores(buffer) + key * 128;
#pragma unroll
    for (int i = 0; i < C::kQueries / 16; ++i) {
      const int column = 2 * i % 8 + lane / 16;  // in units of 8 queries
      const u32 address = base + i / 4 * C::kPanelKeys + (column ^ (key % 8)) * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                   "r"(packed_grads[4 * i]), "r"(packed_grads[4 * i + 1]),
                   "r"(packed_grads[4 * i + 2]), "r"(packed_grads[4 * i + 3])
                   : "memory");
    }
  }

  // Zeros for rows of a tile, which lies in panels of `panel` bytes: this warpgroup writes them for
  // itself, the same bytes as the other, so that neither waits.
  __device__ __forceinline__ void clear_rows(u32 of_tile, int panel, int rows) {
    for (int piece = threadIdx.x % 128; piece < rows * 8; piece += 128) {
#pragma unroll
      for (int i = 0; i < C::kHeadDim / C::kPanel; ++i) {
        store_zeros(of_tile + i * panel + piece * 16);
      }
    }
  }

  __device__ __forceinline__ void end_clearing() {
    proxy_fence();
    named_barrier_sync(kRowsBarrier + warpgroup, 128);
  }

  // Keys in front of the first that some query sees may hold anything.
  __device__ __forceinline__ void clear_hidden_keys() {
    const int hidden = uniform(min(tile.seen_key - tile.first_key, C::kKeys));
    if (hidden <= 0) return;
    clear_rows(shared.k(), C::kPanelKeys, hidden);
    clear_rows(shared.v(), C::kPanelKeys, hidden);
    end_clearing();
  }

  // Queries that see no key may hold anything, and their gradients.
  __device__ __forceinline__ void clear_blind_queries(int row, int stage) {
    const int hidden = min(seeing_row - row, C::kQueries);
    if (hidden <= 0) return;
    clear_rows(shared.q(stage), C::kPanelQueries, hidden);
    clear_rows(shared.grad_out(stage), C::kPanelQueries, hidden);
    end_clearing();
  }

  __device__ __forceinline__ void release(u32 barrier) {
    mbarrier_arrive_if(barrier, threadIdx.x % 32 == 0);
  }

  // To the thread that adds them: 16 bytes a thread at a time, in the order of the accumulators.
  __device__ __forceinline__ void store_sums() {
    pin_registers(sums);
    mbarrier_wait(shared.sums_empty(warpgroup), sums_parity);
    sums_parity ^= 1;
    const u32 base = shared.sums(warpgroup) + threadIdx.x % 128 * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(base + i * 2048),
                   "f"(sums[4 * i]), "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]),
                   "f"(sums[4 * i + 3])
                   : "memory");
    }
    proxy_fence();
    mbarrier_arrive(shared.sums_full(warpgroup));
  }

  // One tile of queries, whose scores are in flight. `next`: the scores of the tile behind it are
  // issued at the end; of the last one they are issued as well, of what lies there, and not used.
  __device__ __forceinline__ void step(int row, bool last) {
    const int stage = at.stage();
    const u32 parity = at.parity();
    mbarrier_wait(shared.grad_out_full(stage), parity);
    issue_scores(grads, shared.v(), shared.grad_out(stage));
    work_on_scores(row, stage);
    clear_blind_queries(row, stage);
    issue_gradient(grad_v, packed, shared.grad_out(stage));
    wgmma_wait<1>();
    pin_registers(grads);
    work_on_gradients(row, stage);
    store_gradients(stage);
    proxy_fence();
    named_barrier_sync(kScoresBarrier, 256);
    issue_sums(stage);
    wgmma_wait<1>();
    release(shared.grad_out_empty(stage));
    issue_gradient(grad_k, packed_grads, shared.q(stage));
    at.advance();
    if (!last) mbarrier_wait(shared.q_full(at.stage()), at.parity());
    issue_scores(scores, shared.k(), shared.q(at.stage()));
    wgmma_wait<2>();
    store_sums();
    wgmma_wait<0>();
    pin_registers(scores);
    release(shared.q_empty(stage));
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.f;
    const int tiles = uniform(tile.end - tile.begin);
    if (tiles == 0) return;
    mbarrier_wait(shared.keys_full(), 0);
    clear_hidden_keys();
    mbarrier_wait(shared.q_full(0), 0);
    issue_scores(scores, shared.k(), shared.q(0));
    wgmma_wait<0>();
    pin_registers(scores);
    int row = tile.begin * C::kQueries;
    const int end = tile.end * C::kQueries;
    for (int left = tiles * params.group; left > 0; --left) {
      step(row, left == 1);
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
