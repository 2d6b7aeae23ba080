// What a thread takes at once: rows of one sequence against a range of its keys.
#pragma once

#include <atomic>
#include <cstdint>

namespace jit_kernel {

struct Item {
  int64_t batch;
  int64_t head_begin, head_end;  // key/value heads; one for a prefill
  int64_t row_begin, row_end;    // rows as query.h counts them
  int64_t key_begin, key_end;
  int64_t part;         // its first row among the partials, or -1 when it sees all keys
  int64_t part_keys;    // keys of one part: a decode's item may be several, one after the other
  int64_t part_stride;  // rows among the partials from one part to the next
  double cost;          // multiplications
};

// The rows of an item that no thread has taken yet: those below left(). So a thread that finds no
// item any more joins one that another thread works on; a core that is slower than the others for
// a while (5 to 20 % of a call, on a shared machine) keeps no thread waiting. What is computed for
// a row does not depend on the thread.
class RowQueue {
 public:
  // Every thread that works on the item calls it; the first call counts.
  void open(int64_t rows) {
    int64_t closed = kClosed;
    left_.compare_exchange_strong(closed, rows, std::memory_order_relaxed);
  }
  // The first of the `step` rows that are the caller's, or a negative number.
  int64_t take(int64_t step) { return left_.fetch_sub(step, std::memory_order_relaxed) - step; }
  int64_t left() const { return left_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t kClosed = -1;
  std::atomic<int64_t> left_{kClosed};
};

}  // namespace jit_kernel
