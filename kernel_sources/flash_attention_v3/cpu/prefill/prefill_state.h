// What a prefill keeps of an item, whichever way its tiles are computed.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "flash_attention_v3/cpu/common/amx.h"
#include "flash_attention_v3/cpu/common/epilogue.h"
#include "flash_attention_v3/cpu/common/item.h"
#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/common/query.h"
#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/prefill/gemm.h"
#include "flash_attention_v3/cpu/prefill/pack.h"
#include "flash_attention_v3/cpu/prefill/prefill_tiles.h"
#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

// The error of a sum of floats grows with the root of its length, and large float32 scores leave
// none to spare: they are summed in pieces, which cost 2 to 3 % when they are half as long. Beside
// bf16's own rounding it does not show.
template <class Math>
constexpr int64_t score_piece(int64_t depth) {
  if (!std::is_same<Math, float>::value) return depth;
  return depth > 128 ? 32 : 64;
}

// An item's rows, the packed keys, and the products that a tile of rows has with a block of them.
// Both ways to compute a tile beside the mainloop's, AMX tiles (mainloop_prefill_amx.h) and
// integers (prefill_i16.h), work on this and know nothing of the mainloop.
template <class Element, class Math>
struct PrefillState {
  using Query = QueryOf<Element>;
  using Key = KeyOf<Element>;
  static constexpr bool kHasFactors = std::is_same<Key, e4m3>::value;
  static constexpr int64_t kTileRows = kTileRowsOf<Math>;
  static constexpr bool kI16 = kPacksIntegers<Element, Math>;

#ifdef JIT_KERNEL_AMX
  static constexpr bool kTiles = sizeof(Math) == 2;  // fp16 only where amx_fp16_allowed()
#else
  static constexpr bool kTiles = false;
#endif

  // Of a tile of rows: it is this thread's, its queries are loaded, its sums hold something, they
  // are written.
  enum class TileState : char { kNew, kTaken, kLoaded, kBegun, kWritten };

  HeadSizes sizes;
  PrefillTiles tiles;
  bool once;  // whether all keys are packed at once
  // Rows held at once: all, or where all keys are packed at once those of two tiles (the one that
  // is worked on and the next, whose scores are begun) and of one.
  int64_t q_rows, sum_rows;
  Math *q, *keys, *values, *p, *spare;
  float *scores, *sums, *spare_row;
  Query* turned;
  const Key **key_pointers, **value_pointers;
  float *key_factors, *value_factors;  // of each packed key, where tokens have some
  bool has_key_factors, has_value_factors;
  float *maxima, *row_sums;          // each row's RowState
  int64_t *begins, *ends;            // each row's visible keys
  DraftMask draft;                   // which of them it hides
  int64_t first_row = 0, group = 1;  // of the item, and rows of a token
  TileState* states;                 // of each tile of rows
  Math** queries;                    // of each tile that is loaded
  int64_t loads = 0;
  const char** next_queries;  // the rows of the tile that begins at next_row, to be loaded next
  int64_t next_row = -1;
  int64_t asked = kTileRows, query_bytes = 0;  // of these rows, and the bytes of each
#ifdef JIT_KERNEL_AMX
  AmxTiles amx;
#endif
  int64_t d, dv;                   // not padded; d is 0 where only qv counts
  int64_t packed = 0, hidden = 0;  // keys; the first ones of them that no row of the item sees
  enum class Finite : char { kUnknown, kYes, kNo };
  Finite* finite;  // of each kDepth packed keys, whether their values are (edge_values.h)

  int64_t score_stride() const { return tiles.block + simd::kLanes; }  // off the powers of two

  // Rows of an item's arrays: whole tiles of them, and a vector that may overhang.
  static int64_t padded_rows(int64_t rows) { return round_up(rows, kTileRows) + simd::kLanes; }

  // Calls f with each array and its length (Scratch::take_all).
  template <class F>
  void each_state_array(int64_t rows, F&& f) {
    const int64_t padded = padded_rows(rows), block = tiles.block;
    f(q, q_rows * sizes.depth);
    f(sums, sum_rows * sizes.dv);
    f(maxima, padded);
    f(row_sums, padded);
    f(begins, padded);
    f(ends, padded);
    f(states, padded / kTileRows + 1);
    f(queries, padded / kTileRows + 1);
    f(next_queries, kTileRows);
    f(keys, packed_keys() * sizes.depth);
    f(values, packed_keys() * sizes.dv);
    f(scores, kTileRows * std::max(score_stride(), 3 * kDepth));
    f(p, kTileRows * block);
    f(spare, simd::kLanes * std::max(std::max(sizes.qk, sizes.qv), sizes.dv));
    f(spare_row, sizes.depth);
    f(turned, sizes.depth);
    f(key_pointers, packed_keys());
    f(value_pointers, packed_keys());
    f(key_factors, kHasFactors ? packed_keys() : 0);
    f(value_factors, kHasFactors ? packed_keys() : 0);
    f(finite, packed_keys() / kDepth);
  }

