// A consumer warpgroup of up to 32 packed query rows: every second 64 keys, all columns.
//
// The operands are swapped, as in decode/: 64 keys are the rows of the first product, 64 columns of
// the values those of the second, and the query rows the columns of both. 16 rows then cost a
// quarter of what a tile of 64 would, and the two warpgroups meet at an item's end alone.
// streamed.cuh says what differs for an e4m3 cache.
#pragma once

#include "flash_attention_v3/hopper/mla/drafts.cuh"
#include "flash_attention_v3/hopper/mla/merge.cuh"

namespace jit_kernel::hopper {

template <class C>
struct MlaSwapped {
  using Element = typename C::Element;
  static constexpr int kQueries = DecodeSoftmax<C>::kQueries;

  const MlaParams& params;
  const MlaShared<C> shared;
  const int stream;  // which of the warpgroups
  u32 phase;         // of the buffers
  DecodeSoftmax<C> softmax;
  float scores[C::kRows / 2];
  float output[C::kPanelsV][C::kRows / 2];
  int probabilities = 0;  // which of two buffers

  // What decode/'s functions find statistics and probabilities by.
  __device__ __forceinline__ DecodeShared<C> decode() const { return {shared.base}; }
  __device__ __forceinline__ int buffer() const {
    return C::kIsStreamed ? stream + 2 * static_cast<int>(phase % 2) : stream;
  }
  __device__ __forceinline__ u32 parity() const { return C::kIsStreamed ? phase / 2 : phase; }
  __device__ __forceinline__ void next_buffer() {
    phase = C::kIsStreamed ? (phase + 1) % 4 : phase ^ 1;
  }
  __device__ __forceinline__ void release(int half) {
    mbarrier_arrive_if(shared.empty(buffer(), half), threadIdx.x % 32 == 0);
  }

  // Of an e4m3 cache, in streamed.cuh.
  using Keys = u32[4][4];
  using RawKeys = u32[2][4];
  using Values = u32[C::kPanelsV][4];
  using RawValues = u32[2][2][C::kHeadDimV / 128];
  __device__ void load_keys_of(RawKeys& raw, int panel);
  __device__ void multiply_scores_streamed();
  __device__ void load_values_of(RawValues& raw, int step);
  __device__ void multiply_values_streamed();
  __device__ void store_half_streamed(int half, bool adds, const float (&by)[kQueries]);

  __device__ __forceinline__ void multiply_scores() {
    const u32 k = wgmma_descriptor_low(shared.keys(stream, 0), 16);
    const u32 q = wgmma_descriptor_low(shared.queries(0), 16);
    pin_registers(scores);
#pragma unroll
    for (int i = 0; i < C::kPanels; ++i) {
      // In the order in which they come: left half, right half, k.
      mbarrier_wait(shared.full(stream, i), phase);
      if (params.box_rows == 0) proxy_fence();
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<Element>(scores, wgmma_descriptor<128>(k + (i * kMlaBytesPanel + j * 32 >> 4)),
                          wgmma_descriptor<128>(q + (i * C::kBytesPanelQ + j * 32 >> 4)),
                          i + j != 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(scores);
  }

  __device__ __forceinline__ void issue_values(int half) {
    const u32 v = wgmma_descriptor_low(shared.keys(stream, 0), 16);
    const u32 p = wgmma_descriptor_low(decode().p(stream, probabilities), 16);
#pragma unroll
    for (int i = 0; i < C::kHalf; ++i) {
      const int panel = half * C::kHalf + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<Element, true>(
            output[panel], wgmma_descriptor<128>(v + (panel * kMlaBytesPanel + j * 16 * 128 >> 4)),
            wgmma_descriptor<128>(p + (j * 32 >> 4)), 1);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int panel = 0; panel < C::kPanelsV; ++panel) pin_registers(output[panel]);
  }

  __device__ __forceinline__ void multiply_values() {
    pin_output();
    wgmma_fence();
    issue_values(0);
    issue_values(1);
    wgmma_wait<1>();
    release(0);
    wgmma_wait<0>();
    pin_output();
    release(1);
  }

  // Of a buffer: the first of the thread's two keys, the other is the eighth behind.
  __device__ __forceinline__ int first_key() const {
    if constexpr (!C::kIsStreamed) return accumulator_row(0);
    return first_row_of_warp() + key_of_row(threadIdx.x % 32 / 4);
  }

  // -inf for keys that a query does not see.
  __device__ __forceinline__ void mask_scores_of(const MlaItem& item, int row) {
    const int first = first_key();
    const bool drafts = has_mla_drafts(params, item, row);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const DecodeQuery query = *shared.query(i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2);
      u64 seen = keys_between(query.low, query.high, row);
      if (drafts) seen &= drafts_of(params, item, query.token, row);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& score = scores[i / 2 * 4 + 2 * r + i % 2];
        score = (seen >> (first + 8 * r) & 1) != 0 ? score : minus_infinity();
      }
    }
  }

