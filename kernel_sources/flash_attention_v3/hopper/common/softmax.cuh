// Online softmax on accumulator fragments: each thread holds two rows, four threads share a row.
#pragma once

#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/math.cuh"

namespace jit_kernel::hopper {

// How much the reference may lag behind the maximum before the output is rescaled, as exponent
// of 2. Probabilities stay below 2^8, where bf16 and fp16 keep their relative precision.
constexpr float kRescaleThreshold = 8.f;

struct Softmax {
  float reference[2];  // subtracted in the exponent, as exponent of 2; -inf before any key
  float sum[2];        // this thread's part of the denominator
  float rescale[2];    // factor of the output before the last block
  bool must_rescale;   // some row of this warp has a factor other than 1
  bool settled;        // every row of this warp has seen a key
};

__device__ __forceinline__ void start_row(Softmax& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.reference[r] = minus_infinity();
    state.sum[r] = 0.f;
  }
  state.settled = false;
}

// The maximum of a row over its four threads.
__device__ __forceinline__ float quad_maximum(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Rows that have not seen a key before take their maximum in this block as reference.
template <int kCount>
__device__ __forceinline__ void settle(const float (&scores)[kCount], Softmax& state, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = fmaxf(scores[2 * r], scores[2 * r + 1]);
    float b = fmaxf(scores[4 + 2 * r], scores[4 + 2 * r + 1]);
#pragma unroll
    for (int i = 2; i < kCount / 4; i += 2) {
      a = fmaxf(a, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      b = fmaxf(b, fmaxf(scores[4 * i + 4 + 2 * r], scores[4 * i + 4 + 2 * r + 1]));
    }
    const float maximum = quad_maximum(fmaxf(a, b)) * scale;
    state.reference[r] = state.reference[r] == minus_infinity() ? maximum : state.reference[r];
  }
  state.settled =
      __all_sync(0xffffffffu, fminf(state.reference[0], state.reference[1]) > minus_infinity());
}

// Turns scores into probabilities relative to the reference, and updates reference and sum.
//
// Exponents come first: only those above the threshold matter, and positive floats are ordered like
// integers, of which one instruction compares three. Threads of a row need not know of each other
// unless one of them finds such an exponent. Together that is a fifth of the instructions less than
// a true maximum in every block, and under load instructions are power, and power is clock.
template <int kCount>
__device__ __forceinline__ void softmax_step(float (&scores)[kCount], Softmax& state, float scale) {
  static_assert(kCount % 8 == 0, "a block has a multiple of 16 keys");
  if (!state.settled) settle(scores, state, scale);
  int highest[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float offset = state.reference[r] == minus_infinity() ? 0.f : -state.reference[r];
    int high[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float& a = scores[4 * i + 2 * r];
      float& b = scores[4 * i + 2 * r + 1];
      a = fmaf(a, scale, offset);
      b = fmaf(b, scale, offset);
      high[i % 2] = max(max(high[i % 2], __float_as_int(a)), __float_as_int(b));
    }
    highest[r] = max(high[0], high[1]);
    state.rescale[r] = 1.f;
  }
  state.must_rescale =
      __any_sync(0xffffffffu, max(highest[0], highest[1]) > __float_as_int(kRescaleThreshold));
  if (state.must_rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float growth = quad_maximum(__int_as_float(highest[r]));
      growth = growth > kRescaleThreshold ? growth : 0.f;
      state.rescale[r] = exp2_fast(-growth);
      state.reference[r] += growth;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        scores[4 * i + 2 * r] -= growth;
        scores[4 * i + 2 * r + 1] -= growth;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[4 * i + 2 * r + c];
        score = exp2_fast(score);
        sums[c] += score;
      }
    }
    state.sum[r] = fmaf(state.sum[r], state.rescale[r], sums[0] + sums[1]);
  }
}

template <class Element, int kCount>
__device__ __forceinline__ void pack_probabilities(const float (&scores)[kCount],
                                                   u32 (&packed)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
}

template <int kCount>
__device__ __forceinline__ void rescale_output(float (&output)[kCount], const Softmax& state) {
  if (!state.must_rescale) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) output[i] *= state.rescale[(i >> 1) & 1];
}

struct RowResult {
  float factor;  // the accumulated output is multiplied by it
  float lse;     // natural logarithm
};

// Ends a row: the sum over its four threads, the sink's term once, and the result's factor.
// `sink_log2` is the sink times log2(e), -inf for none.
__device__ __forceinline__ RowResult finish_row(float sum, float reference, float sink_log2) {
  const float kLn2 = 0.69314718056f;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const float top = fmaxf(reference, sink_log2);
  const bool none = top == minus_infinity() && sum == sum;  // not where no score is a number
  const float base = none ? 0.f : top;
  const float shift = exp2_fast(reference - base);
  const float total = fmaf(sum, shift, exp2_fast(sink_log2 - base));
  return {none ? 0.f : __fdividef(shift, total),
          none ? minus_infinity() : (base + __log2f(total)) * kLn2};
}

}  // namespace jit_kernel::hopper
