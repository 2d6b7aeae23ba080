// The product of gemm.h in AMX tiles: 16 rows by 16 columns, 32 bf16 deep.
#pragma once

#include "flash_attention_v3/cpu/gemm.h"

#ifdef JIT_KERNEL_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace jit_kernel {

// Whether this process may use tile registers. The system hands them out on request, once for all
// threads; where it refuses (an old kernel, a sandbox) the AVX-512-BF16 product serves.
inline bool amx_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// Whether the tiles multiply fp16, too (Granite Rapids); a run-time matter, as the target has no
// word for it and older compilers know no such instruction.
inline bool amx_fp16_allowed() {
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1) && amx_allowed();
  }();
  return allowed;
}

// Tile kSum += tile kA times tile kB: TDPBF16PS or, by its bytes, TDPFP16PS; they differ in one
// prefix.
template <class Math, int kSum, int kA, int kB>
inline void tile_dot() {
  constexpr int kPrefix = std::is_same<Math, bf16>::value ? 2 : 3;  // F3 or F2
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1"
               :
               : "i"((~kB & 15) << 3 | kPrefix), "i"(0xc0 | kSum << 3 | kA));
}

// The thread's tiles while an item runs; released, as their 8 KiB would be saved at every switch.
class AmxTiles {
 public:
  // Tiles 0, 1 and 4 have `rows` rows, the others 16; 3, 6 and 7 have `columns` columns of 4 bytes.
  explicit AmxTiles(int64_t rows = 16, int64_t columns = 16) : active_(amx_allowed()) {
    if (!active_) return;
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
      bool narrow = i == 3 || i == 6 || i == 7;
      config[16 + 2 * i] = static_cast<unsigned char>(narrow ? 4 * columns : 64);  // bytes a row
      config[48 + i] = static_cast<unsigned char>(i < 2 || i == 4 ? rows : 16);
    }
    _tile_loadconfig(config);
  }
  ~AmxTiles() {
    if (active_) _tile_release();
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  bool active() const { return active_; }

 private:
  bool active_;
};

constexpr int64_t kAmxRows = 16;
constexpr int64_t kAmxTile = 512;  // elements of one tile of B

// 32 rows by 2 panels: each tile that is loaded serves two products.
template <class Math>
inline void gemm_amx_2x2(const GemmArgs<Math>& g, int64_t row, int64_t panel) {
  const Math *a = g.a + row * g.lda, *b = g.b + panel * g.panel;
  float* c = g.c + row * g.ldc + panel * simd::kLanes;
  const int64_t lda = g.lda * 2, ldc = g.ldc * 4;
  float* below = c + kAmxRows * g.ldc;
  if (g.accumulate) {
    _tile_loadd(0, c, ldc);
    _tile_loadd(1, c + 16, ldc);
    _tile_loadd(2, below, ldc);
    _tile_loadd(3, below + 16, ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < g.depth; k += kDepth, b += kAmxTile) {
    _tile_loadd(4, a + k, lda);
    _tile_loadd(6, b, 64);
    tile_dot<Math, 0, 4, 6>();
    _tile_loadd(7, b + g.panel, 64);
    tile_dot<Math, 1, 4, 7>();
    _tile_loadd(5, a + kAmxRows * g.lda + k, lda);
    tile_dot<Math, 2, 5, 6>();
    tile_dot<Math, 3, 5, 7>();
  }
  _tile_stored(0, c, ldc);
  _tile_stored(1, c + 16, ldc);
  _tile_stored(2, below, ldc);
  _tile_stored(3, below + 16, ldc);
}

// 16 rows by 1 panel, for what remains.
template <class Math>
inline void gemm_amx_1x1(const GemmArgs<Math>& g, int64_t row, int64_t panel) {
  const Math *a = g.a + row * g.lda, *b = g.b + panel * g.panel;
  float* c = g.c + row * g.ldc + panel * simd::kLanes;
  if (g.accumulate) {
    _tile_loadd(0, c, g.ldc * 4);
  } else {
    _tile_zero(0);
  }
  for (int64_t k = 0; k < g.depth; k += kDepth, b += kAmxTile) {
    _tile_loadd(4, a + k, g.lda * 2);
    _tile_loadd(6, b, 64);
    tile_dot<Math, 0, 4, 6>();
  }
  _tile_stored(0, c, g.ldc * 4);
}

// Up to two panels from `panel` on. Rows are rounded up to whole tiles: A and C must have room for
// them. The depth is a multiple of kDepth.
template <class Math>
inline void gemm_amx_panels(const GemmArgs<Math>& g, int64_t rows, int64_t panels, int64_t panel) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
  int64_t i = 0;
  if (panel + 2 <= panels) {
    for (; i + kAmxRows < rows; i += 2 * kAmxRows) gemm_amx_2x2(g, i, panel);
    if (i < rows) gemm_amx_1x1(g, i, panel), gemm_amx_1x1(g, i, panel + 1);
  } else {
    for (; i < rows; i += kAmxRows) gemm_amx_1x1(g, i, panel);
  }
}

template <class Math>
inline void gemm_amx(const GemmArgs<Math>& g, int64_t rows, int64_t panels) {
  for (int64_t j = 0; j < panels; j += 2) gemm_amx_panels(g, rows, panels, j);
}

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
