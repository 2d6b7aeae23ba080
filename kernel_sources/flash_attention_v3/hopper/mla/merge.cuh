// The end of an item: rows of a whole sequence, or a part's partial result and its merge.
//
// A part that has nothing else to do waits a while for the others of its sequence, and helps the
// last one to merge: of 1 x 32k one thread block alone would read 8 MB. No part has to wait, so
// that none waits for one that does not run; sums are in the order of the parts, whoever makes
// them.
#pragma once

#include "flash_attention_v3/hopper/mla/mixed_queries.cuh"

namespace jit_kernel::hopper {

constexpr int kMlaMostPolls = 40;  // about 25 us
constexpr int kMlaFewParts = 8;

// Half of a reference as exponent of 2.
__device__ __forceinline__ float half_of(float reference, float scale) {
  const float half = fmaxf(-kLargestFloat, fminf(0.5f * reference * scale, kLargestFloat));
  return reference == minus_infinity() ? reference : half;
}

template <class C, int kSide>
__device__ __forceinline__ void store_mla_rows(const MlaParams& params, const DecodeItem& item,
                                               const MlaShared<C>& shared,
                                               const float (&references)[2], const float (&sums)[2],
                                               float (&output)[C::kHeadDimV / 4]) {
  const int thread = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const DecodeQuery query = *shared.query(accumulator_row(8 * r));
    const bool exists = query.token >= 0;
    const float sink = mla_half_sink<C>(params, exists ? query.head : 0);
    const RowResult result = finish_query(sums[r], half_of(references[r], params.scale_log2), sink);
    if (kSide == 0 && exists && thread == 0) store_lse(params, item, query, result.lse);
    unsigned short* const out = out_of(params, item, query) + kSide * C::kHalf * 64 + 8 * thread;
#pragma unroll
    for (int i = 0; i < C::kHalf * 2; ++i) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * i + 4 * j + 2 * r;
        words[j] =
            pack_result<C>(params, output[at] * result.factor, output[at + 1] * result.factor);
      }
      transpose_quad(words, thread);
      store_16_if(out + 32 * i, words, exists);
    }
  }
}

// Packed query rows of the item's sequence in this tile.
__device__ __forceinline__ int rows_of_tile(const MlaParams& params, const DecodeItem& item) {
  return min(kMlaTileRows, item.len_q * params.group - first_row_of_tile(params));
}

// A part has two places: for the sequence that begins in it, and for the one that began before.
template <class C>
__device__ __forceinline__ float* mla_partial(const MlaParams& params, int part, bool is_first) {
  const long long slot = (static_cast<long long>(part) * gridDim.x + blockIdx.x) * 2 + is_first;
  return params.partials + slot * C::kPartialFloats;
}

template <class C, int kSide>
__device__ __forceinline__ void store_mla_partial(const MlaParams& params, const DecodeItem& item,
                                                  const float (&references)[2],
                                                  const float (&sums)[2],
                                                  const float (&output)[C::kHeadDimV / 4]) {
  float* const partial = mla_partial<C>(params, blockIdx.y, item.is_first);
  const int thread = threadIdx.x % 4, rows = rows_of_tile(params, item);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = accumulator_row(8 * r);
    if (row >= rows) continue;
    float2* const to = reinterpret_cast<float2*>(partial + row * C::kHeadDimV +
                                                 kSide * C::kHalf * 64 + 2 * thread);
#pragma unroll
    for (int i = 0; i < C::kHalf * 8; ++i) {
      to[4 * i] = {output[4 * i + 2 * r], output[4 * i + 2 * r + 1]};
    }
    if (kSide == 0 && thread == 0) {
      *reinterpret_cast<float2*>(partial + C::kRows * C::kHeadDimV + 2 * row) = {
          half_of(references[r], params.scale_log2), sums[r]};
    }
  }
}

