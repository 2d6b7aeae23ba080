// Element types of tensors, by their C++ names, and their scalar conversions. i16 is no tensor's:
// 16-bit integers that stand for numbers times a factor.
#pragma once

#include <cstdint>
#include <cstring>

namespace jit_kernel {

using f32 = float;
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct e4m3 {  // float8_e4m3fn: no infinity, 0x7f and 0xff are NaN
  uint8_t bits;
};
struct i16 {
  int16_t value;
};

// Inputs of two types: queries in one, keys and values in e4m3. No tensor has it: it has no size.
template <class Queries>
struct OverE4m3;
using bf16_over_e4m3 = OverE4m3<bf16>;
using fp16_over_e4m3 = OverE4m3<fp16>;

// The types of the queries, and of the keys and values, of inputs of a type.
template <class Element>
struct InputsOf {
  using Query = Element;
  using Key = Element;
};
template <class Queries>
struct InputsOf<OverE4m3<Queries>> {
  using Query = Queries;
  using Key = e4m3;
};
template <class Element>
using QueryOf = typename InputsOf<Element>::Query;
template <class Element>
using KeyOf = typename InputsOf<Element>::Key;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(f32 x) { return x; }

inline float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(fp16 x) {
  uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline float to_float(e4m3 x) {
  uint32_t sign = uint32_t{x.bits & 0x80u} << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude >= 8u) return bit_cast<float>(sign | ((magnitude << 20) + 0x3c000000u));
  float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return sign ? -subnormal : subnormal;
}

template <class Element>
Element from_float(float x);

template <>
inline f32 from_float<f32>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest, ties to even
  uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {  // round to nearest, ties to even
  uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u,
           magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal: the sum's last bit is worth 2^-24
    float shifted = bit_cast<float>(magnitude) + 0.5f;
    return fp16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return fp16{static_cast<uint16_t>(sign | rounded >> 13)};
}

template <>
inline e4m3 from_float<e4m3>(float x) {  // saturates; round to nearest, ties to even
  // Without a branch: the compiler makes vectors of a loop of it.
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80u,
                 magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - 0x3c000000u) >> 20;
  // The last bit of the sum is worth 2^-9.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 16384.0f) - 0x46800000u;
  uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
  code = magnitude >= 0x43e80000u ? 0x7eu : code;
  code = magnitude > 0x7f800000u ? 0x7fu : code;
  return e4m3{static_cast<uint8_t>(sign | code)};
}

// The bits of a number's exponent, all of them ones where it is infinite or NaN.
inline uint32_t exponent_bits(f32 x) { return bit_cast<uint32_t>(x) & 0x7f800000u; }
inline int16_t exponent_bits(bf16 x) { return static_cast<int16_t>(x.bits & 0x7f80); }
inline int16_t exponent_bits(fp16 x) { return static_cast<int16_t>(x.bits & 0x7c00); }

template <class Element>
constexpr uint32_t kExponentOfOnes = 0x7f800000;
template <>
constexpr int16_t kExponentOfOnes<bf16> = 0x7f80;
template <>
constexpr int16_t kExponentOfOnes<fp16> = 0x7c00;

template <class Element>
inline bool is_finite(Element x) {
  return exponent_bits(x) != kExponentOfOnes<Element>;
}

// Whether n numbers are finite. By the largest exponent: the compiler makes vectors of that.
template <class Element>
inline bool are_finite(const Element* x, int64_t n) {
  decltype(exponent_bits(*x)) largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = exponent_bits(x[i]);
    largest = largest < bits ? bits : largest;
  }
  return largest != kExponentOfOnes<Element>;
}

// What attention of these inputs gives: the queries' dtype, and bf16 for e4m3.
template <class Element>
struct OutputOf {
  using type = QueryOf<Element>;
};
template <>
struct OutputOf<e4m3> {
  using type = bf16;
};

}  // namespace jit_kernel
