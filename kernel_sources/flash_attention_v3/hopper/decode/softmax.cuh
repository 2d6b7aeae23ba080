// Online softmax with swapped operands: keys are the rows of an accumulator, queries its columns.
//
// A thread holds two keys of each of kRows / 4 queries; the keys of a query lie in all 128 threads.
// So the maximum is not looked for: each query has a reference, and only where a score exceeds it
// by more than 2^8 do the warps exchange their maxima. The barrier behind which the probabilities
// are seen carries that answer (barrier.red), so an ordinary block pays for one barrier alone. A
// query's numbers depend on its own scores only, whatever other queries are in the tile.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/decode/shared_memory.cuh"
#include "jit_kernel/cuda/warpgroup.cuh"
#include "jit_kernel/cuda/wgmma.cuh"

namespace jit_kernel::hopper {

constexpr int kStreamBarrier = 1;  // the first of one named barrier a stream; 0 is the block's
constexpr int kStreamsBarrier = 3;

__device__ __forceinline__ void stream_sync(int stream) {
  named_barrier_sync(kStreamBarrier + stream, 128);
}

// Whether `value` is true in any thread of the stream; a barrier as well.
__device__ __forceinline__ bool stream_any(int stream, bool value) {
  u32 any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %2, 0;\n"
      "barrier.cta.red.or.pred q, %1, 128, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(kStreamBarrier + stream), "r"(static_cast<u32>(value))
      : "memory");
  return any != 0;
}

// What the products are made in: of keys and values in e4m3, fp16, which holds them exactly.
template <class Element, bool kMixed>
struct ComputedIn {
  using Type = Element;
};
template <class Element>
struct ComputedIn<Element, true> {
  using Type = fp16;
};
template <class C>
using Computed = typename ComputedIn<typename C::Element, C::kMixed>::Type;

// The queries of a thread are 8 j + 2 t + c for c in {0, 1}: index 2 j + c here. Scores of query
// (j, c): 4 j + c of the thread's first key, 4 j + 2 + c of its second.
template <class C>
struct DecodeSoftmax {
  static constexpr int kQueries = C::kRows / 4;
  float reference[kQueries];  // a score; -inf before any key
  float sum[kQueries];        // this thread's part of the denominator
};

template <class C>
__device__ __forceinline__ void start_queries(DecodeSoftmax<C>& state) {
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    state.reference[i] = minus_infinity();
    state.sum[i] = 0.f;
  }
}

// The difference comes first: the exponent of the maximum is then 0, however large the scale.
__device__ __forceinline__ float probability(float score, float reference, float scale) {
  return exp2_fast((score - reference) * scale);
}

__device__ __forceinline__ float base_of(float reference) {
  return reference == minus_infinity() ? 0.f : reference;
}

// Packed probabilities of this block, and their sums to `sums`. Returns whether some query's
// reference is too low. of_keys: of an e4m3 cache, what the values of the thread's two keys are
// multiplied by, which goes before the rounding of the probabilities and not into the sums.
template <class C>
__device__ __forceinline__ bool exponentiate(const float (&scores)[C::kRows / 2],
                                             const DecodeSoftmax<C>& state, float scale,
                                             float threshold, const float (&of_keys)[2],
                                             float (&sums)[DecodeSoftmax<C>::kQueries],
                                             u32 (&packed)[C::kRows / 4]) {
  bool grew = false;
#pragma unroll
  for (int j = 0; j < C::kRows / 8; ++j) {
    float values[4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float reference = state.reference[2 * j + c];
      const float base = base_of(reference);
      const float first = scores[4 * j + c], second = scores[4 * j + 2 + c];
      grew |= fmaxf(first, second) > reference + threshold;
      values[c] = probability(first, base, scale);
      values[2 + c] = probability(second, base, scale);
      sums[2 * j + c] = values[c] + values[2 + c];
      if constexpr (C::kMixed) {
        values[c] *= of_keys[0];
        values[2 + c] *= of_keys[1];
      }
    }
    packed[2 * j] = pack<Computed<C>>(values[0], values[1]);
    packed[2 * j + 1] = pack<Computed<C>>(values[2], values[3]);
  }
  return grew;
}

// Probabilities to shared memory as the second product's operand: rows of queries, 64 keys each, in
// the copy engine's 128-byte swizzle.
template <class C>
__device__ __forceinline__ void store_probabilities(u32 buffer, const u32 (&packed)[C::kRows / 4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int half = lane / 8 % 2, row = lane % 8 + (C::kRows > 8 ? lane / 16 * 8 : 0);
  const u32 address = buffer + row * 128 + ((2 * warp + half) ^ (row % 8)) * 16;
  if constexpr (C::kRows == 8) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
                 "r"(packed[0]), "r"(packed[1])
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < C::kRows / 16; ++i) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       address + i * 16 * 128),
                   "r"(packed[4 * i]), "r"(packed[4 * i + 1]), "r"(packed[4 * i + 2]),
                   "r"(packed[4 * i + 3])
                   : "memory");
    }
  }
}

// The largest of a query's values over the 8 lanes of a warp that hold its keys.
template <class Operation>
__device__ __forceinline__ float over_keys_of_warp(float value, Operation operation) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

// One number of each query, combined over all threads of the stream. A barrier must stand between
// two of these.
template <class C, class Operation>
__device__ __forceinline__ void over_keys(const DecodeShared<C>& shared, int stream,
                                          float (&values)[DecodeSoftmax<C>::kQueries],
                                          Operation operation) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    values[i] = over_keys_of_warp(values[i], operation);
    if (lane < 4) shared.statistics(stream, warp)[i / 2 * 8 + 2 * lane + i % 2] = values[i];
  }
  stream_sync(stream);
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int query = i / 2 * 8 + lane % 4 * 2 + i % 2;
    const float* const of_warps = shared.statistics(stream, 0) + query;
    values[i] = operation(operation(of_warps[0], of_warps[C::kRows]),
                          operation(of_warps[2 * C::kRows], of_warps[3 * C::kRows]));
  }
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Raises the references that are too low to the maximum of this block; `factors` of the output.
template <class C>
__device__ __forceinline__ void raise_references(const DecodeShared<C>& shared, int stream,
                                                 const float (&scores)[C::kRows / 2],
                                                 DecodeSoftmax<C>& state, float scale,
                                                 float threshold,
                                                 float (&factors)[DecodeSoftmax<C>::kQueries]) {
  float highest[DecodeSoftmax<C>::kQueries];
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const int at = i / 2 * 4 + i % 2;
    highest[i] = fmaxf(scores[at], scores[at + 2]);
  }
  over_keys(shared, stream, highest, Larger());
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    const float before = state.reference[i];
    const bool grows = highest[i] > before + threshold;
    factors[i] = !grows ? 1.f : exp2_fast((before - highest[i]) * scale);
    state.reference[i] = grows ? highest[i] : before;
    state.sum[i] *= factors[i];
  }
}

}  // namespace jit_kernel::hopper
