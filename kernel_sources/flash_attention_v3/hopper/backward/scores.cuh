// What both kinds of consumers do: masks, zeros for hidden rows, probabilities, and the way of
// grad_q's sums to the thread that adds them.
#pragma once

#include "flash_attention_v3/hopper/backward/producer.cuh"
#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

enum : int { kScoresBarrier = 1, kRowsBarrier = 3 };  // named; two, and one a warpgroup

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

__device__ __forceinline__ void store_matrices(u32 address, const u32* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void load_matrices(u32 address, u32* words) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
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

// A warpgroup with 64 keys, rows of its accumulators of scores.
template <class C>
struct ScoresOfKeys {
  using Element = typename C::Element;
  static constexpr int kScores = C::kQueries / 2;  // registers of a tile's scores

  const BackwardParams& params;
  BackwardShared<C> shared;
  const KeyTile& tile;
  const int warpgroup;
  QueryInterval rows[2];      // that see this thread's keys
  int every_low, every_high;  // queries that see all keys of the warpgroup
  int seeing_row;             // the first query that sees some key
  u32 sums_parity = 1;

  // key_row: of the warpgroup's first key in the tile.
  __device__ __forceinline__ ScoresOfKeys(const BackwardParams& params,
                                          const BackwardShared<C>& shared, const KeyTile& tile,
                                          int warpgroup, int key_row)
      : params(params), shared(shared), tile(tile), warpgroup(warpgroup) {
    const int first = tile.first_key + key_row;
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

  __device__ __forceinline__ void release(u32 barrier) {
    mbarrier_arrive_if(barrier, threadIdx.x % 32 == 0);
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

  // Where a thread's rows of 16 queries lie in a buffer of scores, for store_matrices() and
  // load_matrices(): a row a key, in panels of 64 queries; key_row as above.
  __device__ __forceinline__ u32 matrices(u32 buffer, int key_row, int i) const {
    const int lane = threadIdx.x % 32;
    const int key = key_row + first_row_of_warp() + lane % 16;
    const int column = 2 * i % 8 + lane / 16;  // in units of 8 queries
    return buffer + i / 4 * C::kPanelKeys + key * 128 + (column ^ (key % 8)) * 16;
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
  __device__ __forceinline__ void clear_blind_queries(int row, u32 q, u32 grad_out) {
    const int hidden = min(seeing_row - row, C::kQueries);
    if (hidden <= 0) return;
    clear_rows(q, C::kPanelQueries, hidden);
    clear_rows(grad_out, C::kPanelQueries, hidden);
    end_clearing();
  }

  // To the thread that adds them: 16 bytes a thread at a time, in the order of the accumulators.
  __device__ __forceinline__ void store_part(const float* sums) {
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
};

}  // namespace jit_kernel::hopper
