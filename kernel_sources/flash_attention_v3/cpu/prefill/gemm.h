// C (rows, columns) += A (rows, depth) B (depth, columns) in registers, from packed panels.
//
// A is row-major. B is in panels of kLanes columns: for each step of the depth (one float, or a
// pair of bf16) the panel's columns lie side by side. C is row-major floats. Every sum runs over
// the depth in order, whatever the tile, so that a row's result does not depend on its neighbours.
#pragma once

#include "flash_attention_v3/cpu/prefill/prefill_tiles.h"

namespace jit_kernel {

template <class Math>
struct Dot;

template <>
struct Dot<float> {
  using Operand = simd::Vec;
  using Sum = simd::Vec;
  static Sum zero() { return simd::zero(); }
  static Operand broadcast(const float* a) { return simd::set1(*a); }
  static Operand load(const float* b) { return simd::load(b); }
  static simd::Vec add(simd::Vec sum, Operand a, Operand b) { return simd::fma(a, b, sum); }
};

#ifdef JIT_KERNEL_BF16_DOT
template <>
struct Dot<bf16> {
  using Operand = __m512bh;
  using Sum = simd::Vec;
  static Sum zero() { return simd::zero(); }
  static Operand broadcast(const bf16* a) { return simd::set1_pair(a); }
  static Operand load(const bf16* b) { return simd::load_pairs(b); }
  static simd::Vec add(simd::Vec sum, Operand a, Operand b) { return simd::dot_pairs(sum, a, b); }
};
#endif

#ifdef JIT_KERNEL_I16_DOT
template <>
struct Dot<i16> {
  using Operand = __m512i;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Operand broadcast(const i16* a) {
    return _mm512_set1_epi32(
        bit_cast<int32_t>(*reinterpret_cast<const uint32_t __attribute__((may_alias))*>(a)));
  }
  static Operand load(const i16* b) { return _mm512_loadu_si512(b); }
  // Not the intrinsic: around it GCC 12 copies sums from register to register, and to the stack.
  static Sum add(Sum sum, Operand a, Operand b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

// What sums of i16 are multiplied by: their row's factor, and their column's where there are any.
struct Factors {
  const float *rows = nullptr, *columns = nullptr;
  int64_t next = 0;  // from a piece's factors of rows to those of the next one
};

template <class Math>
struct GemmArgs {
  const Math* a;
  int64_t lda;
  const Math* b;
  int64_t panel;  // elements from one panel of B to the next
  float* c;
  int64_t ldc;
  int64_t depth;
  bool accumulate;  // add to C, else overwrite it
  int64_t piece;    // sums are added to C when they are this deep
  // Where the depth begins. A long one is parted at multiples of a length counted from there, so
  // that a row's sums do not depend on the keys that its tile leaves out in front.
  int64_t offset = 0;
  Factors factors = {};
};

// What a row of sums stands for is added to C, or written there.
template <class Math, int kPanels>
inline __attribute__((always_inline)) void store_sums(const typename Dot<Math>::Sum (&sum)[kPanels],
                                                      float* c, bool accumulate,
                                                      const Factors& factors, int64_t row,
                                                      int64_t column) {
  simd::Vec x[kPanels];
#ifdef JIT_KERNEL_I16_DOT
  if constexpr (std::is_same<Math, i16>::value) {
    const simd::Vec by = simd::set1(factors.rows[row]);
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) x[j] = _mm512_cvtepi32_ps(sum[j]) * by;
    if (factors.columns) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) {
        x[j] = x[j] * simd::load(factors.columns + column + j * simd::kLanes);
      }
    }
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < kPanels; ++j) {
    if constexpr (!std::is_same<Math, i16>::value) x[j] = sum[j];
    float* at = c + j * simd::kLanes;
    simd::store(at, accumulate ? simd::load(at) + x[j] : x[j]);
  }
}

