// Rotary embedding of the heads of queries and keys at their tokens' positions, after a norm of
// each head where it has a weight: computed in float32, rounded once. Elements past the rotated
// ones are copied, normed. In place, too: a row is read before it is written.
//
// A position outside the tables gives NaN on a GPU; a CPU looks first, and raises.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

constexpr int kPairs = 8;  // a thread's

// Where a thread's two times eight elements of a row lie, and the pairs that they are.
struct Place {
  int first, first_end, second, second_end;  // elements
  int pair, pairs;                           // the first pair, and the end; none in the tail
  bool alternate;                            // pairs are neighbours
};

__device__ __forceinline__ Place place_of(int size, int rotary, bool interleaved) {
  const int half = rotary / 2, turning = (half + kPairs - 1) / kPairs;
  const int thread = static_cast<int>(threadIdx.x), pair = thread * kPairs;
  if (thread >= turning) {
    const int at = rotary + (thread - turning) * 2 * kPairs;
    return {at, size, at + kPairs, size, 0, 0, false};
  }
  if (interleaved) return {2 * pair, rotary, 2 * pair + kPairs, rotary, pair, half, true};
  return {pair, half, half + pair, rotary, pair, half, false};
}

// (first, second) of each pair: neighbours come as sixteen in a row.
__device__ __forceinline__ void regroup(float (&a)[kPairs], float (&b)[kPairs], bool to_pairs) {
  float in[2 * kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    in[to_pairs ? j : 2 * j] = a[j];
    in[to_pairs ? kPairs + j : 2 * j + 1] = b[j];
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    a[j] = to_pairs ? in[2 * j] : in[j];
    b[j] = to_pairs ? in[2 * j + 1] : in[kPairs + j];
  }
}

// A row is kHeads heads of a token, of q or of k, which turn by the same angles: their elements are
// all on the way before the angles are. blockDim.x threads, at most a warp where kHeads > 1, share
// a row; the rows of a token are those of q, then those of k.
template <class T, class Angle, class Weight, bool kWide, int kHeads>
__global__ void __launch_bounds__(kMostThreads)
    apply_rope(const T* q, const T* k, T* q_out, T* k_out, const Angle* cos, const Angle* sin,
               const void* positions, const Weight* q_weight, const Weight* k_weight, Index tokens,
               int q_heads, int k_heads, int size, int rotary, Index table_rows, Index q_token,
               Index q_head, Index k_token, Index k_head, Index q_out_token, Index q_out_head,
               Index k_out_token, Index k_out_head, Index cos_row, Index sin_row, float eps,
               bool interleaved, bool wide_positions) {
  constexpr int kN = kWords<T, kPairs>;
  meet_neighbours();
  const unsigned row = static_cast<unsigned>(own_row());
  const unsigned q_rows = (q_heads + kHeads - 1) / kHeads, k_rows = (k_heads + kHeads - 1) / kHeads;
  const Index token = row / (q_rows + k_rows);
  const unsigned group = row % (q_rows + k_rows);
  const bool present = token < tokens, is_q = group < q_rows;
  const int head = static_cast<int>(is_q ? group : group - q_rows) * kHeads;
  const int heads = present ? (is_q ? q_heads : k_heads) - head : 0;
  const Index step = is_q ? q_head : k_head, to_step = is_q ? q_out_head : k_out_head;
  const T* from = reinterpret_cast<const T*>(
      address(is_q ? q : k, token * (is_q ? q_token : k_token) + head * step));
  T* to = reinterpret_cast<T*>(
      address(is_q ? q_out : k_out, token * (is_q ? q_out_token : k_out_token) + head * to_step));
  const Weight* weight = is_q ? q_weight : k_weight;
  const Place at = place_of(size, rotary, interleaved);

  unsigned first[kHeads][kN], second[kHeads][kN];
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    const T* own = reinterpret_cast<const T*>(address(from, n * step));
    load_packed<T, kWide, kPairs>(own, at.first, n < heads ? at.first_end : 0, first[n]);
    load_packed<T, kWide, kPairs>(own, at.second, n < heads ? at.second_end : 0, second[n]);
  }
  Index position = 0;
  if (present) {
    position = wide_positions ? static_cast<const Index*>(positions)[token]
                              : static_cast<const int*>(positions)[token];
  }
  unsigned weights[2][kWords<Weight, kPairs>];
  load_packed<Weight, kWide, kPairs>(weight, at.first, weight ? at.first_end : 0, weights[0]);
  load_packed<Weight, kWide, kPairs>(weight, at.second, weight ? at.second_end : 0, weights[1]);
  const bool inside = position >= 0 && position < table_rows;
  float c[kPairs], s[kPairs];
  if (inside) {
    const int pairs = present ? at.pairs : 0;
    load_floats<Angle, kWide, kPairs>(
        reinterpret_cast<const Angle*>(address(cos, position * cos_row)), at.pair, pairs, c);
    load_floats<Angle, kWide, kPairs>(
        reinterpret_cast<const Angle*>(address(sin, position * sin_row)), at.pair, pairs, s);
  } else {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) c[j] = s[j] = __uint_as_float(0x7fc00000u);
  }
  float factors[kHeads];
  if (q_weight || k_weight) {
#pragma unroll
    for (int n = 0; n < kHeads; ++n) {
      float a[kPairs], b[kPairs];
      unpack<T>(first[n], a);
      unpack<T>(second[n], b);
      factors[n] = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) factors[n] += a[j] * a[j] + b[j] * b[j];
    }
    if constexpr (kHeads > 1) {
      over_lanes<Sum>(factors);
    } else {
      factors[0] = over_row<Sum>(factors[0]);
    }
    const float share = 1.0f / static_cast<float>(size);
