// The arguments that the launcher passes to the widening kernel: those of the attention kernel that
// comes next, with the pages of the cache in e4m3, and where its rows go. Included by both, so it
// uses only the language's own types.
#pragma once

#include "flash_attention_v3/hopper/append/params.h"
#include "flash_attention_v3/hopper/prefill/cached_params.h"

namespace jit_kernel::hopper {

constexpr int kWidenThreads = 256;
constexpr int kWidenPieces = 4;  // of 16 elements, that a thread has in flight
constexpr int kWidenPieceElements = 16;

// Keys, or values: a cache in e4m3, and (batch, rows, heads, columns) of 16 bits without gaps.
struct WidenPart {
  CacheRows source;
  char* destination;
  Divisor pieces;  // of a row of one head
};

struct WidenParams : CachedParams {
  Descale q_descale, k_descale, v_descale;
  WidenPart parts[2];
  TileFactors* table;  // `factors` of the attention kernel
  Divisor heads;       // of keys
  int pages;           // of the cache, or its dense sequences
  bool to_bf16;        // else to fp16
};

}  // namespace jit_kernel::hopper