  int64_t packed_keys() const { return tiles.block * tiles.blocks; }  // at once

  template <class Params>
  PrefillState(const Params& params, const Item& item)
      : sizes(head_sizes<Math>(params)),
        tiles(prefill_tiles<std::conditional_t<kI16, i16, Math>>(sizes)),
        has_key_factors(params.k_scale),
        has_value_factors(params.v_scale),
        d(params.only_qv ? 0 : params.d),
        dv(params.dv) {
    int64_t rows = item.row_end - item.row_begin;
    once = item.key_end - item.key_begin <= packed_keys();
    q_rows = once ? 2 * kTileRows : round_up(rows, kTileRows);
    sum_rows = once ? kTileRows : q_rows;
  }

  Math* q_of(int64_t row) const { return queries[row / kTileRows]; }
  float* sums_of(int64_t row) const { return sums + row % sum_rows * sizes.dv; }
  TileState& state_of(int64_t row) const { return states[row / kTileRows]; }
  bool has_sums(int64_t row) const { return state_of(row) == TileState::kBegun; }

  template <class Params>
  void begin_rows(const Params& params, const Sequence& s, const Item& item) {
    int64_t rows = item.row_end - item.row_begin;
    draft = draft_mask_of(params, s);
    first_row = item.row_begin;
    group = params.group;
    QueryRow at(params, item.head_begin, item.row_begin);
    for (int64_t i = 0; i < rows; ++i, at.next()) {
      Interval seen = visible_keys(params, at.token, s.sq, s.sk);
      begins[i] = std::min(std::max(seen.begin, item.key_begin), item.key_end);
      ends[i] = std::max(begins[i], std::min(seen.end, item.key_end));
      maxima[i] = -kInfinity;
      row_sums[i] = 0.0f;
    }
    for (int64_t i = rows; i < round_up(rows, kTileRows); ++i) {  // rows that only fill up a tile
      maxima[i] = row_sums[i] = 0.0f;
    }
    for (int64_t i = 0; i < rows; i += kTileRows) state_of(i) = TileState::kNew;
  }

  // The queries of a tile from row `row` on.
  template <class Params>
  void load_queries(const Params& params, const Sequence& s, const Item& item, int64_t row) {
    int64_t rows = std::min(kTileRows, item.row_end - item.row_begin - row);
    Math* to = q + (once ? loads++ % 2 * kTileRows : row) * sizes.depth;
    queries[row / kTileRows] = to;
    if (!params.only_qv) {
      if (row != next_row) find_queries(params, s, item, row);
      while (asked < kTileRows) ask_for_queries();
    }
    QueryRow at(params, item.head_begin, item.row_begin + row);
    for (int64_t i = 0; i < rows; ++i, to += sizes.depth, at.next()) {
      load_query(params, s, sizes, at, to, spare_row, turned);
    }
    // Rows that only fill up a tile: zeros, so that no NaN slows them down.
    std::memset(static_cast<void*>(to), 0,
                static_cast<size_t>((kTileRows - rows) * sizes.depth) * sizeof(Math));
    state_of(row) = TileState::kLoaded;
    if (kTiles && !params.only_qv) find_queries(params, s, item, row - kTileRows);
  }

  // The queries of the tile from row `row` on are to be asked for, where there is one: by the AMX
  // pipeline while it computes, and the rest when they are loaded, all at once. That is 5 to
  // 8 % of a call of 512 tokens whose inputs come from memory, 2 % of a causal one of 2048.
  template <class Params>
  void find_queries(const Params& params, const Sequence& s, const Item& item, int64_t row) {
    next_row = row;
    asked = kTileRows;
    if (row < 0) return;
    const int64_t rows = std::min(kTileRows, item.row_end - item.row_begin - row);
    asked = kTileRows - rows;
    query_bytes = params.d * static_cast<int64_t>(sizeof(Query));
    QueryRow at(params, item.head_begin, item.row_begin + row);
    for (int64_t i = asked; i < kTileRows; ++i, at.next()) {
      const Query* q = params.q.at(s.q_batch, s.q_begin + at.token, at.head);
      next_queries[i] = reinterpret_cast<const char*>(q);
    }
  }

