// Software prefetch of a decode's keys and values in the order of memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

// Asks for the keys, then the values of block after block, a token's heads in one run where they
// lie side by side: a core's own prefetcher follows such runs. Into L2, as L1 holds the lines in
// use. A core drops requests when too many are under way (Zen 4 does), so the
// loops that read ask a second time, shortly before: that is 4 to 6 of the 84 to 100 % of reading
// that are reached.
template <class Block, int64_t kBlocks>
class RunPrefetch {
 public:
  RunPrefetch() = default;
  // Blocks are a ring, in which block i is the (i % kBlocks)-th. `heads` heads of keys and values,
  // whose bytes are `head_bytes` and which lie `apart`, begin `offset` bytes after a row's pointer;
  // index 0 for keys, 1 for values.
  struct Layout {
    int64_t offset[2], head_bytes[2], apart[2];
    int64_t heads;
    bool has_keys;
  };
  RunPrefetch(const Block* blocks, const Layout& layout)
      : blocks_(blocks), first_kind_(layout.has_keys ? 0 : 1), kind_(first_kind_) {
    for (int i = 0; i < 2; ++i) {
      bool is_one = layout.apart[i] == layout.head_bytes[i];
      offset_[i] = layout.offset[i];
      apart_[i] = layout.apart[i];
      bytes_[i] = layout.head_bytes[i] * (is_one ? layout.heads : 1);
      runs_[i] = is_one ? 1 : layout.heads;
    }
    run_ = runs_[kind_] - 1;  // the last one of the block before the first
  }

  // Blocks below this one may be asked for.
  void set_located(int64_t located) { located_ = located; }

  // Asks for so many bytes more, in pieces of kPiece.
  inline __attribute__((always_inline)) void ask(int64_t bytes) {
    for (due_ += bytes; due_ >= kPiece; due_ -= kPiece) {
      if (at_ >= end_ && !open()) continue;
      if (at_ + kPiece <= end_) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPiece; i += kCacheLine) __builtin_prefetch(at_ + i, 0, 2);
        at_ += kPiece;
      } else {
        ask_rest();
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 512;

  // A piece that is longer than the rest of the run.
  __attribute__((noinline)) void ask_rest() {
    for (int64_t left = kPiece; left > 0;) {
      if (at_ >= end_ && !open()) return;
      const int64_t taken = std::min(left, end_ - at_);
      for (int64_t i = 0; i < taken; i += kCacheLine) __builtin_prefetch(at_ + i, 0, 2);
      at_ += taken;
      left -= taken;
    }
  }

  // Goes to the next run; returns whether there is one.
  __attribute__((noinline)) bool open() {
    if (run_ + 1 < runs_[kind_]) {
      ++run_;
    } else if (row_ + 1 < rows_) {
      ++row_;
      run_ = 0;
    } else if (!open_block()) {
      return false;
    }
    at_ = from_[row_] + offset_[kind_] + run_ * apart_[kind_];
    end_ = at_ + bytes_[kind_];
    return true;
  }

  bool open_block() {
    const bool to_values = block_ >= 0 && kind_ == 0;
    if (!to_values && block_ + 1 >= located_) return false;
    block_ += to_values ? 0 : 1;
    kind_ = to_values ? 1 : first_kind_;
    const Block& block = blocks_[block_ % kBlocks];
    from_ = reinterpret_cast<const char* const*>(kind_ ? block.v : block.k);
    row_ = block.from;
    rows_ = block.to;
    run_ = 0;
    return true;
  }

  const Block* blocks_ = nullptr;
  int64_t first_kind_ = 0, offset_[2] = {}, bytes_[2] = {}, apart_[2] = {}, runs_[2] = {};
  int64_t due_ = 0;                            // bytes
  const char *at_ = nullptr, *end_ = nullptr;  // the rest of a run
  const char* const* from_ = nullptr;          // rows of the block and kind
  int64_t kind_ = 0, row_ = 0, rows_ = 0, run_ = 0, block_ = -1, located_ = 0;
};

}  // namespace jit_kernel
