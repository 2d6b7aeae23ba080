// How a call is cut into the items that threads take.
#pragma once

#include <algorithm>
#include <vector>

#include "flash_attention_v3/cpu/common/item.h"
#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/decode/decode_sizes.h"
#include "flash_attention_v3/cpu/prefill/prefill_tiles.h"

namespace jit_kernel {

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
  int64_t decode_keys = 0;  // of all sequences that decode and are not cut yet
  double cost = 0.0;

  void clear() {
    sequences.clear();
    items.clear();
    combinations.clear();
    part_rows = 0;
    decode_keys = 0;
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

// How items are cut; none of it changes a result.
struct Cut {
  int64_t rows;  // of a prefill's item, at most
  // The same where an item's keys are at most so many, which are packed at once: then threads can
  // join it, and it need not be small for them to end together.
  int64_t joined_rows, joined_keys;
  int64_t row_multiple;
  int64_t heads;  // of a decode's item
  int64_t items;  // into which the keys of decodes that are left are cut, about
};

// Rows of an item where `rows` are cut into equal items of about `wanted`: each packs all keys, so
// none should be small.
inline int64_t even_rows(int64_t rows, int64_t wanted, int64_t multiple) {
  int64_t items = std::max<int64_t>(1, (rows + wanted / 2) / wanted);
  return round_up((rows + items - 1) / items, multiple);
}

// How many of the next `parts` of a sequence, `keys` each, one item of a decode takes. Between
// items memory is asked for nothing (11 us, 4 % of a part of 8 heads), so the first ones are large;
// they get smaller with what is left, so that threads end together.
inline int64_t parts_of_item(Plan& plan, const Cut& cut, int64_t keys, int64_t parts) {
  int64_t wanted = plan.decode_keys / cut.items / keys;
  int64_t taken = std::min(std::max<int64_t>(1, wanted), parts);
  plan.decode_keys -= taken * keys;
  return taken;
}

template <class Params>
inline void plan_sequence(const Params& p, int64_t batch, const Cut& cut, Plan& plan) {
  const Sequence& s = plan.sequences[batch];
  int64_t rows = s.sq * p.group;
  if (rows == 0) return;
  int64_t first = visible_keys(p, 0, s.sq, s.sk).begin;
  int64_t last = visible_keys(p, s.sq - 1, s.sq, s.sk).end;
  int64_t keys = std::max<int64_t>(1, keys_per_part(p, rows, s.sk)), first_part = first / keys;
  int64_t parts = std::max<int64_t>(1, (last + keys - 1) / keys - first_part);
  int64_t most_rows = std::min(keys, s.sk) <= cut.joined_keys ? cut.joined_rows : cut.rows;
  int64_t row_step = is_decode(rows) ? rows : even_rows(rows, most_rows, cut.row_multiple),
          head_step = is_decode(rows) ? cut.heads : 1;
  for (int64_t part = 0, part_step; part < parts; part += part_step) {
    part_step = is_decode(rows) ? parts_of_item(plan, cut, keys, parts - part) : 1;
    for (int64_t h = 0; h < p.heads_k; h += head_step) {
      for (int64_t r = 0; r < rows; r += row_step) {
        Item item;
        item.batch = batch;
        item.head_begin = h;
        item.head_end = std::min(p.heads_k, h + head_step);
        item.row_begin = r;
        item.row_end = std::min(rows, r + row_step);
        item.key_begin = std::min((first_part + part) * keys, s.sk);
        item.key_end = std::min(item.key_begin + part_step * keys, s.sk);
        item.part = parts > 1 ? plan.part_rows + (part * p.heads_k + h) * rows + r : -1;
        item.part_keys = keys;
        item.part_stride = p.heads_k * rows;
        int64_t products = std::max<int64_t>(item.row_end - r, 8) * (item.head_end - h);
        item.cost = visible_count(p, s, item) * static_cast<double>(products * (p.d + p.dv));
        plan.cost += item.cost;
        plan.items.push_back(item);
      }
    }
  }
  if (parts == 1) return;
  for (int64_t h = 0; h < p.heads_k; ++h) {
    plan.combinations.push_back(
        {batch, h, rows, plan.part_rows + h * rows, p.heads_k * rows, parts});
  }
  plan.part_rows += parts * p.heads_k * rows;
}

// Fills the plan: the longest items first, so that threads end together. `tiles` bound the rows of
// a prefill's item; they are fewer when threads would have nothing to do, and so are a decode's
// heads.
template <class Params>
inline void make_plan(const Params& p, const PrefillTiles& tiles, Plan& plan) {
  plan.clear();
  int64_t rows = 0, pieces = 0, threads = std::max<int64_t>(1, p.num_threads);
  for (int64_t b = 0; b < p.batch; ++b) {
    plan.sequences.push_back(sequence_of(p, b));
    const Sequence& s = plan.sequences.back();
    rows += s.sq * p.heads;
    if (!is_decode(s.sq * p.group)) continue;
    pieces += (s.sk + kDecodeChunk - 1) / kDecodeChunk;
    plan.decode_keys += s.sk;
  }
  Cut cut;
  cut.rows = std::min(tiles.rows, std::max(kRowStep, rows / (4 * threads) / kRowStep * kRowStep));
  cut.joined_rows = std::min(tiles.rows, std::max(kRowStep, rows / threads));
  cut.joined_keys = tiles.block * tiles.blocks;
  cut.row_multiple = tiles.row_multiple;
  // A decode's heads are parted for want of items alone: the longer the run of a token's heads in
  // memory, the faster it is read (2 KiB 1.2 times as fast as 1 KiB, 1.5 times as 512 bytes).
  cut.heads = std::max<int64_t>(1, p.heads_k * pieces / (2 * p.num_threads));
  cut.heads = std::min(p.heads_k, cut.heads);
  cut.items = 2 * p.num_threads;
  for (int64_t b = 0; b < p.batch; ++b) plan_sequence(p, b, cut, plan);
  auto longer = [](const Item& a, const Item& b) { return a.cost > b.cost; };
  if (p.num_threads > 1) std::sort(plan.items.begin(), plan.items.end(), longer);
}

}  // namespace jit_kernel
