// A decode that reads memory nearly in its own order, which decides how fast it is read.
//
// A block of keys passes all heads, a few keys of each at a time; then its values do. What is read
// is asked for twice: in the order of memory well ahead, and once more shortly before, as a core
// drops requests when too many are under way.
#pragma once

#include "flash_attention_v3/cpu/decode/decode_state.h"
#include "flash_attention_v3/cpu/decode/run_prefetch.h"

namespace jit_kernel {

// Keys whose values are added at once, head after head. Sums are loaded and stored once for them;
// but with 16 keys memory is read at nine tenths of the rate with 8, as fewer lie side by side.
constexpr int64_t kValueKeys = 8;

// How many rows ahead lines are asked for a second time: 16 KiB where a token has 2 KiB.
constexpr int64_t kRowsAgain = 8;

template <class Element, class Math>
struct DecodeInOrder : DecodeState<Element, Math> {
  using State = DecodeState<Element, Math>;
  using Block = typename State::Block;
  using Key = typename State::Key;
  using State::blocks, State::kBlocks, State::sum_columns, State::head_begin, State::steps;
  using State::sizes, State::heads, State::rows, State::seen, State::in_place;
  static_assert(kBlocks == 3, "a block and two to come: open_pages()");
  static constexpr int64_t kBytesAhead = 32 << 10;

  // Rows of a block's keys, of its values, and of the ones read next, so that each has one
  // kRowsAgain rows later. Elements in place, or one head converted.
  const void** near;
  Math *keys, *values;      // a head's, converted
  Math* no_value;           // a row of zeros
  bool row_by_row = false;  // whether each row has values of its own: see add_block()
  int64_t value_stride;
  RunPrefetch<Block, kBlocks> ahead;
  int64_t key_bytes, value_bytes;  // of one head

  // Heads whose rows `near` holds: head h of the keys begins h k_heads after k_offset.
  struct Heads {
    int64_t begin, end;
    int64_t k_offset, k_head, v_offset, v_head;

    int64_t k(int64_t head) const { return k_offset + head * k_head; }
    int64_t v(int64_t head) const { return v_offset + head * v_head; }
  };

  // A row of sums has a multiple of `columns` columns.
  template <class Params>
  DecodeInOrder(const Params& params, const Item& item, int64_t columns) : State(params, item) {
    sum_columns = round_up(sizes.dv, columns);
    value_stride = std::max(sum_columns, sizes.qv);
    in_place = in_place && sum_columns == sizes.dv;
  }

  template <class F>
  void each_array_in_order(F&& f) {
    this->each_state_array(f);
    f(near, 3 * kDecodeBlock);
    f(keys, kDecodeBlock * sizes.qk);
    f(values, kDecodeBlock * value_stride);
    f(no_value, value_stride);
  }

  template <class Key>
  const Key* const* keys_from(int64_t key) const {
    return reinterpret_cast<const Key* const*>(near) + key;
  }
  template <class Key>
  const Key* const* values_from(int64_t key) const {
    return keys_from<Key>(kDecodeBlock + key);
  }

  template <class Params>
  Heads find_heads(const Params& params, const Block& block, const Block& next) {
    std::copy_n(block.k, kDecodeBlock, near);
    std::copy_n(block.v, kDecodeBlock, near + kDecodeBlock);
    std::copy_n(params.only_qv ? next.v : next.k, kDecodeBlock, near + 2 * kDecodeBlock);
    const int64_t k = params.k.head, v = params.v.head;
    return {0, heads, head_begin * k, k, head_begin * v, v};
  }

