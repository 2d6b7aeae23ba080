// C (rows, columns) += A (rows, depth) B (depth, columns) in floats, without packing what is used
// once.
//
// A is row-major, or lies transposed: its columns' numbers side by side, as those of P and dS do
// where they are multiplied from the left by their transpose. B is in panels of kLanes columns: so
// packed, or rows as they are, whose panels lie kLanes apart. Every sum runs over the depth in
// order.
#pragma once

#include <cstdint>

#include "jit_kernel/cpu/simd.h"

namespace jit_kernel {

struct Product {
  const float* a = nullptr;
  int64_t lda = 0;
  const float* b = nullptr;
  int64_t step = 0, panel = 0;  // of B: from one step of the depth, and from one panel, to the next
  float* c = nullptr;
  int64_t ldc = 0, depth = 0;
  bool accumulate = true;  // add to C, else overwrite it
};

// Two pointers to rows of A and two to panels of B, hidden from the compiler, as in prefill/gemm.h.
template <bool kTransposed, int kRows, int kPanels>
inline void product_tile(const Product& g, int64_t row, int64_t first_panel) {
  using simd::kLanes;
  constexpr int kUpper = (kRows + 1) / 2, kLeft = (kPanels + 1) / 2;
  const int64_t lda = g.lda;
  const float* a = g.a + (kTransposed ? row : row * lda);
  const float* lower = kTransposed ? a : a + kUpper * lda;
  const float *b = g.b + first_panel * g.panel, *right = b + kLeft * g.panel;
  const int64_t step = g.step, panel = g.panel;
  simd::Vec sum[kRows][kPanels];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) sum[i][j] = simd::zero();
  }
  for (int64_t n = g.depth; n > 0; --n) {
    simd::Vec columns[kPanels];
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) {
      columns[j] = simd::load(j < kLeft ? b + j * panel : right + (j - kLeft) * panel);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const float* at = kTransposed ? a + i : i < kUpper ? a + i * lda : lower + (i - kUpper) * lda;
      const simd::Vec one = simd::set1(*at);
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) sum[i][j] = simd::fma(one, columns[j], sum[i][j]);
    }
    a += kTransposed ? lda : 1;
    if (!kTransposed) ++lower;
    b += step;
    right += step;
    asm("" : "+r"(a), "+r"(lower), "+r"(b), "+r"(right));
  }
  float* c = g.c + row * g.ldc + first_panel * kLanes;
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i, c += g.ldc) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) {
      float* at = c + j * kLanes;
      simd::store(at, g.accumulate ? simd::load(at) + sum[i][j] : sum[i][j]);
    }
  }
}

template <bool kTransposed, int kPanels>
inline void product_rows(const Product& g, int64_t rows, int64_t panel) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) product_tile<kTransposed, 6, kPanels>(g, i, panel);
  for (; i + 2 <= rows; i += 2) product_tile<kTransposed, 2, kPanels>(g, i, panel);
  if (i < rows) product_tile<kTransposed, 1, kPanels>(g, i, panel);
}

// A tile of 6 rows and 4 panels fills 32 registers, with 2 panels 16.
template <bool kTransposed>
inline void multiply(const Product& g, int64_t rows, int64_t panels) {
  constexpr int kPanels = simd::kRegisters == 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + kPanels <= panels; j += kPanels) product_rows<kTransposed, kPanels>(g, rows, j);
  if (j + 2 <= panels) {
    product_rows<kTransposed, 2>(g, rows, j);
    j += 2;
  }
  for (; j < panels; ++j) product_rows<kTransposed, 1>(g, rows, j);
}

}  // namespace jit_kernel
