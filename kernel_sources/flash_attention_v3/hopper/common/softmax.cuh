// Online softmax on accumulator fragments: each thread holds two rows, four threads share a row.
#pragma once

#include "jit_kernel/cuda/element.cuh"
#include "jit_kernel/cuda/math.cuh"

namespace jit_kernel::hopper {

// Of probabilities, as exponents of 2: kTop, that of a maximum which the reference has just been
// taken from, and kThreshold, the one above which the reference is taken anew and the output
// rescaled. bf16 and fp16 keep their relative precision below 2^8.
constexpr float kRescaleThreshold = 8.f;
template <class Element>
struct ProbabilityRange {
  static constexpr float kTop = 0.f, kThreshold = kRescaleThreshold;
};
// e4m3 ends at 448 = 2^8.8, and loses precision below 2^-6. A power of two is not rounded: a row
// that sees one key has its value.
template <>
struct ProbabilityRange<e4m3> {
  static constexpr float kTop = 8.f, kThreshold = 8.8f;
};

// Larger references are exponents of which float32 shows no differences any more: rounding one to
// 2^20 adds 2^-5 to all exponents of a row, to 2^32 so much that ex2 overflows.
constexpr float kLargestReference = 1048576.f;
constexpr float kLargestFloat = 3.402823466e38f;
// With larger scales rows are kFar from their first key, as products of later ones with the scale
// could be infinite; capped scores are at most 1.
template <bool kSoftcap>
constexpr float kLargestScale = kSoftcap ? kLargestReference : 256.f;

// kSettled: every row of this warp has seen a key. kFar: some row's reference is too large, or
// would be: the references of all are in units of score_unit(), differences from them are taken
// first.
enum class RowsState { kNew, kSettled, kFar };

struct Softmax {
  float reference[2];  // subtracted in the exponent, as exponent of 2; -inf before any key
  float sum[2];        // this thread's part of the denominator
  float rescale[2];    // factor of the output before the last block
  bool must_rescale;   // some row of this warp has a factor other than 1
  RowsState rows;
};

__device__ __forceinline__ void start_row(Softmax& state, bool is_far) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.reference[r] = minus_infinity();
    state.sum[r] = 0.f;
  }
  state.rows = is_far ? RowsState::kFar : RowsState::kNew;
}

// The maximum of a row over its four threads.
__device__ __forceinline__ float quad_maximum(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Of the scores of one of a thread's rows.
template <int kCount>
__device__ __forceinline__ float largest_score(const float (&scores)[kCount], int r) {
  float a = fmaxf(scores[2 * r], scores[2 * r + 1]);
  float b = fmaxf(scores[4 + 2 * r], scores[4 + 2 * r + 1]);
#pragma unroll
  for (int i = 2; i < kCount / 4; i += 2) {
    a = fmaxf(a, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
    b = fmaxf(b, fmaxf(scores[4 * i + 4 + 2 * r], scores[4 * i + 4 + 2 * r + 1]));
  }
  return quad_maximum(fmaxf(a, b));
}

// What scores are multiplied by before the difference: no product is infinite.
__device__ __forceinline__ float score_unit(float scale) { return fminf(scale, 1.f); }

// References that are exponents become products with score_unit(), and from now on are maxima: kTop
// is added to the differences from them.
template <class Element>
__device__ __forceinline__ void go_far(Softmax& state, float scale) {
  state.rows = RowsState::kFar;
  constexpr float kTop = ProbabilityRange<Element>::kTop;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (kTop != 0.f) state.reference[r] += kTop;  // not 0: the sum makes 0 of -0, an instruction
    state.reference[r] = __fdividef(state.reference[r], fmaxf(scale, 1.f));
  }
}

// Scores become their differences from the rows' maxima so far, so that 0 takes the place of the
// reference: a product is rounded before the difference, which is 0 for a maximum and never above.
template <int kCount>
__device__ __forceinline__ void step_far(float (&scores)[kCount], Softmax& state,
                                         const float (&maxima)[2], float scale) {
  const float unit = score_unit(scale), to_scores = __frcp_rn(unit);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(state.reference[r], __fmul_rn(maxima[r], unit));
    const float shift = top == minus_infinity() ? 0.f : top;
    state.rescale[r] = exp2_fast((state.reference[r] - shift) * fmaxf(scale, 1.f));
    state.reference[r] = top;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float& a = scores[4 * i + 2 * r];
      float& b = scores[4 * i + 2 * r + 1];
      a = (__fmul_rn(a, unit) - shift) * to_scores;
      b = (__fmul_rn(b, unit) - shift) * to_scores;
    }
  }
}

