// Sizes that a decode works in.
#pragma once

#include <cstdint>

namespace jit_kernel {

// Up to this many rows (queries times heads of a group) of a sequence go through the decode kernel,
// which reads keys in place instead of packing them.
constexpr int64_t kDecodeRows = 16;
// Keys whose scores are held at once; 64 keeps memory less busy.
constexpr int64_t kDecodeBlock = 32;

// Keys per item of a decode: long sequences are spread over threads in pieces of this size,
// combined in order. Always, so that it changes nothing bitwise how many threads there are.
constexpr int64_t kDecodeChunk = 1024;

// How many steps (a block of keys and a head) before its use a decode in tiles asks for a row: of 1
// to 8 the best. And how many blocks to come every decode knows the places of.
constexpr int64_t kStepsAhead = 2;

}  // namespace jit_kernel
