// Rows of elements as kernels that read once and write once want them: vectors of floats in
// between, on threads, past the caches where results are many.
#pragma once

#include <dlpack/dlpack.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "jit_kernel/cpu/simd.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// A thread is worth waking (5 us) for about what a core moves meanwhile.
constexpr int64_t kBytesPerThread = 32 * 1024;
// Results of so many bytes are written past the caches: a core's own holds 0.5 to 2 MiB.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;

template <class T>
inline T* data_of(const DLTensor& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
}
template <class T>
inline T* data_of(const DLTensor* t) {
  return t ? data_of<T>(*t) : nullptr;
}

// The integer at i of a dense tensor of int32 or int64.
inline int64_t integer_at(const DLTensor& t, int64_t i) {
  return t.dtype.bits == 64 ? data_of<int64_t>(t)[i] : data_of<int32_t>(t)[i];
}

template <class Element>
constexpr DLDataType kTypeOf = {kDLFloat, 32, 1};
template <>
constexpr DLDataType kTypeOf<bf16> = {kDLBfloat, 16, 1};
template <>
constexpr DLDataType kTypeOf<fp16> = {kDLFloat, 16, 1};
template <>
constexpr DLDataType kTypeOf<e4m3> = {kDLFloat8_e4m3fn, 8, 1};

template <class Element>
inline bool is_of(const DLTensor& t) {
  return t.dtype.code == kTypeOf<Element>.code && t.dtype.bits == kTypeOf<Element>.bits;
}

// f(Element()) of the one among these types that a tensor has.
template <class... Elements, class F>
inline void with_element(const DLTensor& t, const char* name, F&& f) {
  const bool found = ((is_of<Elements>(t) ? (f(Elements()), true) : false) || ...);
  if (!found) throw std::invalid_argument(std::string(name) + " has a dtype that is not served");
}

// `rows` rows in two nested dimensions, the inner of `inner`; strides in elements.
struct Nesting {
  int64_t inner, outer_stride, inner_stride;
  int64_t at(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// f(begin, end) for ranges of [0, rows) that cover it, on threads.
template <class F>
inline void parallel_rows(int64_t rows, int64_t row_bytes, int64_t threads, F&& f) {
  if (rows <= 0) return;
  const int64_t worth = rows * std::max<int64_t>(row_bytes, 1) / kBytesPerThread + 1;
  const int64_t parts = std::min({threads, rows, worth});
  // Four ranges a thread: one that starts late takes fewer.
  const int64_t step = parts <= 1 ? rows : (rows + 4 * parts - 1) / (4 * parts);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
      if (begin >= rows) break;
      f(begin, std::min(begin + step, rows));
    }
#ifdef __AVX2__
    _mm_sfence();  // what was written past the caches is there before another thread reads it
#endif
  };
  ThreadPool::instance().run(parts, threads, work);
}

template <class Element>
__attribute__((noinline)) simd::Vec read_some(const Element* from, int64_t n) {
  alignas(64) float lanes[simd::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(from[i]);
  return simd::load(lanes);
}
template <class Element>
__attribute__((noinline)) void write_some(Element* to, simd::Vec x, int64_t n) {
  alignas(64) float lanes[simd::kLanes];
  simd::store(lanes, x);
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<Element>(lanes[i]);
}

// A vector of a row of which `left` elements are left; zeros past its end.
template <class Element>
inline simd::Vec read(const Element* from, int64_t left) {
  if (__builtin_expect(left >= simd::kLanes, 1)) return simd::load_as_float(from);
  return read_some(from, left);
}
template <class Element>
inline void write(Element* to, simd::Vec x, int64_t left) {
  if (__builtin_expect(left >= simd::kLanes, 1)) return simd::store_as(to, x);
  write_some(to, x, left);
}

// Past the caches: the lines of the result are not read before they are written. `to` is at a
// multiple of the vector's bytes.
template <class Element>
inline void write_past(Element* to, simd::Vec x) {
#if defined(JIT_KERNEL_AVX512)
  alignas(64) Element piece[simd::kLanes];
  simd::store_as(piece, x);
  if constexpr (sizeof(piece) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(piece));
  } else if constexpr (sizeof(piece) == 32) {
    const auto* whole = reinterpret_cast<const __m256i*>(piece);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(whole));
  } else {
    const auto* whole = reinterpret_cast<const __m128i*>(piece);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(whole));
  }
#elif defined(__AVX2__)
  alignas(32) Element piece[simd::kLanes];
  simd::store_as(piece, x);
  if constexpr (sizeof(piece) == 32) {
    const auto* whole = reinterpret_cast<const __m256i*>(piece);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(whole));
  } else if constexpr (sizeof(piece) == 16) {
    const auto* whole = reinterpret_cast<const __m128i*>(piece);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(whole));
  } else {
    long long whole;
    std::memcpy(&whole, piece, sizeof(whole));
    _mm_stream_si64(reinterpret_cast<long long*>(to), whole);
  }
#else
  simd::store_as(to, x);
#endif
}

// Copies a row, past the caches where results are many.
inline void copy_row(void* to, const void* from, int64_t bytes, [[maybe_unused]] bool past_caches) {
  int64_t i = 0;
#ifdef __AVX2__
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  if (past_caches && reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (; i + 32 <= bytes; i += 32) {
      const __m256i piece = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), piece);
    }
  }
#endif
  std::memcpy(static_cast<char*>(to) + i, static_cast<const char*>(from) + i,
              static_cast<size_t>(bytes - i));
}

// The sum of the squares of n elements, in two sums that do not wait for each other.
template <class Element>
inline float sum_of_squares(const Element* x, int64_t n) {
  simd::Vec even = simd::zero(), odd = simd::zero();
  for (int64_t i = 0; i < n; i += simd::kLanes) {
    const simd::Vec a = read(x + i, n - i);
    std::swap(even, odd);
    even = simd::fma(a, a, even);
  }
  return simd::reduce_add(even + odd);
}

// Whether a result's rows are many, and lie as write_past() wants them.
template <class Element>
inline bool streams(const Element* out, int64_t rows, int64_t size, const Nesting& nesting) {
  constexpr int64_t kVectorBytes = simd::kLanes * static_cast<int64_t>(sizeof(Element));
  const int64_t bytes = static_cast<int64_t>(sizeof(Element));
  const auto base = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kVectorBytes);
  return rows * size * bytes >= kStreamedBytes && base == 0 &&
         nesting.outer_stride * bytes % kVectorBytes == 0 &&
         nesting.inner_stride * bytes % kVectorBytes == 0;
}
template <class Element>
inline void write(Element* to, simd::Vec x, int64_t left, bool past_caches) {
  if (past_caches && left >= simd::kLanes) return write_past(to, x);
  write(to, x, left);
}

}  // namespace jit_kernel
