// Where things lie in shared memory: queries, probabilities, keys and values, statistics, items.
#pragma once

#include "flash_attention_v3/hopper/common/ring.cuh"
#include "flash_attention_v3/hopper/decode/config.h"

namespace jit_kernel::hopper {

template <class C>
struct DecodeShared {
  char* base;

  __device__ u32 address(int offset) const { return shared_address(base) + offset; }
  __device__ u32 q() const { return address(0); }
  __device__ u32 p(int buffer) const { return address(C::kOffsetP + buffer * C::kBytesP); }
  __device__ u32 k(int stage) const { return address(C::kOffsetK + stage * C::kBytesTile); }
  __device__ u32 v(int stage) const { return address(C::kOffsetV + stage * C::kBytesTile); }
  // A number for each query: of each of the four warps, and the two below.
  __device__ float* statistics(int index) const {
    return reinterpret_cast<float*>(base + C::kOffsetStatistics) + index * C::kRows;
  }
  __device__ float* references() const { return statistics(4); }
  __device__ float* factors() const { return statistics(5); }
  __device__ DecodeQuery* query(int index) const {
    return reinterpret_cast<DecodeQuery*>(base + C::kOffsetQueries) + index;
  }
  __device__ DecodeItem* item(int slot) const {
    return reinterpret_cast<DecodeItem*>(base + C::kOffsetItem + slot * 64);
  }
  __device__ u32 barrier(int index) const { return address(C::kOffsetBarriers + 8 * index); }
  __device__ u32 k_full(int stage) const { return barrier(stage); }
  __device__ u32 k_empty(int stage) const { return barrier(C::kStages + stage); }
  __device__ u32 v_full(int stage) const { return barrier(2 * C::kStages + stage); }
  __device__ u32 v_empty(int stage) const { return barrier(3 * C::kStages + stage); }
  __device__ u32 item_full(int slot) const { return barrier(4 * C::kStages + slot); }
  __device__ u32 item_empty(int slot) const {
    return barrier(4 * C::kStages + kDecodeItemSlots + slot);
  }
};

}  // namespace jit_kernel::hopper
