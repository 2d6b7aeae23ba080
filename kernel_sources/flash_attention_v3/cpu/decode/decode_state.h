// What every decode keeps of an item: its query rows, their softmax states and sums, and
// where its keys lie.
#pragma once

#include <limits>

#include "flash_attention_v3/cpu/common/epilogue.h"
#include "flash_attention_v3/cpu/common/head_sizes.h"
#include "flash_attention_v3/cpu/common/item.h"
#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/common/query.h"
#include "flash_attention_v3/cpu/decode/decode_sizes.h"
#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

// A block of keys passes all heads before the next: a token's heads lie side by side in memory, so
// that pages are opened once. One block and one head are a step; steps count from 0.
template <class Element, class Math>
struct DecodeState {
  static_assert(kDecodeBlock == DraftMask::kKeys,
                "a word holds the keys of a block that a row sees");
  using Query = QueryOf<Element>;
  using Key = KeyOf<Element>;
  // e4m3 has no loads that are cheap enough to repeat for every row.
  static constexpr bool kHasLoads = !std::is_same<Key, e4m3>::value;
  static constexpr int64_t kBlocks = kStepsAhead + 1;  // located at once

  static constexpr int64_t kFactors = kHasLoads ? 1 : kDecodeBlock;

  // The row pointers of a block of keys: those of head 0, which the offsets of other heads are
  // added to.
  struct Block {
    const Key *k[kDecodeBlock], *v[kDecodeBlock];
    const float *k_factors[kFactors], *v_factors[kFactors];  // the same, where tokens have factors
    int64_t k_steps[2], v_steps[2];  // between rows of the first and second half, 0 where uneven
    int64_t first;                   // the key of row 0
    int64_t from, to;                // rows that are keys to be seen; the others repeat one of them
  };
  struct Head {
    ScoreScale scale;
    float mix;  // q·k is multiplied by it before qv·v is added
  };

  HeadSizes sizes;
  int64_t rows, heads, head_begin;
  int64_t sum_columns;  // of a row of sums
  bool in_place;        // whether whole vectors of keys and values can be read where they are
  Math* q;              // head after head
  float *sums, *spare_row;
  Query* turned;
  float *maxima, *row_sums;  // RowStates: kDecodeRows a head
  Head* head_settings;
  Block* blocks;  // a ring
  int64_t first_key = 0, steps = 0, located = 0;
  int64_t parts = 1, part = 0;  // of the item; the one that is summed
  int64_t part_steps = 0, part_end = 0;
  Interval all, seen[kDecodeRows];  // keys that any of the rows sees, and each
  DraftMask draft;                  // which of them it hides
  int64_t tokens[kDecodeRows];      // of the rows
  int64_t shown = 0;                // the first key that some row sees, where there is a draft mask

  template <class Params>
  DecodeState(const Params& params, const Item& item)
      : sizes(head_sizes<Math>(params)),
        rows(item.row_end - item.row_begin),
        heads(item.head_end - item.head_begin),
        head_begin(item.head_begin),
        sum_columns(sizes.dv) {
    bool exact = (params.only_qv || params.d == sizes.qk) && params.dv == sizes.dv;
    in_place = kHasLoads && exact && (!params.qv || params.dv == sizes.qv);
  }

  bool is_whole(const Block& b) const { return b.from == 0 && b.to == kDecodeBlock; }

  // Whether every row sees the keys of a block that any row sees.
  bool all_see(const Block& b) const {
    return seen[rows - 1].begin <= b.first + b.from && seen[0].end >= b.first + b.to &&
           !draft.covers(b.first + b.to);
  }

  // Which keys of a block row i sees, the first one's in the lowest bit.
  uint32_t seen_of(const Block& b, int64_t i) const {
    const int64_t from = std::max(b.from, seen[i].begin - b.first);
    const int64_t to = std::min(b.to, seen[i].end - b.first);
    uint32_t keys = lowest_bits(to) & ~lowest_bits(from);
    if (draft.covers(b.first + b.to)) keys &= draft.seen(tokens[i], b.first);
    return keys;
  }

