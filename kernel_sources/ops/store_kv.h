// Keys and values of tokens into the slots of a paged cache: slot = page * page_size + place in the
// page. A negative slot stores nothing. An e4m3 cache holds them divided by a scale, one for all
// heads or one a head, rounded once.
//
// A slot past the cache stores nothing on a GPU; a CPU looks first, and raises.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

template <class T, class Cached, bool kWide>
__device__ __forceinline__ void store_piece(const unsigned (&words)[4], Cached* row, int begin,
                                            int size, const float* scale) {
  constexpr int kCount = kPiece<T>;
  if constexpr (kElementBytes<T> == kElementBytes<Cached>) {
    store_packed<Cached, kWide, kCount>(row, begin, size, words);
  } else {
    float x[kCount];
    unpack<T>(words, x);
    const float factor = 1.0f / *scale;
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] *= factor;
    store_floats<Cached, kWide, kCount>(row, begin, size, x);
  }
}

// A row is a token's head: both its keys and its values.
template <class T, class Cached, bool kWide>
__global__ void __launch_bounds__(kMostThreads)
    store_kv(const T* k, const T* v, Cached* k_cache, Cached* v_cache, const void* slots,
             const float* k_scale, const float* v_scale, Index tokens, int heads, int k_size,
             int v_size, Index page_size, Index slot_count, Index k_token, Index k_head,
             Index v_token, Index v_head, Index k_page, Index k_place, Index k_cache_head,
             Index v_page, Index v_place, Index v_cache_head, int scale_step, bool wide_slots) {
  constexpr int kCount = kPiece<T>;
  meet_neighbours();
  const unsigned row = static_cast<unsigned>(own_row());
  const Index token = row / static_cast<unsigned>(heads);
  const int head = static_cast<int>(row % static_cast<unsigned>(heads));
  if (token >= tokens) return;
  const T* keys = reinterpret_cast<const T*>(address(k, token * k_token + head * k_head));
  const T* values = reinterpret_cast<const T*>(address(v, token * v_token + head * v_head));
  const Index slot =
      wide_slots ? static_cast<const Index*>(slots)[token] : static_cast<const int*>(slots)[token];
  const int most = k_size < v_size ? v_size : k_size;
  for (int begin = static_cast<int>(threadIdx.x) * kCount; begin < most;
       begin += static_cast<int>(blockDim.x) * kCount) {
    unsigned key[4], value[4];
    load_packed<T, kWide, kCount>(keys, begin, k_size, key);
    load_packed<T, kWide, kCount>(values, begin, v_size, value);
    if (slot < 0 || slot >= slot_count) return;
    const Index page = slot >> 32 ? slot / page_size
                                  : static_cast<unsigned>(slot) / static_cast<unsigned>(page_size);
    const Index place = slot - page * page_size;
    Cached* key_row = reinterpret_cast<Cached*>(
        address(k_cache, page * k_page + place * k_place + head * k_cache_head));
    Cached* value_row = reinterpret_cast<Cached*>(
        address(v_cache, page * v_page + place * v_place + head * v_cache_head));
    store_piece<T, Cached, kWide>(key, key_row, begin, k_size, k_scale + head * scale_step);
    store_piece<T, Cached, kWide>(value, value_row, begin, v_size, v_scale + head * scale_step);
  }
}

}  // namespace jit_kernel

#else
#include <string>

#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

// Keys or values, and their cache.
struct Stored {
  const DLTensor *from, *cache, *scale;
  int64_t size, token, head, page, place, cache_head;
};

template <class T, class Cached>
inline void store_row(const Stored& s, int64_t token, int64_t head, int64_t page, int64_t place,
                      int64_t scale_step, bool past) {
  const T* from = data_of<T>(s.from) + token * s.token + head * s.head;
  Cached* to = data_of<Cached>(s.cache) + page * s.page + place * s.place + head * s.cache_head;
  if constexpr (sizeof(T) == sizeof(Cached)) {
    copy_row(to, from, s.size * static_cast<int64_t>(sizeof(T)), past);
  } else {
    const simd::Vec factor = simd::set1(1.0f / data_of<float>(s.scale)[head * scale_step]);
    for (int64_t i = 0; i < s.size; i += simd::kLanes) {
      write(to + i, read(from + i, s.size - i) * factor, s.size - i);
    }
  }
}

inline void check_slots(const DLTensor& slots, int64_t tokens, int64_t slot_count) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = integer_at(slots, t);
    if (slot < slot_count) continue;
    throw std::out_of_range("slots[" + std::to_string(t) + "] is " + std::to_string(slot) +
                            "; it must be below the " + std::to_string(slot_count) +
                            " slots of the cache, or negative for none");
  }
}

inline void store_kv(TensorArguments& from) {
  Stored k{}, v{};
  k.from = &from.tensor(), v.from = &from.tensor();
  k.cache = &from.tensor(), v.cache = &from.tensor();
  const DLTensor& slots = from.tensor();
  k.scale = from.maybe_tensor(), v.scale = from.maybe_tensor();
  const int64_t tokens = from.integer(), heads = from.integer();
  k.size = from.integer(), v.size = from.integer();
  const int64_t page_size = from.integer(), slot_count = from.integer();
  k.token = from.integer(), k.head = from.integer();
  v.token = from.integer(), v.head = from.integer();
  for (Stored* each : {&k, &v}) {
    each->page = from.integer(), each->place = from.integer(), each->cache_head = from.integer();
  }
  const int64_t scale_step = from.integer();
  from.boolean();  // the width of slots, which the tensor tells
  const int64_t threads = from.integer();
  check_slots(slots, tokens, slot_count);
  auto run = [&](auto element, auto cached) {
    using T = decltype(element);
    using Cached = decltype(cached);
    const int64_t bytes =
        heads * (k.size + v.size) * static_cast<int64_t>(sizeof(T) + sizeof(Cached));
    const bool past = tokens * bytes >= kStreamedBytes;
    parallel_rows(tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t slot = integer_at(slots, t);
        if (slot < 0) continue;
        for (int64_t h = 0; h < heads; ++h) {
          for (const Stored* each : {&k, &v}) {
            store_row<T, Cached>(*each, t, h, slot / page_size, slot % page_size, scale_step, past);
          }
        }
      }
    });
  };
  with_element<f32, bf16, fp16>(*k.from, "k", [&](auto element) {
    with_element<decltype(element), e4m3>(*k.cache, "k_cache",
                                          [&](auto cached) { run(element, cached); });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_STORE_KV() JIT_KERNEL_EXPORT_PLAIN(store_kv, 26, ::jit_kernel::store_kv)
#endif
