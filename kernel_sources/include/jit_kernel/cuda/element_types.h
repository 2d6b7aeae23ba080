// Element types of the kernels' inputs, as names. No device code: launchers read it too.
#pragma once

namespace jit_kernel {

// The kernels only move, multiply and pack them.
struct bf16 {};
struct fp16 {};
struct e4m3 {};  // float8_e4m3fn

template <class Element>
struct ElementSize {
  enum : int { kBytes = 2 };
};
template <>
struct ElementSize<e4m3> {
  enum : int { kBytes = 1 };
};

}  // namespace jit_kernel
