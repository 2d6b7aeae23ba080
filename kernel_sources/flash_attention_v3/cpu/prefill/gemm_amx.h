// The product of gemm.h in AMX tiles: 16 rows by 16 columns, 32 bf16 deep.
#pragma once

#include "flash_attention_v3/cpu/common/amx.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"

#ifdef JIT_KERNEL_AMX

#define JIT_KERNEL_INLINED __attribute__((always_inline))
#define JIT_KERNEL_INLINE inline JIT_KERNEL_INLINED

namespace jit_kernel {

constexpr int64_t kAmxTile = 512;  // elements of one tile of B

// Products of 32 rows by 2 panels, or 1: each tile that is loaded serves two of them. B passes L1
// by (TILELOADDT1): a stream from L2 of which nothing is used twice, it drove out A and C (7 %).
//
// The sums of a product are stored while the next one begins, each just before its register is
// taken for another sum. Stored together at a product's end they keep the tile unit waiting: 107 ns
// instead of 88 for 16 tiles' products. So C is complete after the next multiply() or finish().
template <class Math>
class TileProducts {
 public:
  // Panels `panel` and, where there is one, the next; A and C must have 32 rows. With two panels
  // between() is called after every load of a tile of A or B and every product of tiles.
  template <class Between>
  JIT_KERNEL_INLINE void multiply(const GemmArgs<Math>& g, int64_t panel, int64_t panels,
                                  Between&& between) {
    asm volatile("" ::: "memory");  // the compiler does not know which memory tile loads read
    if (panel + 1 < panels) {
      two_panels(g, panel, between);
    } else {
      one_panel(g, panel);
    }
  }

  // How often two panels of this depth call between().
  static int64_t calls(int64_t depth) { return 8 * (depth / kDepth); }

  void finish() {
    if (!sums_) return;
    _tile_stored(0, sums_, stride_ * 4);
    _tile_stored(2, sums_ + kAmxRows * stride_, stride_ * 4);
    if (two_) {
      _tile_stored(1, sums_ + 16, stride_ * 4);
      _tile_stored(3, sums_ + kAmxRows * stride_ + 16, stride_ * 4);
    }
    sums_ = nullptr;
  }

 private:
// Stores a tile of sums and begins another sum in it. A macro, as the intrinsics take
// nothing but a literal number.
#define JIT_KERNEL_NEXT_SUM(tile, row, column)                       \
  if (sums_ && (two_ || column == 0)) {                              \
    _tile_stored(tile, sums_ + row * stride_ + column, stride_ * 4); \
  }                                                                  \
  if (g.accumulate) {                                                \
    _tile_loadd(tile, c + row * g.ldc + column, g.ldc * 4);          \
  } else {                                                           \
    _tile_zero(tile);                                                \
  }

  // A tile of B serves the two products that follow it at once, and the second tile's products of
  // one step come after the loads of the next: so a tile of B, which comes from L2, is asked for
  // well before it is used (1 to 4 % of a prefill).
  template <class Between>
  JIT_KERNEL_INLINE void two_panels(const GemmArgs<Math>& g, int64_t panel, Between&& between) {
    const Math *a = g.a, *below = a + kAmxRows * g.lda;
    const Math *b = g.b + panel * g.panel, *right = b + g.panel;
    float* c = g.c + panel * simd::kLanes;
    const int64_t lda = g.lda * 2;
    _tile_stream_loadd(6, b, 64);
    between();
    _tile_loadd(4, a, lda);
    between();
    JIT_KERNEL_NEXT_SUM(0, 0, 0)
    tile_dot<Math, 0, 4, 6>();
    between();
    _tile_loadd(5, below, lda);
    between();
    JIT_KERNEL_NEXT_SUM(2, kAmxRows, 0)
    tile_dot<Math, 2, 5, 6>();
    between();
    _tile_stream_loadd(7, right, 64);
    between();
    JIT_KERNEL_NEXT_SUM(1, 0, 16)
    JIT_KERNEL_NEXT_SUM(3, kAmxRows, 16)
    for (int64_t k = g.depth - kDepth; k > 0; k -= kDepth) {
      a += kDepth;
      below += kDepth;
      b += kAmxTile;
      right += kAmxTile;
      tile_dot<Math, 1, 4, 7>();
      between();
      _tile_loadd(4, a, lda);
      between();
      _tile_stream_loadd(6, b, 64);
      between();
      tile_dot<Math, 3, 5, 7>();
      between();
      _tile_loadd(5, below, lda);
      between();
      tile_dot<Math, 0, 4, 6>();
      between();
      _tile_stream_loadd(7, right, 64);
      between();
      tile_dot<Math, 2, 5, 6>();
      between();
    }
    tile_dot<Math, 1, 4, 7>();
    between();
    tile_dot<Math, 3, 5, 7>();
    between();
    sums_ = c;
    stride_ = g.ldc;
    two_ = true;
  }

  void one_panel(const GemmArgs<Math>& g, int64_t panel) {
    finish();
    const Math *a = g.a, *below = a + kAmxRows * g.lda, *b = g.b + panel * g.panel;
    float* c = g.c + panel * simd::kLanes;
    JIT_KERNEL_NEXT_SUM(0, 0, 0)
    JIT_KERNEL_NEXT_SUM(2, kAmxRows, 0)
    for (int64_t k = 0; k < g.depth; k += kDepth, b += kAmxTile) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a + k, g.lda * 2);
      tile_dot<Math, 0, 4, 6>();
      _tile_loadd(5, below + k, g.lda * 2);
      tile_dot<Math, 2, 5, 6>();
    }
    sums_ = c;
    stride_ = g.ldc;
    two_ = false;
  }
#undef JIT_KERNEL_NEXT_SUM

  float* sums_ = nullptr;  // where the sums that are still in tiles belong
  int64_t stride_ = 0;
  bool two_ = false;
};

// Up to 32 rows; A and C must have room for 32. The depth is a multiple of kDepth.
template <class Math>
inline void gemm_amx(const GemmArgs<Math>& g, int64_t panels) {
  TileProducts<Math> products;
  for (int64_t j = 0; j < panels; j += 2) products.multiply(g, j, panels, [] {});
  products.finish();
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
