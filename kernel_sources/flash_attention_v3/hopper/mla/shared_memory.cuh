// Where things lie in shared memory: queries, two buffers of keys, probabilities, statistics.
#pragma once

#include "flash_attention_v3/hopper/common/ring.cuh"
#include "flash_attention_v3/hopper/mla/config.h"

namespace jit_kernel::hopper {

template <class C>
struct MlaShared {
  char* base;

  __device__ u32 address(int offset) const { return shared_address(base) + offset; }
  __device__ u32 queries(int panel) const { return address(panel * C::kBytesPanelQ); }
  __device__ u32 keys(int buffer, int panel) const {
    return address(C::kOffsetKeys + buffer * C::kBytesKeys + panel * kMlaBytesPanel);
  }
  // Where a pair of panels in e4m3 is loaded to, or k behind them: to stay, or to be converted in
  // place.
  __device__ u32 pair(int buffer, int pair) const {
    if constexpr (C::kIsStreamed) return keys(buffer, pair);
    return keys(buffer, pair < C::kPairs ? 2 * pair + 1 : C::kPanelsV);
  }
  __device__ u32 probabilities(int buffer) const {
    return address(buffer == 0 ? C::kOffsetP : C::kOffsetSecond);
  }
  // A number of each row.
  __device__ float* statistics(int index) const {
    return reinterpret_cast<float*>(base + C::kOffsetStatistics) + index * C::kRows;
  }
  // What a consumer tells the other: its rows' references, and the factors of what was before.
  __device__ float* references(int side) const { return statistics(side); }
  __device__ float* factors(int side) const { return statistics(2 + side); }
  __device__ float* sums(int side) const { return statistics(4 + side); }
  // Of an e4m3 cache: what a row's scores are multiplied by. Not swapped where the first sums are
  // told behind the last scores.
  __device__ float* score_factors() const { return statistics(C::kIsSwapped ? 7 : 4); }
  // For a number from one thread to all.
  __device__ volatile int* answer() const {
    return reinterpret_cast<int*>(base + C::kOffsetAnswer);
  }
  __device__ DecodeQuery* query(int index) const {
    return reinterpret_cast<DecodeQuery*>(base + C::kOffsetQueries) + index;
  }
  __device__ MlaItem* item(int slot) const {
    return reinterpret_cast<MlaItem*>(base + C::kOffsetItem + slot * C::kBytesItem);
  }
  __device__ u32 barrier(int index) const { return address(C::kOffsetBarriers + 8 * index); }
  // Of an e4m3 cache a part is a pair of panels, or k behind them.
  __device__ u32 full(int buffer, int part) const { return barrier(buffer * C::kFulls + part); }
  __device__ u32 empty(int buffer, int half) const {
    return barrier(C::kFirstEmpty + 2 * buffer + half);
  }
  __device__ u32 item_full(int slot) const { return barrier(C::kFirstItem + slot); }
  __device__ u32 item_empty(int slot) const {
    return barrier(C::kFirstItem + C::kItemSlots + slot);
  }
};

}  // namespace jit_kernel::hopper
