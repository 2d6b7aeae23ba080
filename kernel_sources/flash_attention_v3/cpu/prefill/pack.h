// Rows of keys and values to panels, as gemm.h wants B; rows that no query sees become zeros.
#pragma once

#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/common/prefetch.h"
#include "flash_attention_v3/cpu/prefill/prefill_tiles.h"
#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

// One panel of kLanes keys: step after step of their depth. `rows` are padded to `padded` elements.
// asked(n) is called when n of the kLanes rows that come next should be asked for.
template <class Math, class Asked>
inline void transpose_panel(const Math* const* rows, int64_t padded, Math* out, Asked&& asked) {
#ifdef JIT_KERNEL_AVX512
  const char* bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = reinterpret_cast<const char*>(rows[i]);
  char* to = reinterpret_cast<char*>(out);
  const int64_t size = padded * int64_t{sizeof(Math)};
  for (int64_t at = 0; at < size; at += kCacheLine) {
    asked((at + kCacheLine) * simd::kLanes / size);
    transpose_words(bytes, at, to + at * 16);
  }
#else
  asked(simd::kLanes);
  for (int64_t i = 0; i < padded; ++i) {
    for (int j = 0; j < simd::kLanes; ++j) out[i * simd::kLanes + j] = rows[j][i];
  }
#endif
}

// Which rows are packed: those from `hidden` to `count`. The ones around them become zeros: no
// query sees them, so their memory may hold anything. Rows up to `known` have pointers to be asked
// for.
struct PackedRows {
  int64_t hidden, count, known;
  const float* factors = nullptr;  // of the rows, where they have some

  bool holds(int64_t row) const { return row >= hidden && row < count; }

  // Of a row of Elements; the types that have no factors are not asked.
  template <class Element>
  float factor(int64_t row) const {
    return std::is_same<Element, e4m3>::value && factors ? factors[row] : 1.0f;
  }
};

// Keys to panels: panel after panel (`panel` elements apart) of kLanes keys.
// `spare` holds kLanes rows of `padded` elements. Each row is asked for a panel ahead, in the order
// of memory: packing 2,048 keys and values of head size 128 takes 160 us instead of 230, where
// reading them alone takes 110.
template <class Math, class Element>
inline void pack_keys(const Element* const* rows, const PackedRows& which, int64_t d,
                      int64_t padded, Math* out, int64_t panel, Math* spare) {
  Prefetch ahead(reinterpret_cast<const void* const*>(rows), d * int64_t{sizeof(Element)},
                 which.known, simd::kLanes);
  bool in_place = std::is_same<Math, Element>::value && d == padded;
  for (int64_t first = 0; first < which.count; first += simd::kLanes, out += panel) {
    const Math* lanes[simd::kLanes];
    for (int64_t j = 0; j < simd::kLanes; ++j) {
      lanes[j] = spare + j * padded;
      if (!which.holds(first + j)) {
        convert_row<Math>(static_cast<const Element*>(nullptr), spare + j * padded, 0, padded);
      } else if (in_place) {
        lanes[j] = reinterpret_cast<const Math*>(rows[first + j]);
      } else {
        convert_row<Math>(rows[first + j], spare + j * padded, d, padded,
                          which.factor<Element>(first + j));
      }
    }
    transpose_panel(lanes, padded, out, [&](int64_t n) { ahead.until(first + simd::kLanes + n); });
  }
}

// The key in the place `at` of packed values, within kDepth of them.
template <class Math>
constexpr int64_t key_at(int64_t at) {
  constexpr int64_t kTogether = kStep<Math>, kApart = kStepApart<Math>;
  const int64_t step = at / kTogether;
  return step / kApart * kApart * kTogether + step % kApart + at % kTogether * kApart;
}

// Values to panels of kLanes columns, `padded_count` rows of them, asked for as pack_keys does.
template <class Math, class Element>
inline void pack_values(const Element* const* rows, const PackedRows& which, int64_t padded_count,
                        int64_t dv, int64_t padded, Math* out, int64_t panel, Math* spare) {
  Prefetch ahead(reinterpret_cast<const void* const*>(rows), dv * int64_t{sizeof(Element)},
                 which.known, kDepth);
  bool in_place = std::is_same<Math, Element>::value && dv == padded;
  constexpr int kTogether = kStep<Math>;
  for (int64_t step = 0; step < padded_count / kTogether; ++step) {
    const Math* row[kTogether];
    ahead.more(kTogether);
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = step * kTogether + i,
                    key = at / kDepth * kDepth + key_at<Math>(at % kDepth);
      row[i] = spare + i * padded;
      if (!which.holds(key)) {
        convert_row<Math>(static_cast<const Element*>(nullptr), spare + i * padded, 0, padded);
      } else if (in_place) {
        row[i] = reinterpret_cast<const Math*>(rows[key]);
      } else {
        convert_row<Math>(rows[key], spare + i * padded, dv, padded, which.factor<Element>(key));
      }
    }
    Math* to = out + step * kTogether * simd::kLanes;
    for (int64_t column = 0; column < padded; column += simd::kLanes, to += panel) {
      if constexpr (kTogether == 1) {
        simd::store_as(to, simd::load_as_float(row[0] + column));
      } else {
#ifdef JIT_KERNEL_BF16_DOT
        auto words = [&](int i) {
          auto* p = reinterpret_cast<const __m256i*>(row[i] + column);
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
        };
        _mm512_storeu_si512(to, _mm512_or_si512(words(0), _mm512_slli_epi32(words(1), 16)));
#endif
      }
    }
  }
}

}  // namespace jit_kernel
