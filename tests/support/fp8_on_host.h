// The loops over blocks of keys of prefill in e4m3, and softmax, compiled for the CPU: the 32 lanes
// of a warp are threads that meet wherever one asks the others. Products are made when they are
// issued and arrive when they are waited for; until then NaN stands in their place.
#include <pthread.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

// In place of what a CUDA compiler has; of PTX nothing is left.
#define __device__
#define __host__
#define __forceinline__ inline
#define asm(...)
#define volatile(...) ("")
using std::fmaf;
using std::max;
using std::min;
struct Place {
  unsigned x, y, z;
};
static thread_local Place threadIdx;
static pthread_barrier_t all_lanes;
static uint32_t left_by[32];

inline size_t __cvta_generic_to_shared(const void*) { return 0; }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class Read>
inline auto of_all(uint32_t value, Read read) {
  left_by[threadIdx.x] = value;
  pthread_barrier_wait(&all_lanes);
  const auto result = read();
  pthread_barrier_wait(&all_lanes);
  return result;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return of_all(__float_as_int(value),
                [mask] { return __int_as_float(left_by[threadIdx.x ^ mask]); });
}
inline int __any_sync(unsigned, bool value) {
  return of_all(value, [] { return std::any_of(left_by, left_by + 32, [](int i) { return i; }); });
}
inline int __all_sync(unsigned, bool value) {
  return of_all(value, [] { return std::all_of(left_by, left_by + 32, [](int i) { return i; }); });
}
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __log2f(float x) { return std::log2(x); }

#define exp2_fast ptx_exp2_fast
#define pack_e4m3 ptx_pack_e4m3
#define wgmma_wait ptx_wgmma_wait
#include "jit_kernel/cuda/math.cuh"
#include "jit_kernel/cuda/wgmma.cuh"
#undef exp2_fast
#undef pack_e4m3
#undef wgmma_wait

namespace jit_kernel {

static thread_local std::vector<std::function<void()>> in_flight;

template <int kPending>
inline void wgmma_wait() {
  for (; in_flight.size() > kPending; in_flight.erase(in_flight.begin())) in_flight.front()();
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline float from_e4m3(u32 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
}
// The nearest of them, the even one of two; probabilities are not below 0, nor NaN here.
inline u32 to_e4m3(float x) {
  u32 nearest = 0;
  for (u32 bits = 1; bits < 0x7f; ++bits) {
    const float gain = std::fabs(from_e4m3(nearest) - x) - std::fabs(from_e4m3(bits) - x);
    if (gain > 0 || (gain == 0 && bits % 2 == 0)) nearest = bits;
  }
  return nearest;
}
inline u32 pack_e4m3(float a, float b, float c, float d) {
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
}

}  // namespace jit_kernel

#include "flash_attention_v3/hopper/prefill/fp8_blocks.cuh"

namespace jit_kernel::hopper {

static const float *all_scores, *all_values;  // 16 rows of keys; keys of columns
static int stride, seen_from, seen_to;        // row r sees keys seen_from + r % 8 to seen_to
static float weights[16][256];

// In place of the kernels': 16 rows, and what waits for the copy engine only counts.
template <class C>
struct Consumer {
  float scores[C::kKeys / 2], output[C::kHeadDimV / 2] = {}, of_block[C::kPartColumns / 2] = {};
  u32 probabilities[C::kKeys / 8];
  Softmax softmax;
  float scale;
  int changes_scores, every_low, every_high, block_begin, block_end;
  int keys, values, queries = 1;  // blocks that were not given back yet
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;

  static void poison(float* first, float* end) { std::fill(first, end, std::nanf("")); }
  static int row_of(int i) { return i / 2 % 2 * 8; }
  int column_of(int i) const { return i / 4 * 8 + column + i % 2; }