__device__ __forceinline__ int add_acq_rel(int* counter) {
  int before;
  asm volatile("fence.acq_rel.gpu;\natom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Whether all parts have arrived, by one thread.
__device__ __forceinline__ bool arrive_and_wait(int* counter, int parts, bool waits) {
  int arrived = add_acq_rel(counter) + 1;
#pragma unroll 1
  for (int i = 0; waits && arrived < parts && i < kMlaMostPolls; ++i) {
    arrived = load_acquire(counter);
  }
  return arrived >= parts;
}

// Adds the parts from `begin` on, up to kParts of them, to kQuads sums: four numbers of a row at
// `first`, and at quads of the same tile that lie `apart` numbers behind each other.
template <class C, int kParts, int kQuads>
__device__ __forceinline__ void add_mla_parts(const float* partials, int begin, int end,
                                              long long step, int first, int apart,
                                              MergedQuad (&merged)[kQuads]) {
  float4 value[kQuads][kParts];
  float2 ends[kQuads][kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    // The first part wrote the end of its run, the others the beginning of theirs.
    const int part = begin + i;
    const float* const from = partials + part * step + (part == 0 ? C::kPartialFloats : 0);
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int at = first + j * apart;
      value[j][i] = {0.f, 0.f, 0.f, 0.f};
      ends[j][i] = {minus_infinity(), 0.f};
      if (part < end) {
        value[j][i] = load_other(from + at);
        ends[j][i] = load_other_pair(from + C::kRows * C::kHeadDimV + at / C::kHeadDimV * 2);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) merged[j].add(value[j], ends[j]);
}

// Rows [begin, end) of a tile of few parts: two quads a thread at a time.
template <class C>
__device__ __forceinline__ void merge_few_parts(const MlaParams& params, const DecodeItem& item,
                                                const MlaShared<C>& shared, int begin, int end,
                                                int thread) {
  constexpr int kQuads = C::kHeadDimV / 4;
  const float* const partials = mla_partial<C>(params, item.first_part, false);
  const long long step = 2ll * gridDim.x * C::kPartialFloats;
  const int last = end * kQuads - 1;
#pragma unroll 1
  for (int at = begin * kQuads + thread; at <= last; at += 512) {
    MergedQuad merged[2];
    const int quads[2] = {at, min(at + 256, last)};
#pragma unroll 1
    for (int part = 0; part < item.parts; part += 4) {
      add_mla_parts<C, 4>(partials, part, item.parts, step, 4 * at, 4 * (quads[1] - at), merged);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (at + 256 * j > last) break;
      store_merged<C>(params, item, merged[j], *shared.query(quads[j] / kQuads), quads[j] % kQuads);
    }
  }
}

// One row of a tile of many parts: groups of threads have a run of the parts each, whose sums meet
// where the queries lay.
template <class C>
__device__ __forceinline__ void merge_row(const MlaParams& params, const DecodeItem& item,
                                          const MlaShared<C>& shared, int row, int thread) {
  constexpr int kQuads = C::kHeadDimV / 4, kGroups = 256 / kQuads, kAtOnce = 12;
  const float* const partials = mla_partial<C>(params, item.first_part, false);
  const long long step = 2ll * gridDim.x * C::kPartialFloats;
  const int quad = thread % kQuads, group = thread / kQuads;
  const int of_group = (item.parts + kGroups - 1) / kGroups;
  const int begin = group * of_group, end = min(begin + of_group, item.parts);
  MergedQuad merged[1];
#pragma unroll 1
  for (int part = begin; part < end; part += kAtOnce) {
    add_mla_parts<C, kAtOnce>(partials, part, end, step, row * C::kHeadDimV + 4 * quad, 0, merged);
  }
  float4* const totals = reinterpret_cast<float4*>(shared.base);
  float2* const ends = reinterpret_cast<float2*>(shared.base + 256 * 16);
  if (group > 0) {
    totals[thread] = merged[0].total;
    ends[thread] = {merged[0].top, merged[0].sum};
  }
  consumers_sync();
  if (group > 0) return;
#pragma unroll
  for (int other = 1; other < kGroups; ++other) {
    const float4 value[1] = {totals[thread + other * kQuads]};
    const float2 end_of_other[1] = {ends[thread + other * kQuads]};
    merged[0].add(value, end_of_other);
  }
  store_merged<C>(params, item, merged[0], *shared.query(row), quad);
}

// By all consumers, whose partial result is written. The counters are zero again when the last part
// has left.
template <class C>
__device__ __forceinline__ void merge_mla_parts(const MlaParams& params, const MlaItem& item,
                                                const MlaShared<C>& shared, int thread) {
  int* const counters = params.counters + (item.first_part * gridDim.x + blockIdx.x) * kMlaCounters;
  const int parts = item.parts;
  // Of many parts a row a slice, of few as many slices as parts.
  const int rows = rows_of_tile(params, item);
  const bool are_many = parts > kMlaFewParts;
  const int slice = are_many ? 1 : (rows + parts - 1) / parts;
  volatile int* const answer = shared.answer();
  consumers_sync();
  if (thread == 0) *answer = arrive_and_wait(counters, parts, item.is_last != 0);
  consumers_sync();
  bool merges = *answer != 0;
  while (merges) {
    consumers_sync();
    if (thread == 0) *answer = atomicAdd(counters + 1, 1);
    consumers_sync();
    const int begin = *answer * slice;
    merges = begin < rows;
    if (!merges) break;
    if (are_many) {
      merge_row<C>(params, item, shared, begin, thread);
    } else {
      merge_few_parts<C>(params, item, shared, begin, min(begin + slice, rows), thread);
    }
  }
  if (thread == 0 && add_acq_rel(counters + 2) + 1 == parts) {
    counters[0] = 0;
    counters[1] = 0;
    counters[2] = 0;
  }
}

}  // namespace jit_kernel::hopper
