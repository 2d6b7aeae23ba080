// Where things lie in shared memory: queries, probabilities, keys and values, statistics, items.
#pragma once

#include "flash_attention_v3/hopper/common/ring.cuh"
#include "flash_attention_v3/hopper/decode/config.h"

namespace jit_kernel::hopper {

template <class C>
struct DecodeShared {
  char* base;

  __device__ u32 address(int offset) const { return shared_address(base) + offset; }
  __device__ u32 q(int stream) const { return address(stream * C::kBytesQ); }
  __device__ u32 p(int stream, int buffer) const {
    return address(C::kOffsetP + (2 * C::kBlocksAtOnce * stream + buffer) * C::kBytesP);
  }
  __device__ u32 tile(int stage) const { return address(C::kOffsetTiles + stage * C::kBytesTile); }
  // Where one stream's output reaches the other: the queries' memory, which is then done with.
  __device__ float* exchange() const { return reinterpret_cast<float*>(base); }
  // A number for each query of a stream: of each of the four warps, and the two below.
  __device__ float* statistics(int stream, int index) const {
    return reinterpret_cast<float*>(base + C::kOffsetStatistics + stream * C::kBytesStatistics) +
           index * C::kRows;
  }
  __device__ float* references(int stream) const { return statistics(stream, 4); }
  __device__ float* factors(int stream) const { return statistics(stream, 5); }
  // Of queries in fp16 and keys in e4m3: what scores are multiplied by.
  __device__ float* score_factors(int stream) const { return statistics(stream, 6); }
  __device__ float* scales(int stage, int stream) const {
    return reinterpret_cast<float*>(base + C::kOffsetScales + stage * C::kBytesScales) +
           stream * kDecodeKeys;
  }
  // Of a result that is kept: a reference and a sum for each row.
  __device__ float2* kept_ends(int stream, int level) const {
    return reinterpret_cast<float2*>(base + C::kOffsetBehind) +
           (stream * C::kKeptLevels + level) * C::kRows;
  }
  __device__ float4* kept_unit(int stream, int unit) const {
    return reinterpret_cast<float4*>(base + C::kOffsetUnits) +
           (stream * C::kSharedUnits + unit) * 128;
  }
  // Of a sequence's partial results: first ranges and how many, where the probabilities lay.
  __device__ uchar2* nodes(int stream) const {
    return reinterpret_cast<uchar2*>(base + C::kOffsetP +
                                     2 * C::kBlocksAtOnce * stream * C::kBytesP);
  }
  __device__ DecodeQuery* query(int stream, int index) const {
    return reinterpret_cast<DecodeQuery*>(base + C::kOffsetQueries) + stream * C::kRows + index;
  }
  __device__ DecodeItem* item(int slot) const {
    return reinterpret_cast<DecodeItem*>(base + C::kOffsetItem + slot * C::kBytesItem);
  }
  __device__ int* places(int slot) const {
    return reinterpret_cast<int*>(base + C::kOffsetPlaces + slot * C::kBytesPlaces);
  }
  // What the cluster's blocks send to this one, a slot each: quads of results, then a reference and
  // a sum for each.
  __device__ float4* incoming_quads(int slot) const {
    return reinterpret_cast<float4*>(base + C::kOffsetIncoming) + slot * C::kQuadsOfBlock;
  }
  __device__ float2* incoming_ends(int slot) const {
    return reinterpret_cast<float2*>(base + C::kOffsetEnds) + slot * C::kQuadsOfBlock;
  }
  __device__ u32 barrier(int index) const { return address(C::kOffsetBarriers + 8 * index); }
  __device__ u32 full(int stage) const { return barrier(stage); }
  __device__ u32 empty(int stage) const { return barrier(C::kStages + stage); }
  __device__ u32 item_full(int slot) const { return barrier(2 * C::kStages + slot); }
  __device__ u32 item_empty(int slot) const {
    return barrier(2 * C::kStages + kDecodeItemSlots + slot);
  }
  __device__ u32 incoming_full() const { return barrier(C::kBarriers - 1); }
};

}  // namespace jit_kernel::hopper
