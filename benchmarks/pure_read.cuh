// Reads the pages of a cache and computes nothing: the limit for a kernel that must read them too.
//
// A page's rows of all heads lie together; they are read in pieces by bulk copies into shared
// memory. Every warp has a ring of its own and refills a stage as soon as it has arrived, so a
// multiprocessor has 128 KiB in flight. Pieces go round the blocks: what the machine reads at one
// time lies together. benchmarks/pure_read.py launches it.
#pragma once

namespace pure_read {

constexpr int kWarps = 8;
constexpr int kMostStages = 8;                   // a warp's
constexpr int kRingBytes = 128 * 1024 / kWarps;  // a warp's
constexpr unsigned kAllLanes = 0xffffffffu;

// The arithmetic of the work, compiled for the host too: a test walks it without a GPU.
struct Work {
  int units;      // pages with at least one key
  int row_bytes;  // of one token, all heads
  int page_bytes;
  int piece_bytes;
  int blocks;

  __host__ __device__ int pieces_a_page() const {
    return (page_bytes + piece_bytes - 1) / piece_bytes;
  }
  // A unit's keys come first, then its values.
  __host__ __device__ int pieces() const { return 2 * units * pieces_a_page(); }
  __host__ __device__ int stages() const {
    const int fitting = kRingBytes / piece_bytes;
    return fitting < kMostStages ? fitting : kMostStages;
  }
  // Which piece a warp takes in its n-th turn.
  __host__ __device__ int piece(int turn, int warp, int block) const {
    return (turn * kWarps + warp) * blocks + block;
  }
  __host__ __device__ int turns(int warp, int block) const {
    const int first = piece(0, warp, block), step = kWarps * blocks;
    return first < pieces() ? (pieces() - first + step - 1) / step : 0;
  }
  __host__ __device__ int unit_of(int piece) const { return piece / (2 * pieces_a_page()); }
  __host__ __device__ bool is_value(int piece) const {
    return piece % (2 * pieces_a_page()) >= pieces_a_page();
  }
  // Where a piece begins in its page, and its bytes of a page that holds so many rows; 0 where it
  // lies behind them.
  __host__ __device__ int begin_of(int piece) const {
    return piece % pieces_a_page() * piece_bytes;
  }
  __host__ __device__ int bytes_of(int piece, int rows) const {
    const int rest = rows * row_bytes - begin_of(piece);
    return rest < 0 ? 0 : rest < piece_bytes ? rest : piece_bytes;
  }
};

}  // namespace pure_read

#ifdef __CUDACC__

#include "jit_kernel/cuda/mbarrier.cuh"

namespace pure_read {

using jit_kernel::u32;
using jit_kernel::u64;

struct Source {
  u64 address;
  int bytes;
};

// `units`: page and rows of each; `bytes` 0 where there is no such turn.
__device__ Source source_of(const Work& work, const int2* units, const char* k, const char* v,
                            int turn) {
  const int piece = work.piece(turn, threadIdx.x / 32, blockIdx.x);
  if (piece >= work.pieces()) return {0, 0};
  const int2 unit = units[work.unit_of(piece)];
  const char* page = (work.is_value(piece) ? v : k) +
                     static_cast<long long>(unit.x) * work.page_bytes + work.begin_of(piece);
  return {reinterpret_cast<u64>(page), work.bytes_of(piece, unit.y)};
}

// Needs addresses and sizes that are multiples of 16.
__device__ __forceinline__ void bulk_copy(u32 destination, const Source& source, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source.address), "r"(source.bytes), "r"(barrier)
      : "memory");
}

// The sum of the 32-bit words of a stage, this lane's share.
__device__ u32 summed(const unsigned char* stage, int bytes) {
  const u32* words = reinterpret_cast<const u32*>(stage);
  u32 sum = 0;
  for (int i = threadIdx.x % 32; i < bytes / 4; i += 32) sum += words[i];
  return sum;
}

}  // namespace pure_read

// sums: null, or a counter to which every word that was read is added, to show that each was.
// The last two arguments are the launcher's, null.
extern "C" __global__ void __launch_bounds__(pure_read::kWarps * 32)
    read_pages(const int2* units, const char* k, const char* v, unsigned* sums, int unit_count,
               int row_bytes, int page_bytes, int piece_bytes, const void*, const void*) {
  using namespace pure_read;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ u64 barriers[kWarps * kMostStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Work work{unit_count, row_bytes, page_bytes, piece_bytes, static_cast<int>(gridDim.x)};
  const int stages = work.stages(), turns = work.turns(warp, blockIdx.x);
  unsigned char* const ring = shared + warp * kRingBytes;
  const u32 ring_address = jit_kernel::shared_address(ring);
  const u32 first_barrier = jit_kernel::shared_address(barriers + warp * kMostStages);
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) jit_kernel::mbarrier_init(first_barrier + 8 * i, 1);
    jit_kernel::mbarrier_init_fence();
  }
  __syncthreads();

  u32 sum = 0;
  const auto finish = [&](int turn) {
    const int stage = turn % stages;
    jit_kernel::mbarrier_wait(first_barrier + 8 * stage, turn / stages % 2);
    if (sums != nullptr) {
      sum += summed(ring + stage * piece_bytes, source_of(work, units, k, v, turn).bytes);
    }
    __syncwarp();
  };
  // Each lane looks up one of the next 32 turns, before those of the present 32 are begun.
  Source next = source_of(work, units, k, v, lane);
  for (int first = 0; first < turns; first += 32) {
    const Source present = next;
    next = source_of(work, units, k, v, first + 32 + lane);
    for (int turn = first; turn < turns && turn < first + 32; ++turn) {
      const Source source{__shfl_sync(kAllLanes, present.address, turn - first),
                          __shfl_sync(kAllLanes, present.bytes, turn - first)};
      if (turn >= stages) finish(turn - stages);
      if (lane == 0) {
        const int stage = turn % stages;
        jit_kernel::mbarrier_arrive_expect(first_barrier + 8 * stage, source.bytes);
        if (source.bytes > 0) {
          bulk_copy(ring_address + stage * piece_bytes, source, first_barrier + 8 * stage);
        }
      }
    }
  }
  for (int turn = turns > stages ? turns - stages : 0; turn < turns; ++turn) finish(turn);
  if (sums != nullptr) atomicAdd(sums, sum);
}

#endif  // __CUDACC__
