// Keys and values of sequences out of a paged cache, one behind the other: token t of the result is
// token t - cu_seqlens[s] of its sequence s. An e4m3 cache may be multiplied by a scale, one for
// all heads or one a head, into a wider type.
//
// A page outside the cache gives NaN on a GPU; a CPU looks first, and raises. Rows past the last
// sequence are left alone.
#pragma once

#ifdef __CUDACC__
#include "jit_kernel/cuda/rows.cuh"

namespace jit_kernel {

// The sequence of a token: the last one that begins at or before it. All lanes of a warp look at
// the same time, so that 1,024 sequences take two loads, one after the other.
__device__ __forceinline__ int sequence_of(const int* cu_seqlens, int batch, Index token) {
  int low = 0, high = batch;
  const int lane = static_cast<int>(threadIdx.x);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && cu_seqlens[probe] <= token;
    const int count = __popc(__ballot_sync(0xffffffffu, before));
    low += (count - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

template <class Cached, class T, bool kWide>
__device__ __forceinline__ void load_cached(const Cached* row, int begin, int size, bool inside,
                                            unsigned (&words)[kWords<Cached, kPiece<T>>]) {
  load_packed<Cached, kWide, kPiece<T>>(row, begin, inside ? size : 0, words);
  if (inside) return;
#pragma unroll
  for (int i = 0; i < kWords<Cached, kPiece<T>>; ++i) words[i] = 0xffffffffu;  // NaN in every type
}

template <class Cached, class T, bool kWide>
__device__ __forceinline__ void give(const unsigned (&words)[kWords<Cached, kPiece<T>>], T* row,
                                     int begin, int size, const float* scale) {
  if constexpr (kElementBytes<T> == kElementBytes<Cached>) {
    store_packed<T, kWide, kPiece<T>>(row, begin, size, words);
  } else {
    float x[kPiece<T>];
    unpack<Cached>(words, x);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) x[j] *= *scale;
    store_floats<T, kWide, kPiece<T>>(row, begin, size, x);
  }
}

// A warp takes a token, or with gridDim.y warps their part of it: the pieces of its heads, keys and
// values, kAtOnce of a lane at a time.
template <class Cached, class T, bool kWide>
__global__ void __launch_bounds__(kMostThreads)
    gather_kv(const Cached* k_cache, const Cached* v_cache, const int* page_table,
              const int* cu_seqlens, T* k, T* v, const float* k_scale, const float* v_scale,
              Index tokens, int batch, int heads, int k_size, int v_size, int page_size, int pages,
              int table_pages, Index table_row, Index k_page, Index k_place, Index k_cache_head,
              Index v_page, Index v_place, Index v_cache_head, Index k_token, Index k_head,
              Index v_token, Index v_head, int scale_step) {
  constexpr int kCount = kPiece<T>, kAtOnce = 2, kN = kWords<Cached, kCount>;
  meet_neighbours();
  const Index token = own_row();
  if (token >= tokens || token >= cu_seqlens[batch]) return;
  const int sequence = sequence_of(cu_seqlens, batch, token);
  const unsigned local = static_cast<unsigned>(token - cu_seqlens[sequence]);
  const int entry = static_cast<int>(local / static_cast<unsigned>(page_size));
  const int place = static_cast<int>(local % static_cast<unsigned>(page_size));
  const int page = entry < table_pages ? page_table[sequence * table_row + entry] : -1;
  const bool inside = page >= 0 && page < pages;
  const Index k_from = page * k_page + place * k_place, v_from = page * v_page + place * v_place;
  const int most = k_size < v_size ? v_size : k_size, pieces = (most + kCount - 1) / kCount;
  const int step = 32 * kAtOnce, own = static_cast<int>(blockIdx.y) * step + threadIdx.x;
  for (int first = own; first < heads * pieces; first += step * static_cast<int>(gridDim.y)) {
    unsigned key[kAtOnce][kN], value[kAtOnce][kN];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int head = (first + 32 * n) / pieces, begin = (first + 32 * n) % pieces * kCount;
      const bool here = inside && head < heads;
      const Index k_at = here ? k_from + head * k_cache_head : 0;
      const Index v_at = here ? v_from + head * v_cache_head : 0;
      load_cached<Cached, T, kWide>(reinterpret_cast<const Cached*>(address(k_cache, k_at)), begin,
                                    k_size, here, key[n]);
      load_cached<Cached, T, kWide>(reinterpret_cast<const Cached*>(address(v_cache, v_at)), begin,
                                    v_size, here, value[n]);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int head = (first + 32 * n) / pieces, begin = (first + 32 * n) % pieces * kCount;
      if (head >= heads) break;
      give<Cached, T, kWide>(key[n],
                             reinterpret_cast<T*>(address(k, token * k_token + head * k_head)),
                             begin, k_size, k_scale + head * scale_step);
      give<Cached, T, kWide>(value[n],
                             reinterpret_cast<T*>(address(v, token * v_token + head * v_head)),
                             begin, v_size, v_scale + head * scale_step);
    }
  }
}

}  // namespace jit_kernel