  // Zeros for values that no query sees: they may hold anything, and 0 times NaN is NaN.
  __device__ __forceinline__ void clear_hidden_values(const MlaItem& item, int row) {
    constexpr int kPanels = C::kIsStreamed ? C::kPairs : C::kPanelsV;  // of 128 bytes a row
    const u64 seen = seen_keys<C>(params, shared, item, row);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kPanels * kMlaKeys * 8; i += 128) {
      const int key = i % (kMlaKeys * 8) / 8;
      if ((seen >> key & 1) == 0) store_zeros(shared.keys(buffer(), 0) + i * 16);
    }
  }

  __device__ __forceinline__ void raise(float threshold) {
    float factors[kQueries];
    raise_references<C>(decode(), stream, scores, softmax, params.scale_log2, threshold, factors);
#pragma unroll
    for (int panel = 0; panel < C::kPanelsV; ++panel) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) output[panel][i] *= factors[i / 4 * 2 + i % 2];
    }
  }

  __device__ __forceinline__ void run_block(const MlaItem& item, int block, bool is_first) {
    const int row = block * kMlaBlockKeys + stream * kMlaKeys;
    const bool all_see = row >= shared.query(C::kRows - 1)->low &&
                         row + kMlaKeys <= min(shared.query(0)->high, item.plain_end);
    if constexpr (C::kIsStreamed) {
      multiply_scores_streamed();
    } else {
      multiply_scores();
    }
    if (params.softcap_scale != 0.f) {
#pragma unroll
      for (float& score : scores) score = tanh_fast(score * params.softcap_scale);
    }
    if (!all_see) mask_scores_of(item, row);
    const float scale = params.scale_log2;
    const float threshold = fminf(kRescaleThreshold / scale, kLargestFloat);
    float sums[kQueries];
    const float of_keys[2] = {1.f, 1.f};  // none in 16 bit
    bool clears = row < item.low || row + kMlaKeys > item.plain_end, raises = is_first;
    if (clears) stream_sync(stream);  // all scores are there
#pragma unroll 1
    while (true) {  // once, or again with references that were raised
      if (raises) raise(threshold);
      u32 packed[C::kRows / 4];
      const bool grew = exponentiate<C>(scores, softmax, scale, threshold, of_keys, sums, packed);
      store_probabilities<C>(decode().p(stream, probabilities), packed);
      if (clears) clear_hidden_values(item, row);
      clears = false;
      proxy_fence();
      raises = stream_any(stream, grew);
      if (!raises) break;
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) softmax.sum[i] += sums[i];
    if constexpr (C::kIsStreamed) {
      multiply_values_streamed();
    } else {
      multiply_values();
    }
    probabilities ^= 1;
  }

  // Where a half of the result lies as rows: the queries' memory, which is then done with.
  __device__ __forceinline__ float* result() const { return reinterpret_cast<float*>(shared.base); }

  // Each half of the columns in turn: one warpgroup's numbers, then the sum with the other's, then
  // all threads store rows. `by`: what each query's numbers are multiplied by.
  __device__ __forceinline__ void store_halves(const MlaItem& item, const float (&by)[kQueries]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      consumers_sync();
#pragma unroll
      for (int adds = 0; adds < 2; ++adds) {
        if constexpr (C::kIsStreamed) {
          if (stream == adds) store_half_streamed(half, adds != 0, by);
        } else if (stream == adds) {
#pragma unroll
          for (int i = 0; i < C::kHalf * C::kRows / 2; ++i) {
            const int panel = i / (C::kRows / 2), j = i % (C::kRows / 2);
            const int query = j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2;
            float& to =
                result()[query * C::kResultPitch + accumulator_row(panel * 64) + j / 2 % 2 * 8];
            const float number = output[half * C::kHalf + panel][j] * by[j / 4 * 2 + j % 2];
            to = adds == 0 ? number : to + number;
          }
        }
        consumers_sync();
      }
      store_rows_of_half(item, half);
    }
  }

  __device__ __forceinline__ void store_rows_of_half(const MlaItem& item, int half) {
    constexpr int kPieces = C::kHeadDimV / 2 / 8;  // of a row, 8 numbers each
    const int thread = stream * 128 + threadIdx.x % 128, piece = thread % kPieces;
#pragma unroll 1
    for (int index = thread / kPieces; index < C::kRows; index += 256 / kPieces) {
      const float4* const from =
          reinterpret_cast<const float4*>(result() + index * C::kResultPitch + 8 * piece);
      const float4 a = from[0], b = from[1];
      const int column = half * C::kHalf * 64 + 8 * piece;
      const DecodeQuery query = *shared.query(index);
      if (query.token < 0) continue;
      if (item.parts > 1) {
        float4* const to = reinterpret_cast<float4*>(
            mla_partial<C>(params, blockIdx.y, item.is_first) + index * C::kHeadDimV + column);
        to[0] = a;
        to[1] = b;
      } else {
        const uint4 words = {pack_result<C>(params, a.x, a.y), pack_result<C>(params, a.z, a.w),
                             pack_result<C>(params, b.x, b.y), pack_result<C>(params, b.z, b.w)};
        *reinterpret_cast<uint4*>(out_of(params, item, query) + column) = words;
      }
    }
  }

  // The two warpgroups' sums become one, of a row a thread: its reference, its sum, and by what
  // each warpgroup's numbers are multiplied.
  __device__ __forceinline__ void join(const MlaItem& item) {
    const int row = threadIdx.x % 128;
    if (stream == 0 && row < C::kRows) {
      const JoinFactors join =
          join_factors(decode().references(0)[row], decode().references(1)[row]);
      const float total =
          sum_of<C>(decode(), 0, row) * join.first + sum_of<C>(decode(), 1, row) * join.second;
      const DecodeQuery query = *shared.query(row);
      float factor = 1.f;
      if (item.parts > 1) {
        float2* const ends = reinterpret_cast<float2*>(
            mla_partial<C>(params, blockIdx.y, item.is_first) + C::kRows * C::kHeadDimV);
        ends[row] = {join.top, total};
      } else {
        const float sink = mla_half_sink<C>(params, query.token >= 0 ? query.head : 0);
        const RowResult result = finish_query(total, join.top, sink);
        if (query.token >= 0) store_lse(params, item, query, result.lse);
        factor = result.factor;
      }
      if constexpr (C::kMixed) {
        const int head = static_cast<int>(blockIdx.x) / params.row_tiles;
        factor *= descale_of_rows(params.v, item.batch, head);
      }
      decode().factors(0)[row] = factor * join.first;
      decode().factors(1)[row] = factor * join.second;
    }
  }

  __device__ __forceinline__ void run_item(const MlaItem& item) {
    start_queries<C>(softmax);
#pragma unroll
    for (int panel = 0; panel < C::kPanelsV; ++panel) {
#pragma unroll
      for (float& value : output[panel]) value = 0.f;
    }
    const int begin = uniform(item.begin[0]), end = uniform(item.end[0]);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      run_block(item, block, block == begin);
      next_buffer();
    }
    gather_statistics<C>(decode(), stream, softmax, params.scale_log2);
    consumers_sync();
    join(item);
    consumers_sync();
    float by[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      by[i] = decode().factors(stream)[i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2];
    }
    store_halves(item, by);
  }
};

}  // namespace jit_kernel::hopper