  void issue_scores() {
    poison(scores, scores + C::kKeys / 2);
    in_flight.push_back([this, first = keys * C::kKeys] {
      for (int i = 0; i < C::kKeys / 2; ++i)
        scores[i] = all_scores[(row + row_of(i)) * stride + first + column_of(i)];
    });
  }
  void issue_part(int part) {
    for (int i = 0; i < C::kKeys / 2; ++i)  // register i / 4 in the order of transposed values
      weights[row + i / 4 % 2 * 8][i / 8 * 16 + i % 4 / 2 * 8 + column + i % 2] =
          from_e4m3(probabilities[i / 4] >> i % 4 * 8 & 255);
    pthread_barrier_wait(&all_lanes);
    std::vector<float> sums(C::kPartColumns / 2);
    for (int i = 0; i < C::kPartColumns / 2; ++i) {
      const float* const first =
          all_values + values * C::kKeys * C::kHeadDimV + part * C::kPartColumns + column_of(i);
      for (int key = 0; key < C::kKeys; ++key)
        sums[i] += weights[row + row_of(i)][key] * first[key * C::kHeadDimV];
    }
    pthread_barrier_wait(&all_lanes);
    poison(of_block, of_block + C::kPartColumns / 2);
    in_flight.push_back([this, sums] { std::copy(sums.begin(), sums.end(), of_block); });
  }
  void issue_output(int) { issue_part(0); }
  void add_part(int part) {
    for (int i = 0; i < C::kPartColumns / 2; ++i)
      output[part * C::kPartColumns / 2 + i] += of_block[i];
  }
  void take_turn() {}
  void pass_turn() {}
  void wait_keys() {}
  void release_scores(bool last) {
    --keys;
    queries -= last;
  }
  void release_output() { --values; }
  void release_queries() { --queries; }
  void change_and_mask(int block) {
    for (int i = 0; i < C::kKeys / 2; ++i) {
      const int key = block * C::kKeys + column_of(i);
      if (changes_scores) scores[i] *= 0.5f;
      if (key >= seen_to || key < seen_from + row) scores[i] = minus_infinity();
    }
  }

  // As Consumer::run() of the kernels. False: not everything was given back once.
  bool run() {
    keys = values = block_end - 1;
    start_row(softmax, scale > kLargestScale<false>);
    issue_scores();
    wgmma_wait<0>();
    run_fp8_blocks(*this);
    for (int part = 0; part < C::kParts; ++part) {
      issue_part(part);
      wgmma_wait<0>();
      add_part(part);
    }
    release_output();
    return keys == block_begin - 1 && values == block_begin - 1 && queries == 0;
  }
};

// A lane's share of one tile; lse behind the columns of a row.
template <int kHeadDim>
bool run_lane(float* results, float scale, bool changes_scores) {
  using C = Config<e4m3, kHeadDim, kHeadDim, true, true, Fp8TileFor<kHeadDim, true>>;
  Consumer<C> consumer;
  consumer.scale = scale;
  consumer.changes_scores = changes_scores;
  consumer.every_low = seen_from + 7;
  consumer.every_high = seen_to;
  consumer.block_begin = seen_from / C::kKeys;
  consumer.block_end = (seen_to + C::kKeys - 1) / C::kKeys;
  const bool complete = consumer.run();
  for (int r = 0; r < 2; ++r) {
    const RowResult row = finish_row(consumer.softmax.sum[r],
                                     half_reference<e4m3>(consumer.softmax, r, scale), -INFINITY);
    float* const result = results + (consumer.row + 8 * r) * (kHeadDim + 1);
    for (int i = 0; i < kHeadDim / 2; ++i) {
      if (i / 2 % 2 == r) result[consumer.column_of(i)] = consumer.output[i] * row.factor;
    }
    result[kHeadDim] = row.lse;
  }
  return complete;
}

}  // namespace jit_kernel::hopper

// Floats of 16 rows of scores and of the keys' values in; 16 rows of results and lse out.
static tvm::ffi::Bytes run(tvm::ffi::Bytes scores, tvm::ffi::Bytes values, int64_t head_dim,
                           int64_t from, int64_t to, double scale, bool changes_scores) {
  using namespace jit_kernel::hopper;
  all_scores = reinterpret_cast<const float*>(scores.data());
  all_values = reinterpret_cast<const float*>(values.data());
  stride = static_cast<int>(scores.size() / 64);
  seen_from = static_cast<int>(from);
  seen_to = static_cast<int>(to);
  std::vector<float> results(16 * (head_dim + 1));
  std::vector<std::thread> lanes;
  bool complete[32];
  const auto of_lane = head_dim == 64    ? run_lane<64>
                       : head_dim == 128 ? run_lane<128>
                                         : run_lane<256>;
  pthread_barrier_init(&all_lanes, nullptr, 32);
  for (unsigned lane = 0; lane < 32; ++lane) {
    lanes.emplace_back([&, lane] {
      threadIdx = {lane, 0, 0};
      complete[lane] = of_lane(results.data(), static_cast<float>(scale), changes_scores);
    });
  }
  for (std::thread& lane : lanes) lane.join();
  pthread_barrier_destroy(&all_lanes);
  if (!std::all_of(complete, complete + 32, [](bool each) { return each; })) return {};
  return std::string(reinterpret_cast<const char*>(results.data()), 4 * results.size());
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run)
