// Pages without 8 rows in a line: three warps load 16 bytes a lane, of each buffer in turn.
#pragma once

#include "flash_attention_v3/hopper/mla/producer.cuh"

namespace jit_kernel::hopper {

constexpr int kMlaRowWarps = 3;

// In the order in which halves of buffers are emptied, and loaded again: whose buffer, which half.
template <class C>
__device__ __forceinline__ int2 half_of_step(int step) {
  if constexpr (C::kIsSwapped) return {step / 2, step % 2};
  return {step == 1 || step == 3, step == 1 || step == 2};
}

// Blocks of 128 keys so far: which of a warpgroup's buffers is next, and the parity of its phase.
template <class C>
struct BufferPosition {
  u32 blocks = 0;

  __device__ __forceinline__ int buffer(int of) const {
    return C::kIsStreamed ? of + 2 * static_cast<int>(blocks % 2) : of;
  }
  __device__ __forceinline__ u32 parity() const {
    return C::kIsStreamed ? blocks / 2 % 2 : blocks % 2;
  }
};

template <class C>
struct MlaRowProducer {
  // Of a half: panels, or pairs of them in e4m3, where a row has 128 bytes.
  static constexpr int kParts = C::kMixed ? C::kPairs / 2 : C::kHalf;
  static constexpr int kPiecesOfK = C::kMixed ? 4 : 8;
  static constexpr int kBytes = C::kMixed ? 1 : 2;  // of an element
  static constexpr int kPasses = kMlaKeys / 4;

  const MlaParams& params;
  const MlaShared<C> shared;
  const int head, index;  // which of the warps
  BufferPosition<C> position;

  __device__ __forceinline__ bool loads_k(int half) const { return half == 1 && !params.only_qv; }
  __device__ __forceinline__ u32 part_of(int buffer, int part) const {
    return C::kMixed ? shared.pair(buffer, part) : shared.keys(buffer, part);
  }

  // Of this lane's two rows of a step's buffer, 32 apart.
  __device__ __forceinline__ void find_rows(const DecodeItem& item, const CachePlaces& places,
                                            int first, int (&place)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + 32 * i + threadIdx.x % 32;
      place[i] = row >= item.low && row < end_of_keys(item) ? places.place(row) : -1;
    }
  }

  // The rows of the next step are found ahead.
  __device__ __forceinline__ void load(const DecodeItem& item) {
    const CachePlaces places(params, item.batch);
    int next[2];
    find_rows(item, places, item.begin[0] * kMlaBlockKeys, next);
#pragma unroll 1
    for (int step = item.begin[0] * 4; step < item.end[0] * 4; ++step) {
      const int place[2] = {next[0], next[1]};
      find_rows(item, places, first_row(step + 1), next);
      load_half(places, first_row(step), half_of_step<C>(step % 4), place);
      position.blocks += step % 4 == 3;
    }
  }

  static __device__ __forceinline__ int first_row(int step) {
    return step / 4 * kMlaBlockKeys + half_of_step<C>(step % 4).x * kMlaKeys;
  }

  // Four rows at a time.
  __device__ __forceinline__ void load_half(const CachePlaces& places, int first_row,
                                            const int2& at, const int (&place)[2]) {
    const int lane = threadIdx.x % 32, piece = lane % 8, first = at.y * kParts;
    const int buffer = position.buffer(at.x);
    constexpr int kK = 2 * kParts;
    const bool has_k = loads_k(at.y) && piece < kPiecesOfK;
    mbarrier_wait(shared.empty(buffer, at.y), position.parity() ^ 1);
#pragma unroll 1
    for (int pass = index; pass < kPasses; pass += kMlaRowWarps) {
      const int row = pass * 4 + lane / 8;
      const int here =
          __shfl_sync(0xffffffffu, pass >= kPasses / 2 ? place[1] : place[0], row % 32);
      const int in_here = places.row_in_place(first_row + row);
      const u32 to = row * 128 + (piece ^ (row % 8)) * 16;
      const char* const v = row_of(params.v, here, in_here) + first * 128 + piece * 16;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        copy_16(part_of(buffer, first + i) + to, v + i * 128, here >= 0);
      }
      copy_16(part_of(buffer, kK) + to, row_of(params.k, here, in_here) + piece * 16,
              has_k && here >= 0);
    }
#pragma unroll
    for (int i = 0; i < kParts + 1; ++i) {
      // k is waited for where it is not loaded, too.
      if (i < kParts + at.y) {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                         shared.full(buffer, first + i))
                     : "memory");
      }
    }
  }

  __device__ __forceinline__ void copy_16(u32 destination, const char* source, bool copies) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
        "@p cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(destination),
        "l"(source), "r"(static_cast<u32>(copies))
        : "memory");
  }

  __device__ __forceinline__ const char* row_of(const DecodeRows& rows, int place,
                                                int in_place) const {
    return static_cast<const char*>(rows.data) +
           (place * rows.place_stride + in_place * rows.row_stride + head * rows.head_stride) *
               kBytes;
  }
};

}  // namespace jit_kernel::hopper
