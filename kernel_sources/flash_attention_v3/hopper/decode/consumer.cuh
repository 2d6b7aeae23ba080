// The consumer warpgroup: a sequence's packed query rows over an item's blocks of keys.
//
// The operands are swapped: 64 keys are the rows of the first product, 64 columns of the values
// those of the second, and the query rows are the columns of both, 8 to 64 of them. So 8 rows cost
// an eighth of what a 64-row tile of queries would.
#pragma once

#include "flash_attention_v3/hopper/decode/e4m3.cuh"
#include "flash_attention_v3/hopper/decode/merge.cuh"
#include "flash_attention_v3/hopper/decode/schedule.cuh"

namespace jit_kernel::hopper {

template <class C>
struct DecodeConsumer {
  using Element = typename C::Element;
  static constexpr int kQueries = DecodeSoftmax<C>::kQueries;

  const DecodeParams& params;
  const DecodeShared<C> shared;
  const int stream;
  RingPosition<C::kStages> at;
  DecodeSoftmax<C> softmax;
  float scores[C::kRows / 2];
  float output[C::kPanels][C::kRows / 2];
  // In one register: which buffer of probabilities is next, items so far modulo 8, and, of e4m3
  // with scales of tokens, the exponent of the largest scale of values so far.
  u32 state = 0;

  // Worked out where they are needed, from numbers that are read there: registers are scarce.
  __device__ __forceinline__ uint2 my_block() const {
    uint2 block;
    asm volatile("mov.u32 %0, %%ctaid.x;\nmov.u32 %1, %%ctaid.y;" : "=r"(block.x), "=r"(block.y));
    return block;
  }
  __device__ __forceinline__ int my_part() const { return part_of_block(params, my_block()); }
  __device__ __forceinline__ int my_head() const {
    const int first = first_head_of_block(params, my_block());
    return first + (params.heads_of_block == 2 ? stream : 0);
  }

  __device__ __forceinline__ int value_exponent() const { return static_cast<int>(state >> 4); }
  __device__ __forceinline__ void set_value_exponent(int exponent) {
    state = (state & 15u) | static_cast<u32>(exponent) << 4;
  }

  __device__ __forceinline__ void release(u32 barrier) {
    mbarrier_arrive_if(barrier, threadIdx.x % 32 == 0);
  }

  __device__ __forceinline__ u32 tile_of(int stage) const {
    return shared.tile(stage) + stream * C::kBytesOfStream;
  }
  // The one so many behind the position's.
  __device__ __forceinline__ int stage_behind(int count) const {
    const int stage = at.stage() + count;
    return stage < C::kStages ? stage : stage - C::kStages;
  }
  __device__ __forceinline__ u32 my_tile() const { return tile_of(at.stage()); }
  __device__ __forceinline__ void wait_tile() {
    mbarrier_wait(shared.full(at.stage()), at.parity());
  }
  __device__ __forceinline__ void release_tile() {
    release(shared.empty(at.stage()));
    at.advance();
  }

  // Which queries there are and what each sees, a thread each.
  __device__ __forceinline__ void find_queries(const DecodeItem& item) {
    const int thread = threadIdx.x % 128;
    if (thread < C::kRows) {
      const int in_tile = divide(thread, params.group_multiplier, params.group_shift);
      const int tokens = tokens_of(params, item);
      const bool exists = in_tile < tokens;
      const int token = item.first_token + (exists ? in_tile : tokens - 1);
      const KeyInterval sees = visible_keys<true>(params, token, item.len_q, item.len_k);
      *shared.query(stream, thread) = {item.leftpad + max(0, sees.low), item.leftpad + sees.high,
                                       exists ? token : -1,
                                       my_head() * params.group + thread - in_tile * params.group};
    }
    stream_sync(stream);
  }

  // Only the kernels whose result is in bf16 take q in e4m3: which one it is costs a branch an
  // item.
  __device__ __forceinline__ bool has_q_in_e4m3() const {
    if constexpr (C::kMixed && kIsBf16<Element>) return params.q_is_e4m3;
    return false;
  }