  // Row i's scores of a block, `stride` apart, become -inf where it does not see the key.
  void mask_row(const Block& b, int64_t i, float* row, int64_t stride) const {
    const uint32_t keys = seen_of(b, i);
    if (keys == ~uint32_t{0}) return;
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      if (!(keys >> j & 1)) row[j * stride] = -kInfinity;
    }
  }

  // Keys that the draft mask hides from every row are not read: one that is seen stands for them.
  template <class Params>
  __attribute__((noinline)) void skip_hidden(const Params& params, const Sequence& s, Block& b) {
    uint32_t keys = 0;
    for (int64_t i = 0; i < rows; ++i) keys |= seen_of(b, i);
    for (int64_t j = b.from; j < b.to; ++j) {
      if (keys >> j & 1) continue;
      locate_rows(params, s, shown, 1, j, b);
    }
  }

  // Where no row sees any key, the item has none.
  __attribute__((noinline)) void find_shown(const Item& item) {
    for (shown = all.begin; shown < all.end; ++shown) {
      for (int64_t i = 0; i < rows; ++i) {
        if (shown < seen[i].begin || shown >= seen[i].end) continue;
        if (!draft.covers(shown + 1) || (draft.seen(tokens[i], shown) & 1)) return;
      }
    }
    all = {item.key_begin, item.key_begin};
  }

  template <class F>
  void each_state_array(F&& f) {
    int64_t all_rows = heads * rows;
    f(q, all_rows * sizes.depth);
    f(sums, all_rows * sum_columns);
    f(head_settings, heads);
    f(maxima, heads * kDecodeRows);
    f(row_sums, heads * kDecodeRows);
    f(spare_row, sizes.depth);
    f(turned, sizes.depth);
    f(blocks, kBlocks);
  }

  // The item's query rows, settings and keys.
  template <class Params>
  void load(const Params& params, const Sequence& s, const Item& item) {
    all = {item.key_end, item.key_begin};
    draft = draft_mask_of(params, s);
    for (int64_t i = 0; i < rows; ++i) {
      tokens[i] = (item.row_begin + i) / params.group;
      seen[i] = visible_keys(params, tokens[i], s.sq, s.sk);
      all.begin = std::min(all.begin, std::max(seen[i].begin, item.key_begin));
      all.end = std::max(all.end, std::min(seen[i].end, item.key_end));
    }
    if (draft.covers(all.end)) find_shown(item);
    for (int64_t h = 0; h < heads; ++h) {
      int64_t head_k = item.head_begin + h;
      head_settings[h] = {score_scale_of(params, item.batch, head_k),
                          qk_factor(params, item.batch, head_k)};
      for (int64_t i = 0; i < rows; ++i) {
        Math* to = q + (h * rows + i) * sizes.depth;
        QueryRow row(params, head_k, item.row_begin + i);
        load_query(params, s, sizes, row, to, spare_row, turned);
      }
    }
    first_key = item.key_begin + (all.begin - item.key_begin) / kDecodeBlock * kDecodeBlock;
    int64_t keys = std::max<int64_t>(0, all.end - first_key);
    steps = (keys + kDecodeBlock - 1) / kDecodeBlock * heads;
    int64_t item_keys = item.key_end - item.key_begin;
    parts = std::max<int64_t>(1, (item_keys + item.part_keys - 1) / item.part_keys);
    part_steps = item.part_keys / kDecodeBlock * heads;
    part_end = part_steps - (first_key - item.key_begin) / kDecodeBlock * heads;
    begin_part();
  }

  // A part begins: no key of it is seen yet.
  void begin_part() {
    std::memset(sums, 0, static_cast<size_t>(heads * rows * sum_columns) * sizeof(float));
    std::fill_n(maxima, heads * kDecodeRows, -kInfinity);
    std::fill_n(row_sums, heads * kDecodeRows, 0.0f);
  }

  // To be called before each step's softmax, when the values of all earlier steps are added:
  // write() is called for each part that has ended.
  template <class Write>
  void end_parts(int64_t step, Write&& write) {
    while (step >= part_end && part + 1 < parts) {
      write();
      ++part;
      part_end += part_steps;
      begin_part();
    }
  }
  template <class Write>
  void end_last_parts(Write&& write) {
    end_parts(std::numeric_limits<int64_t>::max(), write);
    write();
  }

  // Asks for the first line of pages of a block to come, those of `count` rows: a core's
  // own prefetcher, and its walk to a page's address, begin there. 1 to 2 % of a decode from
  // pages of 16 tokens.
  template <class Params>
  void open_pages(const Params& params, const Block& b, int64_t first, int64_t count) const {
    auto page = [](const Key* row) { return reinterpret_cast<uintptr_t>(row) / kPageBytes; };
    for (int64_t j = first; j < std::min(kDecodeBlock, first + count); ++j) {
      if (j > 0 && page(b.v[j]) == page(b.v[j - 1])) continue;
      __builtin_prefetch(b.v[j] + head_begin * params.v.head, 0, 2);
      if (!params.only_qv) __builtin_prefetch(b.k[j] + head_begin * params.k.head, 0, 2);
    }
  }

  template <class Params>
  void locate_until(const Params& params, const Sequence& s, int64_t last) {
    for (; located <= last; ++located) {
      int64_t at = first_key + located * kDecodeBlock;
      locate(params, s, at, std::max<int64_t>(0, all.begin - at),
             std::min(kDecodeBlock, all.end - at), blocks[located % kBlocks]);
    }
  }

  // Row pointers of keys key .. key + count - 1, to places of a block from `at` on.
  template <class Params>
  void locate_rows(const Params& params, const Sequence& s, int64_t key, int64_t count, int64_t at,
                   Block& b) const {
    key_rows(params, params.v, s, key, count, 0, b.v + at);
    if (!params.only_qv) key_rows(params, params.k, s, key, count, 0, b.k + at);
    if constexpr (!kHasLoads) {
      if (params.k_scale)
        key_rows<const float>(params, params.k_scale, s, key, count, 0, b.k_factors + at);
      if (params.v_scale)
        key_rows<const float>(params, params.v_scale, s, key, count, 0, b.v_factors + at);
    }
  }

  // The factors of a block's key and value in place j of a head, 1 where tokens have none.
  template <class Params>
  float k_factor(const Params& params, const Block& b, int64_t j, int64_t head) const {
    if constexpr (!kHasLoads) {
      if (params.k_scale) return b.k_factors[j][head * params.k_scale.head];
    }
    return 1.0f;
  }
  template <class Params>
  float v_factor(const Params& params, const Block& b, int64_t j, int64_t head) const {
    if constexpr (!kHasLoads) {
      if (params.v_scale) return b.v_factors[j][head * params.v_scale.head];
    }
    return 1.0f;
  }

  // Row pointers of keys first + from .. first + to - 1.
  template <class Params>
  void locate(const Params& params, const Sequence& s, int64_t first, int64_t from, int64_t to,
              Block& block) {
    block.first = first;
    block.from = from;
    block.to = to;
    int64_t key = first + from, count = to - from;
    locate_rows(params, s, key, count, from, block);
    if (draft.covers(first + to)) skip_hidden(params, s, block);
    for (int64_t j = 0; j < kDecodeBlock; ++j) {  // masked keys point at one that may be read
      if (j >= from && j < to) continue;
      block.k[j] = params.only_qv ? nullptr : block.k[from];
      block.v[j] = block.v[from];
      if constexpr (!kHasLoads) {
        block.k_factors[j] = block.k_factors[from];
        block.v_factors[j] = block.v_factors[from];
      }
    }
    for (int half = 0; half < 2; ++half) {
      constexpr int64_t kHalf = kDecodeBlock / 2;
      block.k_steps[half] = params.only_qv ? 0 : even_step(block.k + half * kHalf, kHalf);
      block.v_steps[half] = even_step(block.v + half * kHalf, kHalf);
    }
  }

  // Elements from each row to the next, or 0 where that is not the same for all.
  static int64_t even_step(const Key* const* rows, int64_t count) {
    int64_t step = rows[1] - rows[0];
    bool even = step > 0;
    for (int64_t j = 2; j < count; ++j) even &= rows[j] - rows[j - 1] == step;
    return even ? step : 0;
  }

  // out and lse of an item's i-th row, or its part: its sums, and the sum of its probabilities.
  template <class Params>
  void write(const Params& params, const Sequence& s, const Item& item, const Partials& partials,
             int64_t i, const float* sum, float row_sum) {
    int64_t h = i / rows;
    RowState state{maxima[h * kDecodeRows + i % rows], row_sum};
    if (item.part < 0) {
      QueryRow row(params, head_begin + h, item.row_begin + i % rows);
      return write_row(params, s, item.batch, head_begin + h, row, head_settings[h].scale, sum,
                       state);
    }
    int64_t to = item.part + part * item.part_stride + i;
    std::memcpy(partials.sums + to * sizes.dv, sum, static_cast<size_t>(sizes.dv) * sizeof(float));
    partials.states[to] = state;
  }
};

}  // namespace jit_kernel
