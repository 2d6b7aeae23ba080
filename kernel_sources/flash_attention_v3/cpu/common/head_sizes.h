// Types and sizes that both kernels share. They, and those of the kernels' tiles, depend on element
// type, head sizes and instruction set only: never on the batch, so that a sequence's result is
// bitwise the same in any batch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "jit_kernel/cpu/simd.h"

namespace jit_kernel {

// What products are made of: pairs of bf16 where there is an instruction for them, else float.
#ifdef JIT_KERNEL_BF16_DOT
template <class Element>
using MathOf = std::conditional_t<std::is_same<QueryOf<Element>, bf16>::value ||
                                      std::is_same<QueryOf<Element>, e4m3>::value,
                                  bf16, float>;
#else
template <class Element>
using MathOf = float;
#endif

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Keys are taken in multiples of this: an AMX tile's depth, and pairs of vectors everywhere.
constexpr int64_t kDepth = 32;

// The depth of q·k is padded with zeros to this: an AMX tile's depth, or a vector.
template <class Math>
inline int64_t padded_depth(int64_t d) {
  return round_up(d, sizeof(Math) == 2 ? kDepth : simd::kLanes);
}

// What one dot product of a query and a key spans: q·k, then qv·v. Elements, padded.
struct HeadSizes {
  int64_t qk;     // padded d, or 0 when only qv counts
  int64_t qv;     // padded dv, or 0 without qv
  int64_t depth;  // their sum
  int64_t dv;     // columns of out, padded to vectors
};

template <class Math, class Params>
inline HeadSizes head_sizes(const Params& p) {
  HeadSizes h;
  h.qk = p.only_qv ? 0 : padded_depth<Math>(p.d);
  h.qv = p.qv ? padded_depth<Math>(p.dv) : 0;
  h.depth = h.qk + h.qv;
  h.dv = round_up(p.dv, simd::kLanes);
  return h;
}

}  // namespace jit_kernel