#else
#include <string>

#include "jit_kernel/cpu/rows.h"
#include "jit_kernel/host/tensor_arguments.h"

namespace jit_kernel {

// Keys or values: their cache, and where they go.
struct Gathered {
  const DLTensor *cache, *to, *scale;
  int64_t size, page, place, cache_head, token, head;
};

struct PageTable {
  const int32_t *pages, *cu_seqlens;
  int64_t batch, row, width, page_size, page_count;

  // What a sequence's tokens need of the table is there, and is in the cache.
  void check(int64_t tokens) const {
    for (int64_t s = 0; s < batch; ++s) {
      const int64_t length = std::min<int64_t>(cu_seqlens[s + 1], tokens) - cu_seqlens[s];
      const int64_t needed = length <= 0 ? 0 : (length + page_size - 1) / page_size;
      if (needed > width) {
        throw std::out_of_range("page_table has " + std::to_string(width) + " pages a sequence; " +
                                "sequence " + std::to_string(s) + " needs " +
                                std::to_string(needed));
      }
      for (int64_t i = 0; i < needed; ++i) {
        const int32_t page = pages[s * row + i];
        if (page >= 0 && page < page_count) continue;
        throw std::out_of_range("page_table[" + std::to_string(s) + ", " + std::to_string(i) +
                                "] is " + std::to_string(page) + "; it must be one of the " +
                                std::to_string(page_count) + " pages of the cache");
      }
    }
  }
};

template <class Cached, class T>
inline void gather_row(const Gathered& g, int64_t page, int64_t place, int64_t token, int64_t head,
                       int64_t scale_step, bool past) {
  const Cached* from =
      data_of<Cached>(g.cache) + page * g.page + place * g.place + head * g.cache_head;
  T* to = data_of<T>(g.to) + token * g.token + head * g.head;
  if constexpr (sizeof(T) == sizeof(Cached)) {
    copy_row(to, from, g.size * static_cast<int64_t>(sizeof(T)), past);
  } else {
    const simd::Vec factor = simd::set1(data_of<float>(g.scale)[head * scale_step]);
    for (int64_t i = 0; i < g.size; i += simd::kLanes) {
      write(to + i, read(from + i, g.size - i) * factor, g.size - i);
    }
  }
}

inline void gather_kv(TensorArguments& from) {
  Gathered k{}, v{};
  PageTable table;
  k.cache = &from.tensor(), v.cache = &from.tensor();
  table.pages = data_of<int32_t>(from.tensor());
  table.cu_seqlens = data_of<int32_t>(from.tensor());
  k.to = &from.tensor(), v.to = &from.tensor();
  k.scale = from.maybe_tensor(), v.scale = from.maybe_tensor();
  const int64_t tokens = from.integer();
  table.batch = from.integer();
  const int64_t heads = from.integer();
  k.size = from.integer(), v.size = from.integer();
  table.page_size = from.integer(), table.page_count = from.integer();
  table.width = from.integer(), table.row = from.integer();
  for (Gathered* each : {&k, &v}) {
    each->page = from.integer(), each->place = from.integer(), each->cache_head = from.integer();
  }
  k.token = from.integer(), k.head = from.integer();
  v.token = from.integer(), v.head = from.integer();
  const int64_t scale_step = from.integer(), threads = from.integer();
  table.check(tokens);
  const int64_t count = table.batch ? std::min<int64_t>(tokens, table.cu_seqlens[table.batch]) : 0;
  auto run = [&](auto cached, auto element) {
    using Cached = decltype(cached);
    using T = decltype(element);
    const int64_t bytes =
        heads * (k.size + v.size) * static_cast<int64_t>(sizeof(T) + sizeof(Cached));
    const bool past = count * bytes >= kStreamedBytes;
    parallel_rows(count, bytes, threads, [&](int64_t begin, int64_t end) {
      const int32_t* ends = table.cu_seqlens + 1;
      int64_t s = std::upper_bound(ends, ends + table.batch, begin) - ends;
      for (int64_t t = begin; t < end; ++t) {
        while (ends[s] <= t) ++s;
        const int64_t local = t - table.cu_seqlens[s];
        const int64_t page = table.pages[s * table.row + local / table.page_size];
        for (int64_t h = 0; h < heads; ++h) {
          for (const Gathered* each : {&k, &v}) {
            gather_row<Cached, T>(*each, page, local % table.page_size, t, h, scale_step, past);
          }
        }
      }
    });
  };
  with_element<f32, bf16, fp16, e4m3>(*k.to, "k", [&](auto element) {
    with_element<decltype(element), e4m3>(*k.cache, "k_cache",
                                          [&](auto cached) { run(cached, element); });
  });
}

}  // namespace jit_kernel

#define JIT_KERNEL_EXPORT_GATHER_KV() \
  JIT_KERNEL_EXPORT_PLAIN(gather_kv, 29, ::jit_kernel::gather_kv)
#endif
