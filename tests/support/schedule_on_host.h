// The Hopper decode kernels' schedule compiled for the CPU: 32 lanes take turns wherever one waits
// for the others.
#include <tvm/ffi/tvm_ffi.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// In place of what a CUDA compiler has.
#define __device__
#define __forceinline__ inline
#define __host__
using std::max;
using std::min;
struct Place {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
static Place threadIdx, blockIdx;

// Lane after lane runs until it has left a number; then all have, and read each other's.
namespace lanes {
constexpr int kCount = 32;
static ucontext_t main_context;
static std::array<ucontext_t, kCount> contexts;
static std::array<std::vector<char>, kCount> stacks;
static unsigned left[2][kCount];
static int turn[kCount];
static void (*run)();

inline void give_turn() {
  const unsigned lane = threadIdx.x % kCount;
  const unsigned next = (lane + 1) % kCount;
  threadIdx.x = next;
  swapcontext(&contexts[lane], &contexts[next]);
  threadIdx.x = lane;
}
inline const unsigned* all_of(unsigned value) {
  const unsigned lane = threadIdx.x % kCount;
  unsigned* const here = left[turn[lane]];
  turn[lane] ^= 1;
  here[lane] = value;
  give_turn();
  return here;
}
inline void start() {
  run();
  for (;;) {  // the last lane ends the run, the others wait for it
    if (threadIdx.x % kCount == kCount - 1) {
      swapcontext(&contexts[kCount - 1], &main_context);
    }
    give_turn();
  }
}
inline void run_all(void (*function)()) {
  run = function;
  for (int lane = 0; lane < kCount; ++lane) {
    turn[lane] = 0;
    stacks[lane].resize(1 << 16);
    getcontext(&contexts[lane]);
    contexts[lane].uc_stack.ss_sp = stacks[lane].data();
    contexts[lane].uc_stack.ss_size = stacks[lane].size();
    contexts[lane].uc_link = nullptr;
    makecontext(&contexts[lane], start, 0);
  }
  threadIdx = {0, 0, 0};
  swapcontext(&main_context, &contexts[0]);
}
}  // namespace lanes

template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
  return static_cast<T>(lanes::all_of(static_cast<unsigned>(value))[source % lanes::kCount]);
}
inline unsigned __shfl_up_sync(unsigned, unsigned value, int step) {
  const unsigned lane = threadIdx.x % lanes::kCount;
  const unsigned* const all = lanes::all_of(value);
  return static_cast<int>(lane) >= step ? all[lane - step] : value;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const unsigned* const all = lanes::all_of(value);
  unsigned bits = 0;
  for (int lane = 0; lane < lanes::kCount; ++lane) bits |= (all[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const unsigned* const all = lanes::all_of(value);
  unsigned sum = 0;
  for (int lane = 0; lane < lanes::kCount; ++lane) sum += all[lane];
  return sum;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline float __int_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(unsigned value) { return __builtin_clz(value); }

#include "flash_attention_v3/hopper/decode/schedule.cuh"
#include "flash_attention_v3/hopper/mla/work.cuh"

using jit_kernel::hopper::DecodeItem;
using jit_kernel::hopper::DecodeParams;

static DecodeParams params;
static std::vector<int> used;
static std::string found;  // of lane 0: the items, one after the other

inline void keep(const DecodeItem& item) {
  if (threadIdx.x != 0) return;
  const int chain = item.ranges > 0 ? jit_kernel::hopper::chain_log2<64>(params, item) : 0;
  const int numbers[] = {item.batch,    item.low,      item.high,   item.begin[0],
                         item.begin[1], item.end[0],   item.end[1], item.first_part,
                         item.parts,    item.is_first, item.range,  item.ranges,
                         item.from,     item.to,       chain,       item.first_token};
  found.append(reinterpret_cast<const char*>(numbers), sizeof(numbers));
}

inline void run_part() {
  jit_kernel::hopper::DecodeSchedule schedule(params);
  schedule.start(blockIdx.y);
  DecodeItem item = {};
  while (schedule.next(item)) keep(item);
}

inline void set_parts(int64_t parts) {
  unsigned shift = 0;
  while (int64_t{1} << shift < parts) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  params.parts = static_cast<int>(parts);
  params.parts_shift = shift;
  params.parts_multiplier = static_cast<unsigned>((power + static_cast<uint64_t>(parts) - 1) /
                                                  static_cast<uint64_t>(parts));
}

// Equal tiles of query tokens.
inline void set_tiles(int64_t tiles, int64_t len_q) {
  unsigned shift = 0;
  while (int64_t{1} << shift < tiles) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  params.tiles = static_cast<int>(tiles);
  params.all_tiles = params.batch * params.tiles;
  params.tile_tokens = static_cast<int>(len_q / tiles);
  params.tiles_shift = shift;
  params.tiles_multiplier = static_cast<unsigned>((power + static_cast<uint64_t>(tiles) - 1) /
                                                  static_cast<uint64_t>(tiles));
}

// Causal calls of sequences with so many cached rows each. `part`: of `parts`, or of a cluster for
// each tile.
inline tvm::ffi::Bytes items_of(tvm::ffi::Bytes lengths, int64_t len_q, int64_t group,
                                int64_t parts, int64_t part, int64_t ranges_log2,
                                int64_t range_blocks, bool halves, int64_t window, bool in_clusters,
                                int64_t tiles) {
  const std::string bytes = lengths;
  used.assign(bytes.size() / sizeof(int), 0);
  std::memcpy(used.data(), bytes.data(), bytes.size());
  params = {};
  params.batch = static_cast<int>(used.size());
  set_tiles(tiles, len_q);
  params.seqused_k = used.data();
  params.rows_k = 1 << 30;
  params.seqlen_q = static_cast<int>(len_q);
  params.group = static_cast<int>(group);
  params.window_left = static_cast<int>(window);
  params.ranges_log2 = static_cast<int>(ranges_log2);
  params.range_blocks = static_cast<int>(range_blocks);
  params.halves = halves;
  set_parts(parts);
  found.clear();
  if (in_clusters) {
    threadIdx = {0, 0, 0};
    for (int tile = 0; tile < params.all_tiles; ++tile) {
      DecodeItem item = {};
      if (item_of_cluster(params, tile, static_cast<int>(part), item)) keep(item);
    }
  } else {
    blockIdx = {0, static_cast<unsigned>(part), 0};
    lanes::run_all(run_part);
  }
  return tvm::ffi::Bytes(found);
}

static jit_kernel::hopper::MlaParams mla_params;

inline void run_mla_part() {
  jit_kernel::hopper::MlaSchedule schedule(mla_params);
  schedule.start(blockIdx.y);
  DecodeItem item = {};
  while (schedule.next(item)) {
    const int numbers[] = {item.batch,    item.low,      item.high,
                           item.begin[0], item.end[0],   item.first_part,
                           item.parts,    item.is_first, schedule.is_done()};
    if (threadIdx.x == 0) found.append(reinterpret_cast<const char*>(numbers), sizeof(numbers));
  }
}

// Of a tile of 64 query rows: the items of one of its parts. is_whole: no sequence is cut.
inline tvm::ffi::Bytes mla_items_of(tvm::ffi::Bytes lengths, int64_t len_q, int64_t group,
                                    int64_t parts, int64_t part, int64_t tile, int64_t window,
                                    bool is_whole) {
  const std::string bytes = lengths;
  used.assign(bytes.size() / sizeof(int), 0);
  std::memcpy(used.data(), bytes.data(), bytes.size());
  set_parts(parts);
  mla_params = {};
  mla_params.parts = params.parts;
  mla_params.parts_shift = params.parts_shift;
  mla_params.parts_multiplier = params.parts_multiplier;
  set_parts(group);
  mla_params.group_shift = params.parts_shift;
  mla_params.group_multiplier = params.parts_multiplier;
  mla_params.batch = static_cast<int>(used.size());
  mla_params.tiles = 1;
  mla_params.all_tiles = mla_params.batch;
  mla_params.seqused_k = used.data();
  mla_params.rows_k = 1 << 30;
  mla_params.seqlen_q = static_cast<int>(len_q);
  mla_params.group = static_cast<int>(group);
  mla_params.window_left = static_cast<int>(window);
  mla_params.ranges_log2 = is_whole ? 1 : 0;
  mla_params.row_tiles = static_cast<int>((len_q * group + 63) / 64) + 1;  // one without rows
  found.clear();
  blockIdx = {static_cast<unsigned>(tile), static_cast<unsigned>(part), 0};
  lanes::run_all(run_mla_part);
  return tvm::ffi::Bytes(found);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(items_of, items_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mla_items_of, mla_items_of);