// Every loop over the sums is unrolled, or the compiler keeps them on the stack around the products
// (5 % of a float32 prefill). Two pointers to A and two to B, which the loop hides from the
// compiler: left alone it keeps one for each row and panel, more than there are registers, and a
// tenth of the time goes to the stack. Floats take four steps of the depth, which is a multiple
// of them, a loop: 6 of 40 instructions are the loop's, and a core whose other thread is busy feels
// them (2 to 3 %).
template <class Math, int kRows, int kPanels>
inline void gemm_tile(const GemmArgs<Math>& g, int64_t row, int64_t first_panel) {
  using simd::kLanes;
  constexpr int kUpper = (kRows + 1) / 2, kLeft = (kPanels + 1) / 2;
  constexpr int64_t kTogether = std::is_same<Math, float>::value ? 4 : kStep<Math>;
  float* c = g.c + row * g.ldc + first_panel * kLanes;
  const Math *a = g.a + row * g.lda, *lower = a + kUpper * g.lda;
  const Math *b = g.b + first_panel * g.panel, *right = b + kLeft * g.panel;
  const int64_t ldc = g.ldc;
  bool accumulate = g.accumulate;
  Factors factors = g.factors;
  for (int64_t left = g.depth; left > 0; left -= g.piece, accumulate = true) {
    typename Dot<Math>::Sum sum[kRows][kPanels];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) sum[i][j] = Dot<Math>::zero();
    }
    for (int64_t n = std::min(left, g.piece); n > 0; n -= kTogether) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kTogether; k += kStep<Math>) {
        typename Dot<Math>::Operand columns[kPanels];
#pragma GCC unroll 4
        for (int j = 0; j < kPanels; ++j) {
          const Math* column = j < kLeft ? b + j * g.panel : right + (j - kLeft) * g.panel;
          columns[j] = Dot<Math>::load(column + k * kLanes);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          const Math* row_a = i < kUpper ? a + i * g.lda : lower + (i - kUpper) * g.lda;
          auto one = Dot<Math>::broadcast(row_a + k);
#pragma GCC unroll 4
          for (int j = 0; j < kPanels; ++j) sum[i][j] = Dot<Math>::add(sum[i][j], one, columns[j]);
        }
      }
      a += kTogether;
      lower += kTogether;
      b += kLanes * kTogether;
      right += kLanes * kTogether;
      asm("" : "+r"(a), "+r"(lower), "+r"(b), "+r"(right));
    }
    float* to = c;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i, to += ldc) {
      store_sums<Math, kPanels>(sum[i], to, accumulate, factors, row + i, first_panel * kLanes);
    }
    factors.rows += factors.next;
  }
}

template <class Math, int kPanels>
inline void gemm_rows(const GemmArgs<Math>& g, int64_t rows, int64_t first_panel) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) gemm_tile<Math, 6, kPanels>(g, i, first_panel);
  for (; i + 2 <= rows; i += 2) gemm_tile<Math, 2, kPanels>(g, i, first_panel);
  if (i < rows) gemm_tile<Math, 1, kPanels>(g, i, first_panel);
}

// A tile of 6 rows and 4 panels fills 32 registers, with 2 panels 16. So much of the panels' depth
// is taken at once that they stay in L1 while all rows pass (2 % of a float32 prefill).
template <class Math>
inline void gemm(GemmArgs<Math> g, int64_t rows, int64_t panels) {
  constexpr int kPanels = simd::kRegisters == 32 ? 4 : 2;
  constexpr int64_t kBytes = 32 << 10;
  constexpr int64_t kDeep = kBytes / (kPanels * simd::kLanes * int64_t{sizeof(Math)});
  for (int64_t left = g.depth; left > 0; left -= g.depth) {
    g.depth = std::min(left, kDeep - g.offset % kDeep);
    int64_t j = 0;
    for (; j + kPanels <= panels; j += kPanels) gemm_rows<Math, kPanels>(g, rows, j);
    if (j + 2 <= panels) {
      gemm_rows<Math, 2>(g, rows, j);
      j += 2;
    }
    for (; j < panels; ++j) gemm_rows<Math, 1>(g, rows, j);
    g.a += g.depth;
    g.b += g.depth * simd::kLanes;
    g.offset += g.depth;
    g.accumulate = true;
    g.factors.rows += (g.depth + g.piece - 1) / g.piece * g.factors.next;
  }
}

}  // namespace jit_kernel
