// Queries beside an e4m3 cache: of any type, to fp16, in which products are made.
//
// Scores are k_descale q k + v_descale qv v, times q_descale. What is not of both goes to the
// queries before they are rounded: the smaller factor over the larger one, none where they are
// equal; then a row is multiplied by a power of two that takes its largest element to
// [2^13, 2^14), so that what fp16 lacks of bf16's exponents is 2^-37 of it. The rest is a factor
// of the row's scores.
#pragma once

#include "flash_attention_v3/hopper/mla/elements.cuh"
#include "flash_attention_v3/hopper/mla/queries.cuh"

namespace jit_kernel::hopper {

// What q and qv are multiplied by, and the scores behind them.
struct QueryFactors {
  float q, qv, scores;
};
__device__ __forceinline__ QueryFactors query_factors(const MlaParams& params, int batch,
                                                      int head) {
  const float k = descale_of_rows(params.k, batch, head);
  const float v = descale_of_rows(params.v, batch, head);
  const float of_q = params.e4m3_q ? descale_at(params.q_descale, params.q_descale_batch_stride,
                                                params.q_descale_head_stride, batch, head)
                                   : 1.f;
  if (k == v || params.only_qv) return {1.f, 1.f, v * of_q};
  if (fabsf(k) < fabsf(v)) return {__fdiv_rn(k, v), 1.f, v * of_q};
  return {1.f, __fdiv_rn(v, k), k * of_q};
}

// Eight columns of a query, two a word: of 16 bits as they are, of e4m3 in fp16.
__device__ __forceinline__ uint4 load_mixed_piece(const MlaParams& params, const void* data,
                                                  long long at) {
  if (!params.e4m3_q) {
    return *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(data) + at);
  }
  const uint2 bytes = *reinterpret_cast<const uint2*>(static_cast<const unsigned char*>(data) + at);
  const HalvesOfWord first = widen(bytes.x), second = widen(bytes.y);
  return {first.low, first.high, second.low, second.high};
}

// In the copy engine's swizzle, or in the order in which a thread loads streamed keys.
template <class C>
__device__ __forceinline__ void store_mixed_piece(const MlaShared<C>& shared, int panel, int index,
                                                  int piece, const u32 (&words)[4]) {
  if constexpr (C::kIsStreamed) {
    store_query<C>(shared.queries(panel), index, piece, words);
  } else {
    store_query_piece(shared, panel, index, piece, {words[0], words[1], words[2], words[3]});
  }
}

// The largest of a row's numbers, of which a thread has eight columns of each panel: as exponent
// of a power of two that has an inverse.
__device__ __forceinline__ int exponent_of_row(float largest) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  return min(max((__float_as_int(largest) >> 23) - 127, -113), 127);
}

template <class C>
__device__ __forceinline__ void load_mixed_queries(const MlaParams& params, const DecodeItem& item,
                                                   const MlaShared<C>& shared, int head,
                                                   int thread) {
  const QueryFactors by = query_factors(params, item.batch, head);
  const int piece = thread % 8;
#pragma unroll 1
  for (int index = thread / 8; index < C::kRows; index += 32) {
    const DecodeQuery query = *shared.query(index);
    const QueryPlace at = place_of_query(params, item, query);
    uint4 words[C::kPanels];
    float largest = 0.f;
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const bool is_q = panel == C::kPanelsV;
      words[panel] = {0, 0, 0, 0};
      if (query.token >= 0 && !(is_q && params.only_qv)) {
        words[panel] = load_mixed_piece(params, is_q ? params.q : params.qv,
                                        (is_q ? at.q : at.qv + panel * 64) + piece * 8);
      }
    }
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const float factor = fabsf(panel == C::kPanelsV ? by.q : by.qv);
      const u32 of_panel[4] = {words[panel].x, words[panel].y, words[panel].z, words[panel].w};
#pragma unroll
      for (const u32 word : of_panel) {
        const float2 pair = floats_of(word, params.bf16_q);
        largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)) * factor);
      }
    }
    const int exponent = exponent_of_row(largest);
    const float scale = __int_as_float((127 + 13 - exponent) << 23);
    if (piece == 0) {
      shared.score_factors()[index] = __int_as_float((127 - 13 + exponent) << 23) * by.scores;
    }
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const float factor = panel == C::kPanelsV ? by.q : by.qv;
      u32 halves[4] = {words[panel].x, words[panel].y, words[panel].z, words[panel].w};
#pragma unroll
      for (u32& word : halves) {
        const float2 pair = floats_of(word, params.bf16_q);
        word = pack<fp16>(pair.x * factor * scale, pair.y * factor * scale);
      }
      store_mixed_piece(shared, panel, index, piece, halves);
    }
  }
}

}  // namespace jit_kernel::hopper
