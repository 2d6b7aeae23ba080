// Rows of keys and values to panels, as gemm.h wants B; rows past the last one become zeros.
#pragma once

#include "flash_attention_v3/cpu/common/prefetch.h"
#include "flash_attention_v3/cpu/common/tile_size.h"

namespace jit_kernel {

// n elements of a row to the math's type, then zeros up to `padded`.
template <class Math, class Element>
inline void convert_row(const Element* from, Math* to, int64_t n, int64_t padded,
                        float factor = 1.0f) {
  int64_t i = 0;
  if (std::is_same<Math, Element>::value && factor == 1.0f) {
    constexpr int64_t kPiece = 2 * simd::kLanes;  // of a fixed size: instructions, not calls
    for (; i + kPiece <= n; i += kPiece) {
      std::memcpy(static_cast<void*>(to + i), from + i, kPiece * sizeof(Element));
    }
    if (i < n) {
      std::memcpy(static_cast<void*>(to + i), from + i,
                  static_cast<size_t>(n - i) * sizeof(Element));
    }
    i = n;
  }
  for (; i + simd::kLanes <= n; i += simd::kLanes) {
    simd::store_as(to + i, simd::load_as_float(from + i) * simd::set1(factor));
  }
  for (; i < n; ++i) to[i] = from_float<Math>(to_float(from[i]) * factor);
  for (; i < padded; ++i) to[i] = from_float<Math>(0.0f);
}

#ifdef JIT_KERNEL_AVX512
// out[i][j] = rows[j][i] for 16 x 16 words of 32 bits.
inline void transpose_words(const char* const* rows, int64_t offset, char* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + offset);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 i + c]: column 4 q + c of rows 4 i .. 4 i + 3 in quarter q
    a[4 * i + 0] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);       // quarters 0 2 of rows 0..7
    __m512i high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);      // quarters 1 3
    __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);  // the same of rows 8..15
    __m512i high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + 64 * c, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(out + 64 * (4 + c), _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(out + 64 * (8 + c), _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(out + 64 * (12 + c), _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
}
#endif

// One panel of kLanes keys: step after step of their depth. `rows` are padded to `padded` elements.
// asked(n) is called when n of the kLanes rows that come next should be asked for.
template <class Math, class Asked>
inline void transpose_panel(const Math* const* rows, int64_t padded, Math* out, Asked&& asked) {
#ifdef JIT_KERNEL_AVX512
  const char* bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = reinterpret_cast<const char*>(rows[i]);
  char* to = reinterpret_cast<char*>(out);
  const int64_t size = padded * int64_t{sizeof(Math)};
  for (int64_t at = 0; at < size; at += 64) {
    asked((at + 64) * simd::kLanes / size);
    transpose_words(bytes, at, to + at * 16);
  }
#else
  asked(simd::kLanes);
  for (int64_t i = 0; i < padded; ++i) {
    for (int j = 0; j < simd::kLanes; ++j) out[i * simd::kLanes + j] = rows[j][i];
  }
#endif
}

// Keys to panels: panel after panel (`panel` elements apart) of kLanes keys.
// `spare` holds kLanes rows of `padded` elements; keys past `count` become zeros. Of `known` rows
// each is asked for a panel ahead, in the order of memory: packing 2,048 keys and values of head
// size 128 takes 160 us instead of 230, where reading them alone takes 110.
template <class Math, class Element>
inline void pack_keys(const Element* const* rows, int64_t count, int64_t known, int64_t d,
                      int64_t padded, Math* out, int64_t panel, Math* spare) {
  Prefetch ahead(reinterpret_cast<const void* const*>(rows), d * int64_t{sizeof(Element)}, known,
                 simd::kLanes);
  bool in_place = std::is_same<Math, Element>::value && d == padded;
  for (int64_t first = 0; first < count; first += simd::kLanes, out += panel) {
    const Math* lanes[simd::kLanes];
    for (int64_t j = 0; j < simd::kLanes; ++j) {
      lanes[j] = spare + j * padded;
      if (first + j >= count) {
        convert_row<Math>(static_cast<const Element*>(nullptr), spare + j * padded, 0, padded);
      } else if (in_place) {
        lanes[j] = reinterpret_cast<const Math*>(rows[first + j]);
      } else {
        convert_row<Math>(rows[first + j], spare + j * padded, d, padded);
      }
    }
    transpose_panel(lanes, padded, out, [&](int64_t n) { ahead.until(first + simd::kLanes + n); });
  }
}

// Values to panels of kLanes columns. Rows count .. padded_count - 1 become zeros; of `known` rows
// each is asked for ahead, as pack_keys does.
template <class Math, class Element>
inline void pack_values(const Element* const* rows, int64_t count, int64_t known,
                        int64_t padded_count, int64_t dv, int64_t padded, Math* out, int64_t panel,
                        Math* spare) {
  Prefetch ahead(reinterpret_cast<const void* const*>(rows), dv * int64_t{sizeof(Element)}, known,
                 kDepth);
  bool in_place = std::is_same<Math, Element>::value && dv == padded;
  constexpr int kTogether = kStep<Math>;
  constexpr int64_t kApart = kStepApart<Math>;
  for (int64_t step = 0; step < padded_count / kTogether; ++step) {
    const Math* row[kTogether];
    ahead.more(kTogether);
    for (int i = 0; i < kTogether; ++i) {
      int64_t key = step / kApart * kApart * kTogether + step % kApart + i * kApart;
      row[i] = spare + i * padded;
      if (key >= count) {
        convert_row<Math>(static_cast<const Element*>(nullptr), spare + i * padded, 0, padded);
      } else if (in_place) {
        row[i] = reinterpret_cast<const Math*>(rows[key]);
      } else {
        convert_row<Math>(rows[key], spare + i * padded, dv, padded);
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
