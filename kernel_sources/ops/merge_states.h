// Parts of attention over disjoint keys to the whole: lse = log(sum_i exp(lse_i)),
// out = sum_i exp(lse_i - lse) out_i. A part that saw nothing has an lse of -inf, or of +inf as
// FlashAttention-2 marks it; its values may be anything. Rows that no part saw give 0 and -inf.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

__device__ __forceinline__ float seen(float lse) {
  return lse == __uint_as_float(0x7f800000u) ? __uint_as_float(0xff800000u) : lse;
}

// Two passes over a row's lse, which are few, and one over its values, kAtOnce parts at a time. The
// first ones are asked for beside their lse, whatever these will say: one latency less.
template <class T, class Out, bool kWide>
__global__ void __launch_bounds__(kMostThreads)
    merge_states(const T* parts, const float* part_lse, Out* out, float* lse, int splits,
                 Index rows, int inner, Index size, Index part_split, Index part_outer,
                 Index part_inner, Index lse_split, Index part_lse_outer, Index part_lse_inner,
                 Index out_outer, Index out_inner, Index lse_outer, Index lse_inner) {
  constexpr int kCount = kPiece<T>, kAtOnce = 4;
  meet_neighbours();
  const Index row = own_row();
  if (row >= rows) return;
  const float* weights = nested_row(part_lse, row, inner, part_lse_outer, part_lse_inner);
  const T* values = nested_row(parts, row, inner, part_outer, part_inner);
  const float nothing = __uint_as_float(0xff800000u);
  unsigned words[kAtOnce][4];
  auto load = [&](int i, Index begin, bool wanted, unsigned (&to)[4]) {
    const T* part = reinterpret_cast<const T*>(address(values, i * part_split));
    load_packed<T, kWide, kCount>(part, begin, wanted ? size : 0, to);
  };
  const Index own_begin = static_cast<Index>(threadIdx.x) * kCount;
  float first_lse[kAtOnce];
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    first_lse[n] = n < splits ? seen(weights[n * lse_split]) : nothing;
  }
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) load(n, own_begin, n < splits, words[n]);

  float largest = nothing, sum = 0.0f, first_power[kAtOnce];
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) largest = fmaxf(largest, first_lse[n]);
  for (int i = kAtOnce; i < splits; ++i) largest = fmaxf(largest, seen(weights[i * lse_split]));
  // Every thread of a row computes these: with expf, a power and a division for each part twice,
  // and a choice an element, instructions were what bounded a merge of four parts, not memory.
  auto power = [&](float own) { return own == nothing ? 0.0f : __expf(own - largest); };
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) sum += first_power[n] = power(first_lse[n]);
  for (int i = kAtOnce; i < splits; ++i) sum += power(seen(weights[i * lse_split]));
  const float whole = sum == 0.0f ? nothing : largest + logf(sum);
  if (lse && threadIdx.x == 0) *nested_row(lse, row, inner, lse_outer, lse_inner) = whole;

  Out* to = nested_row(out, row, inner, out_outer, out_inner);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (Index begin = own_begin; begin < size; begin += static_cast<Index>(blockDim.x) * kCount) {
    float total[kCount] = {};
    for (int first = 0; first < splits; first += kAtOnce) {
      float weight[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = first + n;
        const float own = first == 0   ? first_power[n]
                          : i < splits ? power(seen(weights[i * lse_split]))
                                       : 0.0f;
        weight[n] = own * inverse;
        if (first > 0 || begin != own_begin) load(i, begin, weight[n] != 0.0f, words[n]);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (weight[n] == 0.0f) continue;  // its values may be anything
        float x[kCount];
        unpack<T>(words[n], x);
#pragma unroll
        for (int j = 0; j < kCount; ++j) total[j] += weight[n] * x[j];
      }
    }
    store_floats<Out, kWide, kCount>(to, begin, size, total);
  }
}

}  // namespace jit_kernel

#else
#include <cmath>
#include <vector>

#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

struct MergeCall {
  int64_t splits, rows, size, part_split, lse_split, threads;
  Nesting parts, part_lse, out, lse;
};

// The weights of a row's parts; what is returned is the row's lse.
inline float weigh(const float* part_lse, const MergeCall& call, float* weights) {
  float largest = -INFINITY;
  for (int64_t i = 0; i < call.splits; ++i) {
    const float own = part_lse[i * call.lse_split];
    weights[i] = own == INFINITY ? -INFINITY : own;
    if (!(weights[i] <= largest)) largest = weights[i];  // a NaN, too, and it stays
  }
  if (largest == -INFINITY) {
    std::fill_n(weights, call.splits, 0.0f);
    return -INFINITY;
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < call.splits; ++i) sum += weights[i] = std::exp(weights[i] - largest);
  for (int64_t i = 0; i < call.splits; ++i) weights[i] /= sum;
  return largest + std::log(sum);
}

template <class T, class Out>
inline void merge_rows(const T* parts, const float* part_lse, Out* out, float* lse,
                       const MergeCall& call) {
  const int64_t size = call.size, row_bytes = (call.splits + 1) * size * int64_t{sizeof(T)};
  const bool past = streams(out, call.rows, size, call.out);
  parallel_rows(call.rows, row_bytes, call.threads, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(static_cast<size_t>(call.splits));
    for (int64_t r = begin; r < end; ++r) {
      const float whole = weigh(part_lse + call.part_lse.at(r), call, weights.data());
      if (lse) lse[call.lse.at(r)] = whole;
      const T* values = parts + call.parts.at(r);
      Out* to = out + call.out.at(r);
      for (int64_t i = 0; i < size; i += simd::kLanes) {
        simd::Vec total = simd::zero();
        for (int64_t n = 0; n < call.splits; ++n) {
          const float weight = weights[static_cast<size_t>(n)];
          if (weight == 0.0f) continue;  // its values may be anything
          const simd::Vec part = read(values + n * call.part_split + i, size - i);
          total = simd::fma(part, simd::set1(weight), total);
        }
        write(to + i, total, size - i, past);
      }
    }
  });
}

inline void merge_states(TensorArguments& from) {
  const DLTensor &parts = from.tensor(), &part_lse = from.tensor(), &out = from.tensor();
  const DLTensor* lse = from.maybe_tensor();
  MergeCall call;
  call.splits = from.integer(), call.rows = from.integer();
  const int64_t inner = from.integer();
  call.size = from.integer();
  call.parts = call.part_lse = call.out = call.lse = {inner, 0, 0};
  call.part_split = from.integer();
  call.parts.outer_stride = from.integer(), call.parts.inner_stride = from.integer();
  call.lse_split = from.integer();
  for (Nesting* each : {&call.part_lse, &call.out, &call.lse}) {
    each->outer_stride = from.integer(), each->inner_stride = from.integer();
  }
  call.threads = from.integer();
  with_element<f32, bf16, fp16>(parts, "out_partial", [&](auto element) {
    with_element<f32, bf16, fp16>(out, "out", [&](auto result) {
      using T = decltype(element);
      using Out = decltype(result);
      merge_rows(data_of<T>(parts), data_of<float>(part_lse), data_of<Out>(out),
                 data_of<float>(lse), call);
    });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_MERGE_STATES() \
  JIT_KERNEL_EXPORT_PLAIN(merge_states, 19, ::jit_kernel::merge_states)
#endif