  // Asks for one row more of them.
  inline __attribute__((always_inline)) void ask_for_queries() {
    if (asked == kTileRows) return;
    const char* row = next_queries[asked++];
    __builtin_prefetch(row, 0, 2);
    __builtin_prefetch(row + kCacheLine, 0, 2);
#pragma GCC unroll 1
    for (int64_t i = 2 * kCacheLine; i < query_bytes; i += 2 * kCacheLine) {
      __builtin_prefetch(row + i, 0, 2);
      __builtin_prefetch(row + i + kCacheLine, 0, 2);
    }
  }

  // What becomes of the sums of a tile from row `row` on.
  template <class Params>
  void write_tile(const Params& params, const Sequence& s, const Item& item, const Partials& parts,
                  const ScoreScale& scale, int64_t row) {
    int64_t end = std::min(row + kTileRows, item.row_end - item.row_begin);
    QueryRow at(params, item.head_begin, item.row_begin + row);
    for (int64_t i = row; i < end; ++i, at.next()) {
      const float* sum = sums_of(i);
      RowState state{maxima[i], row_sums[i]};
      if (item.part < 0) {
        write_row(params, s, item.batch, item.head_begin, at, scale, sum, state);
      } else {
        std::memcpy(parts.sums + (item.part + i) * sizes.dv, sum,
                    static_cast<size_t>(sizes.dv) * sizeof(float));
        parts.states[item.part + i] = state;
      }
    }
    state_of(row) = TileState::kWritten;
  }

  // The block that begins `at` keys after the first of those that are packed.
  void pack_block(int64_t at) {
    const PackedRows which = rows_of_block(at, has_key_factors ? key_factors : nullptr);
    const PackedRows of_values = rows_of_block(at, has_value_factors ? value_factors : nullptr);
    const int64_t count = which.count, padded = round_up(count, kDepth);
    const int64_t panel = simd::kLanes * sizes.depth;
    Math *to_keys = keys + at * sizes.depth, *to_values = values + at * sizes.dv;
    if (sizes.qk) {
      pack_keys(key_pointers + at, which, d, sizes.qk, to_keys, panel, spare);
      fill_panels(count, padded, sizes.qk, to_keys, panel);
    }
    if (sizes.qv) {
      Math* after = to_keys + simd::kLanes * sizes.qk;
      pack_keys(value_pointers + at, of_values, dv, sizes.qv, after, panel, spare);
      fill_panels(count, padded, sizes.qv, after, panel);
    }
    pack_values(value_pointers + at, of_values, padded, dv, sizes.dv, to_values,
                simd::kLanes * tiles.block, spare);
    std::fill_n(finite + at / kDepth, padded / kDepth, Finite::kUnknown);
  }

  // The rows of the block that begins `at` keys after the first of those that are packed.
  PackedRows rows_of_block(int64_t at, const float* factors = nullptr) const {
    const int64_t left = packed - at;
    return {std::max<int64_t>(0, hidden - at), std::min(tiles.block, left), left,
            factors ? factors + at : nullptr};
  }

  // Zeros in the panels that hold no key.
  void fill_panels(int64_t count, int64_t padded, int64_t depth, Math* out, int64_t panel) {
    for (int64_t j = round_up(count, simd::kLanes); j < padded; j += simd::kLanes) {
      std::memset(static_cast<void*>(out + j / simd::kLanes * panel), 0,
                  static_cast<size_t>(simd::kLanes * depth) * sizeof(Math));
    }
  }

  // Rows row .. row + rows - 1 against keys from .. from + columns - 1 of a packed block.
  struct Tile {
    int64_t row, rows;
    int64_t first, at;  // the block's first key, and how many are packed before it
    int64_t from, columns;
    Math* p;
    float factors[kTileRows];  // of the rows' sums, before P·V is added
  };

  // The part that the rows from `row` on, of `rows`, see of the block that begins `at` keys after
  // the first of those that are packed, in whole steps; columns is 0 when they see none of it.
  void set_tile(int64_t row, int64_t rows, int64_t first, int64_t at, int64_t count, Tile& t) {
    t.row = row;
    t.rows = std::min(kTileRows, rows - row);
    t.first = first + at;
    t.at = at;
    constexpr int64_t kChunk = kI16 ? kI16Chunk : kDepth;
    t.from = std::max<int64_t>(0, begins[row] - t.first) / kChunk * kChunk;
    int64_t seen = ends[row + t.rows - 1] - t.first;
    int64_t to = round_up(std::min(std::min(tiles.block, count - at), seen), kDepth);
    t.columns = std::max<int64_t>(0, to - t.from);
    if constexpr (std::is_same<Math, float>::value) {
      t.p = scores;  // replaced in place
    } else {
      t.p = p;
    }
  }

  GemmArgs<Math> score_args(const Tile& t) const {
    constexpr int64_t kLanes = simd::kLanes;
    return {q_of(t.row),          sizes.depth, keys + (t.at + t.from) * sizes.depth,
            kLanes * sizes.depth, scores,      score_stride(),
            sizes.depth,          false,       score_piece<Math>(sizes.depth)};
  }