  // One head's keys and values; those that no row sees become zeros.
  template <class Params>
  Heads convert_head(const Params& params, const Block& block, int64_t head) {
    const int64_t at = head_begin + head;
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      Math *k = keys + j * sizes.qk, *v = values + j * value_stride;
      const bool is_seen = j >= block.from && j < block.to;
      near[j] = near[2 * kDecodeBlock + j] = k;
      near[kDecodeBlock + j] = v;
      if (!params.only_qv) {
        const Key* from = block.k[j] + at * params.k.head;
        convert_row<Math>(from, k, is_seen ? params.d : 0, sizes.qk,
                          is_seen ? this->k_factor(params, block, j, at) : 1.0f);
      }
      const Key* from = block.v[j] + at * params.v.head;
      convert_row<Math>(from, v, is_seen ? params.dv : 0, value_stride,
                        is_seen ? this->v_factor(params, block, j, at) : 1.0f);
    }
    return {head, head + 1, 0, 0, 0, 0};
  }

  template <class Params>
  void look_ahead_in_order(const Params& params) {
    constexpr int64_t kSize = sizeof(Key);
    const int64_t k = params.k.head * kSize, v = params.v.head * kSize;
    key_bytes = params.only_qv ? 0 : params.d * kSize;
    value_bytes = params.dv * kSize;
    ahead = {blocks,
             {{head_begin * k, head_begin * v},
              {params.d * kSize, value_bytes},
              {k, v},
              heads,
              !params.only_qv}};
  }

  // The values of a block whose scores are made: kValueKeys keys of all heads, then the next.
  // softmax(head) is called before a head's first ones, add(head, key, begin, end) for those from
  // `key` on and the rows from `begin` to `end`.
  //
  // A probability of 0 times a value that is not finite would be NaN: where a block has one, and a
  // row that does not see its key, each row is added by itself, with zeros for what it does not
  // see.
  template <class Softmax, class Add>
  void add_block(const Block& block, const Heads& of, Softmax&& softmax, Add&& add) {
    if (row_by_row) {
      softmax(of.begin);
      std::fill_n(no_value, value_stride, Math{});
      for (int64_t i = 0; i < rows; ++i) {
        const uint32_t keys = this->seen_of(block, i);
        for (int64_t j = 0; j < kDecodeBlock; ++j) {
          near[kDecodeBlock + j] = keys >> j & 1 ? values + j * value_stride : no_value;
        }
        for (int64_t key = 0; key < kDecodeBlock; key += kValueKeys) add(of.begin, key, i, i + 1);
      }
      return;
    }
    for (int64_t key = 0; key < kDecodeBlock; key += kValueKeys) {
      for (int64_t h = of.begin; h < of.end; ++h) {
        if (key == 0) softmax(h);
        add(h, key, 0, rows);
      }
    }
  }

  // Calls kernel.attend_heads<Key>(block, heads) for all heads of block after block, and write()
  // when a part has ended. A block whose keys not every row sees is converted, too, to clear what
  // is not seen.
  template <class Kernel, class Params, class Write>
  void run_blocks(Kernel& kernel, const Params& params, const Sequence& s, Write&& write) {
    look_ahead_in_order(params);
    const int64_t count = steps / heads;
    for (int64_t b = 0; b < count; ++b) {
      this->locate_until(params, s, std::min(count - 1, b + kBlocks - 1));
      ahead.set_located(this->located);
      if (b == 0) ahead.ask(kBytesAhead);
      if (b + 2 < count) this->open_pages(params, blocks[(b + 2) % kBlocks], 0, kDecodeBlock);
      this->end_parts(b * heads, write);
      const Block &block = blocks[b % kBlocks],
                  &next = blocks[std::min(count - 1, b + 1) % kBlocks];
      const bool is_edge = !this->all_see(block);
      if (in_place && this->is_whole(block) && !is_edge) {
        kernel.template attend_heads<Key>(block, find_heads(params, block, next));
        continue;
      }
      for (int64_t h = 0; h < heads; ++h) {
        const Heads of = convert_head(params, block, h);
        row_by_row = is_edge && !are_finite(values, kDecodeBlock * value_stride);
        kernel.template attend_heads<Math>(block, of);
        row_by_row = false;
      }
    }
    this->end_last_parts(write);
  }
};

}  // namespace jit_kernel
