// The items that threads take: rows of one sequence and key/value head, against a range of keys.
#pragma once

#include <algorithm>
#include <vector>

#include "flash_attention_v3/cpu/mask.h"
#include "flash_attention_v3/cpu/params.h"
#include "flash_attention_v3/cpu/tile_size.h"

namespace jit_kernel {

struct Item {
  int64_t batch, head_k;
  int64_t row_begin, row_end;  // rows as query.h counts them
  int64_t key_begin, key_end;
  int64_t part;  // its first row among the partials, or -1 when it sees all keys
  double cost;   // multiplications
};

// Rows whose parts are to be combined when all items are done.
struct Combination {
  int64_t batch, head_k, rows;
  int64_t first, stride, count;  // its first row among the partials; rows between parts; parts
};

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<Item> items;
  std::vector<Combination> combinations;
  int64_t part_rows = 0;
  double cost = 0.0;

  void clear() {
    sequences.clear();
    items.clear();
    combinations.clear();
    part_rows = 0;
    cost = 0.0;
  }
};

inline bool is_decode(int64_t rows) { return rows <= kDecodeRows; }

// Keys in one part. It depends on the sequence's own lengths only.
template <class Params>
inline int64_t keys_per_part(const Params& p, int64_t rows, int64_t sk) {
  if (p.num_splits > 1) return round_up((sk + p.num_splits - 1) / p.num_splits, kDepth);
  if (is_decode(rows)) return kDecodeChunk;
  return rows <= 4 * kDecodeRows ? 4 * kDecodeChunk : sk;
}

// The mean of keys visible to the first and the last of an item's rows, within its keys.
template <class Params>
inline double visible_count(const Params& p, const Sequence& s, const Item& item) {
  double sum = 0.0;
  for (int64_t r : {item.row_begin, item.row_end - 1}) {
    Interval seen = visible_keys(p, r / p.group, s.sq, s.sk);
    int64_t begin = std::max(seen.begin, item.key_begin), end = std::min(seen.end, item.key_end);
    sum += static_cast<double>(std::max<int64_t>(0, end - begin));
  }
  return sum / 2;
}

template <class Params>
inline void plan_sequence(const Params& p, int64_t batch, int64_t row_block, Plan& plan) {
  const Sequence& s = plan.sequences[batch];
  int64_t rows = s.sq * p.group;
  if (rows == 0) return;
  int64_t first = visible_keys(p, 0, s.sq, s.sk).begin;
  int64_t last = visible_keys(p, s.sq - 1, s.sq, s.sk).end;
  int64_t keys = std::max<int64_t>(1, keys_per_part(p, rows, s.sk));
  int64_t first_part = first / keys,
          parts = std::max<int64_t>(1, (last + keys - 1) / keys - first_part);
  int64_t block = is_decode(rows) ? rows : row_block;
  for (int64_t h = 0; h < p.heads_k; ++h) {
    if (parts > 1) plan.combinations.push_back({batch, h, rows, plan.part_rows, rows, parts});
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t r = 0; r < rows; r += block) {
        Item item{batch, h, r, std::min(rows, r + block), 0, 0, -1, 0.0};
        item.key_begin = std::min((first_part + part) * keys, s.sk);
        item.key_end = std::min(item.key_begin + keys, s.sk);
        if (parts > 1) item.part = plan.part_rows + part * rows + r;
        double worth = static_cast<double>(std::max<int64_t>(item.row_end - r, 8) * (p.d + p.dv));
        item.cost = visible_count(p, s, item) * worth;
        plan.cost += item.cost;
        plan.items.push_back(item);
      }
    }
    if (parts > 1) plan.part_rows += parts * rows;
  }
}

// Fills the plan: the longest items first, so that threads end together. `most_rows` bounds the
// rows of an item; they are fewer when threads would have nothing to do.
template <class Params>
inline void make_plan(const Params& p, int64_t most_rows, Plan& plan) {
  plan.clear();
  int64_t rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    plan.sequences.push_back(sequence_of(p, b));
    rows += plan.sequences.back().sq * p.group * p.heads_k;
  }
  int64_t per_thread = rows / std::max<int64_t>(1, 4 * p.num_threads) / kTileRows * kTileRows;
  int64_t row_block = std::min(most_rows, std::max(2 * kTileRows, per_thread));
  for (int64_t b = 0; b < p.batch; ++b) plan_sequence(p, b, row_block, plan);
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

}  // namespace jit_kernel