  GemmArgs<Math> value_args(const Tile& t) const {
    constexpr int64_t kLanes = simd::kLanes;
    int64_t stride = std::is_same<Math, float>::value ? score_stride() : tiles.block;
    return {t.p,
            stride,
            values + t.at * sizes.dv + t.from * kLanes,
            kLanes * tiles.block,
            sums_of(t.row),
            sizes.dv,
            t.columns,
            has_sums(t.row),
            t.columns,
            t.from};
  }

  // Of up to kLanes rows of a tile from row i on; the first one's probabilities begin at `first`.
  template <class Kind>
  SoftmaxArgs<Kind> softmax_args(Tile& t, int64_t i, Kind* first, int64_t p_stride) const {
    const int64_t row = t.row + i, stride = score_stride();
    return {scores + i * stride, stride,       first,          p_stride,
            t.columns,           maxima + row, row_sums + row, t.factors + i};
  }

  int64_t token_of(int64_t row) const { return (first_row + row) / group; }

  // The scores of a tile that its row i does not see become -inf.
  void mask_row(const Tile& t, int64_t i, float* row) const {
    const int64_t start = t.first + t.from;
    mask_scores(row, seen_of(t, i), t.columns);
    if (draft.covers(start + t.columns)) {
      mask_drafts(draft, token_of(t.row + i), start, row, t.columns);
    }
  }

  // Whether row i of a tile sees one of its columns.
  bool sees(const Tile& t, int64_t i, int64_t column) const {
    const Interval seen = seen_of(t, i);
    if (column < seen.begin || column >= seen.end) return false;
    const int64_t key = t.first + t.from + column;
    return !draft.covers(key + 1) || (draft.seen(token_of(t.row + i), key) & 1);
  }

  // How many keys of the item a row sees.
  int64_t count_seen(int64_t row) const {
    int64_t count = ends[row] - begins[row];
    if (!draft.covers(ends[row])) return count;
    for (int64_t key = begins[row]; key < ends[row]; key += DraftMask::kKeys) {
      const uint32_t hidden = ~draft.seen(token_of(row), key) & lowest_bits(ends[row] - key);
      count -= __builtin_popcount(hidden);
    }
    return count;
  }

  // Which of the keys first .. first + 31 the draft mask shows to some row of a tile.
  uint32_t drafts_of(const Tile& t, int64_t first) const {
    uint32_t seen = 0;
    for (int64_t i = 0; i < t.rows; ++i) seen |= draft.seen(token_of(t.row + i), first);
    return seen;
  }

  // Which of a tile's columns its row i sees, but for a draft mask.
  Interval seen_of(const Tile& t, int64_t i) const {
    const int64_t start = t.first + t.from;
    return {begins[t.row + i] - start, ends[t.row + i] - start};
  }

  // The values' product to come: its sums, and how it adds to them.
  GemmArgs<Math> begin_values(const Tile& t) {
    GemmArgs<Math> g = value_args(t);
    begin_sums(t);
    return g;
  }

  // Before values are added to a tile's sums; returns whether there are some.
  bool begin_sums(const Tile& t) {
    const bool has_some = has_sums(t.row);
    if (has_some) scale_sums(t);
    state_of(t.row) = TileState::kBegun;
    return has_some;
  }

  void scale_sums(const Tile& t) {
    for (int64_t i = 0; i < t.rows; ++i) {
      if (t.factors[i] != 1.0f) simd::scale_floats(sums_of(t.row + i), sizes.dv, t.factors[i]);
    }
  }

  // Calls f(first row, rows, keys) for a tile's rows: for all at once, or where a mask ends some
  // rows' keys early for a few at a time, with as many keys as they see: 2 % of a causal prefill.
  template <class F>
  void each_part(const Tile& t, F&& f) {
    constexpr int64_t kRows = 24, kKeys = kI16 ? kDepth : simd::kLanes * kStep<Math>;
    const int64_t start = t.first + t.from;
    if (in_tiles() || ends[t.row] >= start + t.columns) return f(0, t.rows, t.columns);
    for (int64_t i = 0; i < t.rows; i += kRows) {
      int64_t rows = std::min(kRows, t.rows - i), seen = ends[t.row + i + rows - 1] - start;
      f(i, rows, std::min(t.columns, round_up(std::max<int64_t>(1, seen), kKeys)));
    }
  }

  // Whether products are AMX tiles, which have 32 rows.
  bool in_tiles() const {
#ifdef JIT_KERNEL_AMX
    return kTiles && amx.active();
#else
    return false;
#endif
  }
};

}  // namespace jit_kernel