#pragma unroll
    for (int n = 0; n < kHeads; ++n) factors[n] = rsqrtf(factors[n] * share + eps);
  }
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    float a[kPairs], b[kPairs];
    unpack<T>(first[n], a);
    unpack<T>(second[n], b);
    if (weight) {
      float w[kPairs], v[kPairs];
      unpack<Weight>(weights[0], w);
      unpack<Weight>(weights[1], v);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) a[j] *= factors[n] * w[j], b[j] *= factors[n] * v[j];
    }
    if (at.pairs) {
      if (at.alternate) regroup(a, b, true);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float x = a[j];
        a[j] = x * c[j] - b[j] * s[j];
        b[j] = x * s[j] + b[j] * c[j];
      }
      if (at.alternate) regroup(a, b, false);
    }
    T* own = reinterpret_cast<T*>(address(to, n * to_step));
    store_floats<T, kWide, kPairs>(own, at.first, n < heads ? at.first_end : 0, a);
    store_floats<T, kWide, kPairs>(own, at.second, n < heads ? at.second_end : 0, b);
  }
}

}  // namespace jit_kernel

#else
#include <cmath>
#include <string>

#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

constexpr int64_t kMostHeadSize = 512;

// The heads of q or of k.
struct Heads {
  const DLTensor *from, *to, *weight;
  int64_t count, token, head, to_token, to_head;
};

struct RopeCall {
  int64_t tokens, size, rotary, cos_row, sin_row, threads;
  const DLTensor *cos, *sin, *positions;
  float eps;
  bool interleaved;
};

inline void read_floats(const DLTensor& t, int64_t offset, float* to, int64_t n) {
  with_element<f32, bf16, fp16>(t, "a table or weight", [&](auto element) {
    simd::convert_to_float(data_of<decltype(element)>(t) + offset, to, n);
  });
}

inline void norm_head(float* row, const float* weight, int64_t size, float eps) {
  const float mean = sum_of_squares(row, size) / static_cast<float>(size);
  const float factor = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < size; ++i) row[i] *= factor * weight[i];
}

inline void turn_head(float* __restrict row, const float* __restrict c, const float* __restrict s,
                      int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1;
  float *first = row, *second = interleaved ? row + 1 : row + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = first[i * step], b = second[i * step];
    first[i * step] = a * c[i] - b * s[i];
    second[i * step] = a * s[i] + b * c[i];
  }
}

template <class T>
inline void turn_heads(const RopeCall& call, const Heads& heads) {
  if (heads.count == 0) return;
  float weight[kMostHeadSize];
  if (heads.weight) read_floats(*heads.weight, 0, weight, call.size);
  const int64_t half = call.rotary / 2;
  const int64_t bytes = 2 * heads.count * call.size * static_cast<int64_t>(sizeof(T));
  parallel_rows(call.tokens, bytes, call.threads, [&](int64_t begin, int64_t end) {
    float row[kMostHeadSize], c[kMostHeadSize / 2], s[kMostHeadSize / 2];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = integer_at(*call.positions, t);
      read_floats(*call.cos, position * call.cos_row, c, half);
      read_floats(*call.sin, position * call.sin_row, s, half);
      for (int64_t h = 0; h < heads.count; ++h) {
        const T* from = data_of<T>(heads.from) + t * heads.token + h * heads.head;
        simd::convert_to_float(from, row, call.size);
        if (heads.weight) norm_head(row, weight, call.size, call.eps);
        // Neighbours and halves apart, so that each loop has strides that the compiler knows.
        call.interleaved ? turn_head(row, c, s, half, true) : turn_head(row, c, s, half, false);
        T* to = data_of<T>(heads.to) + t * heads.to_token + h * heads.to_head;
        simd::convert_from_float(row, to, call.size, 1.0f);
      }
    }
  });
}

inline void apply_rope(TensorArguments& from) {
  Heads q{}, k{};
  RopeCall call;
  q.from = &from.tensor(), k.from = from.maybe_tensor();
  q.to = &from.tensor(), k.to = from.maybe_tensor();
  call.cos = &from.tensor(), call.sin = &from.tensor(), call.positions = &from.tensor();
  q.weight = from.maybe_tensor(), k.weight = from.maybe_tensor();
  call.tokens = from.integer();
  q.count = from.integer(), k.count = from.integer();
  call.size = from.integer(), call.rotary = from.integer();
  const int64_t table_rows = from.integer();
  q.token = from.integer(), q.head = from.integer();
  k.token = from.integer(), k.head = from.integer();
  q.to_token = from.integer(), q.to_head = from.integer();
  k.to_token = from.integer(), k.to_head = from.integer();
  call.cos_row = from.integer(), call.sin_row = from.integer();
  call.eps = from.number();
  call.interleaved = from.boolean();
  from.boolean();  // the width of positions, which the tensor tells
  call.threads = from.integer();
  for (int64_t t = 0; t < call.tokens; ++t) {
    const int64_t position = integer_at(*call.positions, t);
    if (position >= 0 && position < table_rows) continue;
    throw std::out_of_range("positions[" + std::to_string(t) + "] is " + std::to_string(position) +
                            "; it must be 0 or more and below cos's " + std::to_string(table_rows) +
                            " rows");
  }
  with_element<f32, bf16, fp16>(*q.from, "q", [&](auto element) {
    turn_heads<decltype(element)>(call, q);
    turn_heads<decltype(element)>(call, k);
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_APPLY_ROPE() \
  JIT_KERNEL_EXPORT_PLAIN(apply_rope, 29, ::jit_kernel::apply_rope)
#endif
