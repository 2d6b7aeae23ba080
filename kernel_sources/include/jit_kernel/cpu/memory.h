// The units in which memory is read and mapped.
#pragma once

#include <cstdint>

namespace jit_kernel {

constexpr int64_t kCacheLine = 64;    // bytes
constexpr int64_t kPageBytes = 4096;  // of a small page

}  // namespace jit_kernel
