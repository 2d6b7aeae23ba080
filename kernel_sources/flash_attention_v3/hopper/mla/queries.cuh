// The tile's packed query rows: what each sees, and their columns in shared memory.
#pragma once

#include "flash_attention_v3/hopper/mla/shared_memory.cuh"
#include "flash_attention_v3/hopper/mla/work.cuh"

namespace jit_kernel::hopper {

// Named barriers; 0 is the block's. The first two are a consumer warpgroup's own.
constexpr int kMlaOwnBarrier = 1, kMlaConsumersBarrier = 3;

__device__ __forceinline__ void consumers_sync() { named_barrier_sync(kMlaConsumersBarrier, 256); }

// Rows behind the last one see what it sees and are stored nowhere. `thread`: of all consumers.
template <class C>
__device__ __forceinline__ void find_mla_queries(const MlaParams& params, const DecodeItem& item,
                                                 const MlaShared<C>& shared, int head, int thread) {
  if (thread >= C::kRows) return;
  const int index = first_row_of_tile(params) + thread;
  const int token = divide(index, params.group_multiplier, params.group_shift);
  const bool exists = token < item.len_q;
  const KeyInterval sees =
      visible_keys<true>(params, exists ? token : item.len_q - 1, item.len_q, item.len_k);
  *shared.query(thread) = {item.leftpad + max(0, sees.low),
                           min(item.leftpad + sees.high, end_of_keys(item)), exists ? token : -1,
                           head * params.group + index - token * params.group};
}

// Eight columns of a row's panel, in the copy engine's 128-byte swizzle.
template <class C>
__device__ __forceinline__ void store_query_piece(const MlaShared<C>& shared, int panel, int index,
                                                  int piece, const uint4& words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared.queries(panel) + index * 128 + (piece ^ (index % 8)) * 16),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// Where a query's columns begin, of qv and q, counted in elements.
struct QueryPlace {
  long long qv, q;
};
__device__ __forceinline__ QueryPlace place_of_query(const MlaParams& params,
                                                     const DecodeItem& item,
                                                     const DecodeQuery& query) {
  const long long token = static_cast<long long>(item.offset_q) + query.token;
  return {item.batch * params.qv_batch_stride + token * params.qv_row_stride +
              query.head * params.qv_head_stride,
          item.batch * params.q_batch_stride + token * params.q_row_stride +
              query.head * params.q_head_stride};
}

// qv, then q; 0 where there is no query.
template <class C>
__device__ __forceinline__ void load_mla_queries(const MlaParams& params, const DecodeItem& item,
                                                 const MlaShared<C>& shared, int thread) {
  const int piece = thread % 8;
#pragma unroll
  for (int first = 0; first < C::kRows; first += 32) {
    const int index = first + thread / 8;
    if (C::kRows < 32 && index >= C::kRows) break;
    const DecodeQuery query = *shared.query(index);
    const QueryPlace at = place_of_query(params, item, query);
    const unsigned short* const of_qv =
        static_cast<const unsigned short*>(params.qv) + at.qv + piece * 8;
    const unsigned short* const of_q =
        static_cast<const unsigned short*>(params.q) + at.q + piece * 8;
    uint4 words[C::kPanels];
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const bool is_q = panel == C::kPanelsV;
      words[panel] = {0, 0, 0, 0};
      if (query.token >= 0 && !(is_q && params.only_qv)) {
        words[panel] = *reinterpret_cast<const uint4*>(is_q ? of_q : of_qv + panel * 64);
      }
    }
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      store_query_piece(shared, panel, index, piece, words[panel]);
    }
  }
}

}  // namespace jit_kernel::hopper
