// What a machine can do at most: products in registers, and reading memory. Each function runs on
// `threads` threads at once for about `seconds` and returns their summed rate, 0 where the target
// has no such instruction.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Calls work(thread), which does a bounded piece and returns how much that was, until time is up.
template <class Work>
double rate(int threads, double seconds, Work work) {
  std::vector<double> done(threads, 0.0), taken(threads, 1.0);
  std::atomic<int> ready{0};
  auto run = [&](int index) {
    for (++ready; ready < threads;) {
    }
    auto start = Clock::now();
    do {
      done[index] += work(index);
    } while ((taken[index] = since(start)) < seconds);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& thread : others) thread.join();
  double sum = 0.0;
  for (int i = 0; i < threads; ++i) sum += done[i] / taken[i];
  return sum;
}

#ifdef __AVX512F__
using Vec = __m512;
#define ONE_FMA(x) x = _mm512_fmadd_ps(b, c, x)
#elif defined(__AVX2__)
using Vec = __m256;
#define ONE_FMA(x) x = _mm256_fmadd_ps(b, c, x)
#else
typedef float Vec __attribute__((vector_size(16)));
#define ONE_FMA(x) x = b * c + x
#endif

// Ten sums: more than latency times throughput of any machine so far. The empty asm keeps each
// alive.
#if defined(__x86_64__)
#define KEEP(x) asm volatile("" : "+v"(x))
#else
#define KEEP(x) asm volatile("" : "+w"(x))
#endif
#define TEN(step) \
  step(x0);       \
  step(x1);       \
  step(x2);       \
  step(x3);       \
  step(x4);       \
  step(x5);       \
  step(x6);       \
  step(x7);       \
  step(x8);       \
  step(x9)

constexpr int kRounds = 20000;

double fma_piece() {
  Vec b{}, c{}, x0{}, x1{}, x2{}, x3{}, x4{}, x5{}, x6{}, x7{}, x8{}, x9{};
  for (int i = 0; i < kRounds; ++i) {
    TEN(ONE_FMA);
    TEN(KEEP);
  }
  return 10.0 * kRounds * 2 * sizeof(Vec) / sizeof(float) * 1e-9;
}

#ifdef __AVX512BF16__
double bf16_piece() {
  __m512bh b{}, c{};
  __m512 x0{}, x1{}, x2{}, x3{}, x4{}, x5{}, x6{}, x7{}, x8{}, x9{};
#define ONE_DOT(x) x = _mm512_dpbf16_ps(x, b, c)
  for (int i = 0; i < kRounds; ++i) {
    TEN(ONE_DOT);
    TEN(KEEP);
  }
  return 10.0 * kRounds * 64 * 1e-9;
}
#endif

#ifdef __AVX512VNNI__
double i16_piece() {
  __m512i b{}, c{};
  __m512i x0{}, x1{}, x2{}, x3{}, x4{}, x5{}, x6{}, x7{}, x8{}, x9{};
#define ONE_I16_DOT(x) asm volatile("vpdpwssd %2, %1, %0" : "+v"(x) : "v"(b), "v"(c))
  for (int i = 0; i < kRounds; ++i) {
    TEN(ONE_I16_DOT);
  }
  return 10.0 * kRounds * 64 * 1e-9;
}
#endif

#ifdef __AMX_BF16__
// TDPFP16PS by its bytes, as older compilers know no such instruction: F2 where TDPBF16PS has F3.
#define TILE_DOT_FP16(sum, a, b)                  \
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" \
               :                                  \
               : "i"((~(b) & 15) << 3 | 3), "i"(0xc0 | (sum) << 3 | (a)))

double amx_piece(bool is_fp16) {
  alignas(64) unsigned char config[64] = {1};
  alignas(64) static const unsigned char zeros[1024] = {};
  for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
  _tile_loadconfig(config);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int i = 0; is_fp16 && i < kRounds; ++i) {
    TILE_DOT_FP16(0, 4, 6);
    TILE_DOT_FP16(1, 4, 7);
    TILE_DOT_FP16(2, 5, 6);
    TILE_DOT_FP16(3, 5, 7);
  }
  for (int i = 0; !is_fp16 && i < kRounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * kRounds * 2 * 16 * 16 * 32 * 1e-9;
}
#endif

#ifdef __AMX_BF16__
bool amx_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif

// Reads 1 MiB in four streams of lines; the sum goes where no compiler can drop it.
double read_piece(const char* from) {
  constexpr int64_t kBytes = 1 << 20;
  uint64_t sum = 0;
#ifdef __AVX512F__
  __m512i a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < kBytes; i += 256) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(from + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(from + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(from + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(from + i + 192));
  }
  sum = static_cast<uint64_t>(_mm512_reduce_add_epi64(a ^ b ^ c ^ d));
#else
  for (int64_t i = 0; i < kBytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, from + i, sizeof(word));
    sum ^= word;
  }
#endif
  static std::atomic<uint64_t> sink;
  sink.fetch_xor(sum, std::memory_order_relaxed);
  return kBytes * 1e-9;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

double peak_fma(int threads, double seconds) {  // GFLOP/s
  return rate(threads, seconds, [](int) { return fma_piece(); });
}

double peak_bf16_dot(int threads, double seconds) {  // GFLOP/s of VDPBF16PS
#ifdef __AVX512BF16__
  return rate(threads, seconds, [](int) { return bf16_piece(); });
#else
  return 0.0;
#endif
}

double peak_i16_dot(int threads, double seconds) {  // 1e9 operations a second of VPDPWSSD
#ifdef __AVX512VNNI__
  return rate(threads, seconds, [](int) { return i16_piece(); });
#else
  return 0.0;
#endif
}

double peak_amx(int threads, double seconds) {  // GFLOP/s of TDPBF16PS
#ifdef __AMX_BF16__
  if (amx_allowed()) return rate(threads, seconds, [](int) { return amx_piece(false); });
#endif
  return 0.0;
}

double peak_amx_fp16(int threads, double seconds) {  // GFLOP/s of TDPFP16PS
#ifdef __AMX_BF16__
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool present = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1);
  if (present && amx_allowed()) return rate(threads, seconds, [](int) { return amx_piece(true); });
#endif
  return 0.0;
}

// GB/s; threads share `bytes` of memory at `data`, each reads a part of its own from end to end.
double read_bandwidth(int threads, double seconds, const char* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  int64_t pieces = bytes / kPiece / threads;
  std::vector<int64_t> next(threads, 0);
  return rate(threads, seconds, [&](int index) {
    int64_t piece = index * pieces + next[index]++ % pieces;
    return read_piece(data + piece * kPiece);
  });
}

#pragma GCC visibility pop
}  // extern "C"