  // Eight elements of q, of e4m3 as fp16.
  __device__ __forceinline__ uint4 query_piece(long long place) const {
    if (has_q_in_e4m3()) {
      const uint2 bytes =
          *reinterpret_cast<const uint2*>(static_cast<const unsigned char*>(params.q) + place);
      const HalvesOfWord first = widen(bytes.x), second = widen(bytes.y);
      return {first.low, first.high, second.low, second.high};
    }
    return *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(params.q) + place);
  }

  // The queries to shared memory, 0 where there is none.
  __device__ __forceinline__ void load_queries(const DecodeItem& item) {
    constexpr int kPieces = C::kHeadDim / 8, kAtOnce = 128 / kPieces;
    const int piece = threadIdx.x % kPieces;
    const long long first_place =
        item.batch * params.q_batch_stride + item.offset_q * params.q_row_stride + piece * 8;
#pragma unroll
    for (int first = 0; first < C::kRows; first += kAtOnce) {
      const int index = first + threadIdx.x % 128 / kPieces;
      if (C::kRows < kAtOnce && index >= C::kRows) break;
      const DecodeQuery query = *shared.query(stream, index);
      uint4 words = {0, 0, 0, 0};
      if (query.token >= 0 && piece * 8 < params.head_dim) {
        words = query_piece(first_place + query.token * params.q_row_stride +
                            query.head * params.q_head_stride);
      }
      if constexpr (C::kMixed) {
        store_scaled_query(item, index, piece, {words.x, words.y, words.z, words.w});
        continue;
      }
      const u32 address = shared.q(stream) + piece / 8 * C::kRows * 128 + index * 128 +
                          ((piece % 8) ^ (index % 8)) * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x),
                   "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
    }
    proxy_fence();
    stream_sync(stream);
  }

  // In fp16, and what the scores are multiplied by.
  __device__ __forceinline__ void store_scaled_query(const DecodeItem& item, int index, int piece,
                                                     const uint4& loaded) {
    u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    float factor = 1.f;
    if (has_q_in_e4m3()) {
      factor = factor_of(params.q_descale, params.q_descale_batch_stride,
                         params.q_descale_head_stride, item);
    } else if constexpr (kIsBf16<Element>) {
      factor = scale_to_fp16<C::kHeadDim / 8>(words);
    }
    store_query<C>(shared.q(stream), index, piece, words);
    if (piece == 0) {
      shared.score_factors(stream)[index] = factor * descale_of(params.k, item);
    }
  }

  __device__ __forceinline__ float descale_of(const DecodeRows& rows,
                                              const DecodeItem& item) const {
    return factor_of(rows.descale, rows.descale_batch_stride, rows.descale_head_stride, item);
  }
  // Of the item's sequence and head; 1 where no factors are given.
  __device__ __forceinline__ float factor_of(const float* factors, long long batch_stride,
                                             long long head_stride, const DecodeItem& item) const {
    if (factors == nullptr) return 1.f;
    return factors[item.batch * batch_stride + my_head() * head_stride];
  }

  __device__ __forceinline__ void multiply_scores() {
    const u32 k = wgmma_descriptor_low(my_tile(), 16);
    const u32 q = wgmma_descriptor_low(shared.q(stream), 16);
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const int inside = i % 4 * 32;
      wgmma_ss<Element>(scores,
                        wgmma_descriptor<128>(k + (i / 4 * kDecodeKeys * 128 + inside >> 4)),
                        wgmma_descriptor<128>(q + (i / 4 * C::kRows * 128 + inside >> 4)), i != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(scores);
    release_tile();
  }

  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) pin_registers(output[panel]);
  }

  __device__ __forceinline__ void multiply_values() {
    const u32 v = wgmma_descriptor_low(my_tile(), 16);
    const u32 p = wgmma_descriptor_low(shared.p(stream, state & 1), 16);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) pin_registers(output[panel]);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < kDecodeKeys / 16; ++i) {
        wgmma_ss<Element, true>(
            output[panel],
            wgmma_descriptor<128>(v + (panel * kDecodeKeys * 128 + i * 16 * 128 >> 4)),
            wgmma_descriptor<128>(p + (i * 32 >> 4)), 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) pin_registers(output[panel]);
    release_tile();
  }

  // Of a block: the first of the thread's two keys, the other is the eighth behind.
  __device__ __forceinline__ int first_key() const {
    if constexpr (!C::kMixed) return accumulator_row(0);
    const int thread = thread_of_block();
    return thread / 32 * 16 + key_of_row(thread % 32 / 4);
  }

  // -inf for keys that a query does not see. `row`: the cache's row of the block's first key.
  __device__ __forceinline__ void mask_scores_of(const DecodeItem& item, int row,
                                                 float (&scores)[C::kRows / 2]) {
    const int key = row + first_key();
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const DecodeQuery query = *shared.query(stream, i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& score = scores[i / 2 * 4 + 2 * r + i % 2];
        const int at = key + 8 * r;
        bool visible = at >= query.low && at < query.high;
        if (params.draft_mask != nullptr) {
          visible = visible && sees_draft(item, query.token, at - item.leftpad);
        }
        score = visible ? score : minus_infinity();
      }
    }
  }

  // The draft mask's bit of a key, one of the last 32 draft_words; older ones are seen.
  __device__ __forceinline__ bool sees_draft(const DecodeItem& item, int token, int key) const {
    const int bit = key - (item.len_k - 32 * params.draft_words);
    if (bit < 0 || token < 0) return true;
    const long long row = params.cu_seqlens_q != nullptr
                              ? item.offset_q + token
                              : static_cast<long long>(item.batch) * params.seqlen_q + token;
    return params.draft_mask[row * params.draft_mask_stride + bit / 32] >> (bit % 32) & 1;
  }

  // Zeros for values that no query sees: they may hold anything, and 0 times NaN is NaN.
  __device__ __forceinline__ void clear_hidden_values(const DecodeItem& item, int row, u32 v) {
    const int below = min(max(item.low - row, 0), kDecodeKeys);
    const int above = min(max(item.high - row, 0), kDecodeKeys);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < C::kBytesOfStream / 16; i += 128) {
      const int in_panel = i % (kDecodeKeys * C::kPanelBytes / 16);
      const int key = in_panel / (C::kPanelBytes / 16);
      if (key < below || key >= above) store_zeros(v + i * 16);
    }
  }

  // Whether a block has a key with a bit in the draft mask.
  __device__ __forceinline__ bool has_drafts(const DecodeItem& item, int row) const {
    return params.draft_mask != nullptr &&
           row + kDecodeKeys > item.leftpad + item.len_k - 32 * params.draft_words;
  }

  // Whether some query sees the key of a row of the cache. Of most keys the last one does.
  __device__ __forceinline__ bool is_seen(const DecodeItem& item, int row) const {
#pragma unroll 1
    for (int token = tokens_of(params, item) - 1; token >= 0; --token) {
      const DecodeQuery query = *shared.query(stream, token * params.group);
      if (row >= query.low && row < query.high &&
          sees_draft(item, query.token, row - item.leftpad)) {
        return true;
      }
    }
    return false;
  }

  // As clear_hidden_values, of the keys that the draft mask hides from every query, a thread each.
  __device__ __forceinline__ void clear_unseen_values(const DecodeItem& item, int row, u32 v) {
    const int key = threadIdx.x % 128;
    if (key >= kDecodeKeys || is_seen(item, row + key)) return;
#pragma unroll 1
    for (int piece = 0; piece < C::kHeadDim * C::kCacheBytes / 16; ++piece) {
      constexpr int kPieces = C::kPanelBytes / 16;
      store_zeros(v + (piece / kPieces * kDecodeKeys + key) * C::kPanelBytes +
                  piece % kPieces * 16);
    }
  }

  // Whether every query sees all keys of a block. Looked up for each, since registers are scarce,
  // and before the wait for its keys.
  __device__ __forceinline__ bool all_see(const DecodeItem& item, int row) const {
    if (row < shared.query(stream, C::kRows - 1)->low) return false;
    return row + kDecodeKeys <= shared.query(stream, 0)->high && !has_drafts(item, row);
  }

  // is_first: no query has a reference yet.
  __device__ __forceinline__ void run_block(const DecodeItem& item, int block, bool is_first) {
    const int row = block * kDecodeKeys;
    const bool masks = !all_see(item, row);
    wait_tile();
    if (params.box_rows == 0) proxy_fence();
    multiply_scores();
    if (params.softcap_scale != 0.f) {
#pragma unroll
      for (float& score : scores) score = tanh_fast(score * params.softcap_scale);
    }
    if (masks) mask_scores_of(item, row, scores);
    const float scale = params.scale_log2;
    // Finite: a first key is above a reference of -inf by any threshold but an infinite one.
    const float threshold = fminf(kRescaleThreshold / scale, kLargestFloat);
    float sums[kQueries];
    bool waits = true, raises = is_first;
#pragma unroll 1
    while (true) {  // once, or again with references that were raised
      if (raises) raise(scores, threshold);
      u32 packed[C::kRows / 4];
      const bool grew =
          exponentiate<C>(scores, softmax, scale, threshold, {1.f, 1.f}, sums, packed);
      store_probabilities<C>(shared.p(stream, state & 1), packed);
      if (waits) {
        wait_tile();
        const u32 v = my_tile();
        if (row < item.low || row + kDecodeKeys > item.high) clear_hidden_values(item, row, v);
        if (has_drafts(item, row)) clear_unseen_values(item, row, v);
        waits = false;
      }
      proxy_fence();
      raises = stream_any(stream, grew);
      if (!raises) break;
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) softmax.sum[i] += sums[i];
    multiply_values();
    state ^= 1;
  }

  // Blocks of e4m3, `count` of them and no more than C::kBlocksAtOnce, `step` apart: in mixed.cuh.
  using Scores = float[C::kRows / 2];
  using Values = u32[kDecodeKeys / 16][C::kPanels][4];
  struct ValueScales;
  __device__ void run_mixed(const DecodeItem& item, int block, int step, int count, bool is_first);
  __device__ void wait_mixed(const DecodeItem& item, int row, RingPosition<C::kStages>& ahead,
                             ValueScales& scales);
  __device__ void clear_values(const DecodeItem& item, int row, int stage);
  __device__ void raise_value_unit(int exponent);
  __device__ void scale_scores(Scores (&scores)[C::kBlocksAtOnce], int count);
  __device__ void settle_block(const Scores& scores, const ValueScales& scales, u32 p,
                               Values& values, bool raises);
  __device__ void load_value_stage(Values& values, int block, int count);
  __device__ void load_value_stages(Values (&values)[C::kBlocksAtOnce], int count);
  __device__ void multiply_scores_mixed(Scores (&scores)[C::kBlocksAtOnce], int count);
  __device__ bool settle_blocks(const Scores (&scores)[C::kBlocksAtOnce],
                                const ValueScales (&scales)[C::kBlocksAtOnce], u32 p,
                                Values (&values)[C::kBlocksAtOnce]);
  template <int kFirst, int kEnd>
  __device__ void load_value_steps(Values& values, int stage);
  template <int kFirst, int kEnd>
  __device__ void multiply_values_mixed(Values& values, u32 p);
  __device__ void descale_output(const DecodeItem& item);

  __device__ __forceinline__ void raise(const float (&scores)[C::kRows / 2], float threshold) {
    float factors[kQueries];
    raise_references<C>(shared, stream, scores, softmax, params.scale_log2, threshold, factors);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) output[panel][i] *= factors[i / 4 * 2 + i % 2];
    }
  }

  // The other stream has blocks where this one has none: `block` would be its next one.
  __device__ __forceinline__ void pass_blocks(const DecodeItem& item, int block, int step) {
    const int end = item.end[0] + item.begin[stream] - item.begin[0];
#pragma unroll 1
    for (; block < end; block += step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wait_tile();
        release_tile();
      }
    }
  }

  __device__ __forceinline__ void run_item(const DecodeItem& item) {
    const bool in_turns = C::kStreams == 2 && params.heads_of_block == 1;
    // A sequence's other ranges have the queries of its first one.
    if (uniform(item.range) == uniform(item.from)) {
      find_queries(item);
      load_queries(item);
    }
    start_queries<C>(softmax);
    set_value_exponent(0);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
#pragma unroll
      for (float& value : output[panel]) value = 0.f;
    }
    const int turn = in_turns ? stream : 0;
    const auto step_of = [&] { return in_turns && item.begin[1] - item.begin[0] == 1 ? 2 : 1; };
    int block = item.begin[turn];