// Rows that have not seen a key before take their maximum in this block as reference.
template <class Element, int kCount>
__device__ __forceinline__ void settle(float (&scores)[kCount], Softmax& state, float scale) {
  const float maxima[2] = {largest_score(scores, 0), largest_score(scores, 1)};
  if (state.rows == RowsState::kNew) {
    float highest = 0.f, lowest = kLargestFloat;
    float references[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool is_new = state.reference[r] == minus_infinity();
      references[r] =
          is_new ? maxima[r] * scale - ProbabilityRange<Element>::kTop : state.reference[r];
      if (maxima[r] > minus_infinity()) highest = fmaxf(highest, fabsf(references[r]));
      lowest = fminf(lowest, references[r]);
    }
    if (!__any_sync(0xffffffffu, highest > kLargestReference)) {
      state.reference[0] = references[0];
      state.reference[1] = references[1];
      if (__all_sync(0xffffffffu, lowest > minus_infinity())) state.rows = RowsState::kSettled;
      return;
    }
    go_far<Element>(state, scale);
  }
  step_far(scores, state, maxima, scale);
}

// Turns scores into probabilities relative to the reference, and updates reference and sum.
//
// Exponents come first: only those above the threshold matter, and positive floats are ordered like
// integers, of which one instruction compares three. Threads of a row need not know of each other
// unless one of them finds such an exponent. Together that is a fifth of the instructions less than
// a true maximum in every block, and under load instructions are power, and power is clock.
// `between` is called with 0 in front of the exponentials and with 1 between those of the two rows:
// products that run beside them are waited for there.
template <class Element, class Between, int kCount>
__device__ __forceinline__ void softmax_step(float (&scores)[kCount], Softmax& state, float scale,
                                             Between between) {
  static_assert(kCount % 8 == 0, "a block has a multiple of 16 keys");
  state.rescale[0] = state.rescale[1] = 1.f;
  if (state.rows != RowsState::kSettled) settle<Element>(scores, state, scale);
  const bool far = state.rows == RowsState::kFar;
  int highest[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool has_none = far || state.reference[r] == minus_infinity();
    const float offset = has_none ? ProbabilityRange<Element>::kTop : -state.reference[r];
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
  }
  state.must_rescale =
      far || __any_sync(0xffffffffu, max(highest[0], highest[1]) >
                                         __float_as_int(ProbabilityRange<Element>::kThreshold));
  if (state.must_rescale && !far) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float growth = fminf(quad_maximum(__int_as_float(highest[r])), kLargestFloat);
      growth = growth > ProbabilityRange<Element>::kThreshold
                   ? growth - ProbabilityRange<Element>::kTop
                   : 0.f;
      state.rescale[r] = exp2_fast(-growth);
      state.reference[r] += growth;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        float& a = scores[4 * i + 2 * r];
        float& b = scores[4 * i + 2 * r + 1];
        a = (a > kLargestFloat ? kLargestFloat : a) - growth;  // NaN stays NaN
        b = (b > kLargestFloat ? kLargestFloat : b) - growth;
      }
    }
    const float highest_reference = fmaxf(state.reference[0], state.reference[1]);
    if (__any_sync(0xffffffffu, highest_reference > kLargestReference))
      go_far<Element>(state, scale);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    between(r);
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

// To wgmma's register operand. Of e4m3 there are four keys to a register, in the order that
// transposed values have them: the third and fourth are the thread's two of the next 8 columns.
template <class Element, int kCount, int kPacked>
__device__ __forceinline__ void pack_probabilities(const float (&scores)[kCount],
                                                   u32 (&packed)[kPacked]) {
#pragma unroll
  for (int i = 0; i < kPacked; ++i) {
    if constexpr (ElementSize<Element>::kBytes == 1) {
      const int at = i / 2 * 8 + i % 2 * 2;
      packed[i] = pack_e4m3(scores[at], scores[at + 1], scores[at + 4], scores[at + 5]);
    } else {
      packed[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
    }
  }
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

// Half of a row's reference as an exponent of 2, finite where the row has seen a key: a logit that
// float32 holds is an exponent that it may not hold.
template <class Element>
__device__ __forceinline__ float half_reference(const Softmax& state, int r, float scale) {
  const float reference = state.reference[r];
  const bool far = state.rows == RowsState::kFar;
  const float half = reference * (far ? 0.5f * fmaxf(scale, 1.f) : 0.5f) -
                     (far ? 0.5f * ProbabilityRange<Element>::kTop : 0.f);
  const float finite = fmaxf(-kLargestFloat, fminf(half, kLargestFloat));
  return reference == minus_infinity() ? reference : finite;
}

// Ends a row: the sum over its four threads, the sink's term once, and the result's factor.
// `half_sink` is half of the sink times log2(e), -inf for none.
__device__ __forceinline__ RowResult finish_row(float sum, float half_reference, float half_sink) {
  const float kLn2 = 0.69314718056f;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const float top = fmaxf(half_reference, half_sink);
  const bool none = top == minus_infinity() && sum == sum;  // not where no score is a number
  const float base = none ? 0.f : top;
  const float shift = exp2_fast(2.f * (half_reference - base));
  const float total = fmaf(sum, shift, exp2_fast(2.f * (half_sink - base)));
  return {none ? 0.f : __fdividef(shift, total),
          none ? minus_infinity() : fmaf(base, 2.f * kLn2, __log2f(total) * kLn2)};
}

}  // namespace jit_kernel::hopper
