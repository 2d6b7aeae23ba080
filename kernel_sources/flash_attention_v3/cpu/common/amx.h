// AMX tiles: whether they may be used, their configuration, and the products of two of them.
#pragma once

#include "jit_kernel/cpu/simd.h"

#ifdef JIT_KERNEL_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>

namespace jit_kernel {

constexpr int64_t kAmxRows = 16;  // of a tile, at most

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
  // Tiles 0, 1, 2 and 4 have `rows` rows, the others 16; 3, 6 and 7 have `columns` columns of 4
  // bytes.
  explicit AmxTiles(int64_t rows = 16, int64_t columns = 16) : active_(amx_allowed()) {
    if (!active_) return;
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
      bool narrow = i == 3 || i == 6 || i == 7;
      config[16 + 2 * i] = static_cast<unsigned char>(narrow ? 4 * columns : 64);  // bytes a row
      config[48 + i] = static_cast<unsigned char>(i < 3 || i == 4 ? rows : 16);
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

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