#pragma unroll 1
    while (block < item.end[turn]) {
      const bool is_first = block == item.begin[turn];
      if constexpr (C::kMixed) {
        // A step is 1 or 2.
        const int step = step_of();
        const int left = item.end[turn] - block;
        const int count = C::kBlocksAtOnce == 2 && left > step ? 2 : 1;
        run_mixed(item, block, step, count, is_first);
        block += count * step;
      } else {
        run_block(item, block, is_first);
        block += step_of();
      }
    }
    if (in_turns) pass_blocks(item, block, step_of());
    if constexpr (C::kMixed) descale_output(item);
    gather_statistics<C>(shared, stream, softmax, params.scale_log2);
    if (params.in_clusters) {
      merge_in_cluster<C>(params, item, shared, stream, my_part(), output);
      return;
    }
    const bool of_ranges = uniform(item.ranges) > 0;
    const int count =
        of_ranges ? climb<C>(params, item, shared, stream, my_part(), my_head(), output) : 1;
    // Two halves become one where a part has both, a range that is alone is the first stream's.
    const bool is_whole = uniform(item.parts) == 1;
    const bool joins = in_turns && (!of_ranges || (is_whole && count > 0));
    if (joins && uniform(item.ranges) != 1) join_streams<C>(shared, stream, output);
    if (count > 0 && !(joins && stream == 1)) {
      stream_sync(stream);
      finish(item, count);
    }
    // The queries' memory and the statistics are free again.
    if (joins) {
      named_barrier_sync(kStreamsBarrier, 256);
    } else {
      stream_sync(stream);
    }
  }

  // count: of a call with fixed ranges, how many of them the result is of.
  __device__ __forceinline__ void finish(const DecodeItem& item, int count) {
    if (item.parts == 1) {
      store_rows<C>(params, item, shared, stream, output);
      return;
    }
    const int head = my_head(), part = my_part();
    if (item.ranges > 0) {
      finish_node(item, count, head);
      return;
    }
    store_partial<C>(shared, stream, partial_of<C>(params, part, head, item.is_first), output);
    int* const answer = reinterpret_cast<int*>(shared.factors(stream));
    if (arrive_last(params, item, 1, item.parts, head, stream, answer)) {
      merge_parts<C>(params, item, shared, stream, head);
    }
  }

  // So many of a sequence's ranges, which several parts share, up to the item's.
  __device__ __forceinline__ void finish_node(const DecodeItem& item, int count, int head) {
    const int of_half = params.halves && stream == 1 ? item.ranges / 2 : 0;
    const int first = item.range + 1 - count + of_half;
    float* const partial = range_of<C>(params, item, first, head);
    store_partial<C>(shared, stream, partial, output);
    if (threadIdx.x % 128 == 0) partial[C::kOffsetCount] = __int_as_float(count);
    if (item.range + 1 < item.to) return;
    int* const answer = reinterpret_cast<int*>(shared.factors(stream));
    if (arrive_last(params, item, item.to - item.from, item.ranges, head, stream, answer)) {
      merge_ranges<C>(params, item, shared, stream, head);
    }
  }

  __device__ __forceinline__ void run() {
    while (true) {
      static_assert(kDecodeItemSlots == 4, "two bits for the slot and one for its phase");
      const u32 slot = state >> 1 & 3;
      mbarrier_wait(shared.item_full(slot), state >> 3 & 1);
      const DecodeItem& item = *shared.item(slot);
      if (uniform(item.batch) < 0) return;
      run_item(item);
      mbarrier_arrive(shared.item_empty(slot));  // every lane has read the item
      state = (state & ~14u) | ((state + 2) & 14u);
    }
  }
};

}  // namespace jit_kernel::hopper
