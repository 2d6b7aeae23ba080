// Many query rows against packed blocks of keys: scores, softmax and P·V of a block while it is in
// cache. Of blocks that are packed together a tile of rows takes one after the other, so its sums
// stay in L1; where these are all of the keys, no other tile's are kept.
#pragma once

#include "flash_attention_v3/cpu/common/epilogue.h"
#include "flash_attention_v3/cpu/common/item.h"
#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/query.h"
#include "flash_attention_v3/cpu/prefill/mainloop_prefill_amx.h"
#include "flash_attention_v3/cpu/prefill/pack.h"
#include "flash_attention_v3/cpu/prefill/prefill_i16.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// The error of a sum of floats grows with the root of its length, and large float32 scores leave
// none to spare: they are summed in pieces, which cost 2 to 3 % when they are half as long. Beside
// bf16's own rounding it does not show.
template <class Math>
constexpr int64_t score_piece(int64_t depth) {
  if (!std::is_same<Math, float>::value) return depth;
  return depth > 128 ? 32 : 64;
}

template <class Element, class Math = MathOf<Element>>
struct Prefill {
  static constexpr int64_t kTileRows = kTileRowsOf<Math>;

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
  Element* turned;
  const Element **key_rows_, **value_rows;
  float *maxima, *row_sums;  // each row's RowState
  int64_t *begins, *ends;    // each row's visible keys
  TileState* states;         // of each tile of rows
  Math** queries;            // of each tile that is loaded
  int64_t loads = 0;
  const char** next_queries;  // the rows of the tile that begins at next_row, to be loaded next
  int64_t next_row = -1;
  int64_t asked = kTileRows, query_bytes = 0;  // of these rows, and what there is of each
#ifdef JIT_KERNEL_AMX
  AmxTiles amx;
#endif
  Integers<Element, Math> integers;
  static constexpr bool kI16 = Integers<Element, Math>::kAreUsed;
  int64_t d, dv;       // not padded; d is 0 where only qv counts
  int64_t packed = 0;  // keys
  float mix = 1.0f;    // what q·k is multiplied by before qv·v is added

  int64_t score_stride() const { return tiles.block + simd::kLanes; }  // off the powers of two

  // Calls f with each array and its length: once to add up sizes, once to take them.
  template <class F>
  void each_array(int64_t rows, F&& f) {
    int64_t padded = round_up(rows, kTileRows) + simd::kLanes, block = tiles.block;
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
    f(key_rows_, packed_keys());
    f(value_rows, packed_keys());
    if constexpr (kI16) integers.each_array(*this, padded, f);
  }

  int64_t packed_keys() const { return tiles.block * tiles.blocks; }  // at once

  template <class Params>
  Prefill(const Params& params, const Item& item, Scratch& scratch)
      : sizes(head_sizes<Math>(params)),
        tiles(prefill_tiles<std::conditional_t<kI16, i16, Math>>(sizes)),
        integers(params, sizes),
        d(params.only_qv ? 0 : params.d),
        dv(params.dv) {
    int64_t rows = item.row_end - item.row_begin;
    once = item.key_end - item.key_begin <= packed_keys();
    q_rows = once ? 2 * kTileRows : round_up(rows, kTileRows);
    sum_rows = once ? kTileRows : q_rows;
    scratch.take_all([&](auto&& f) { each_array(rows, f); });
  }

  Math* q_of(int64_t row) const { return queries[row / kTileRows]; }
  float* sums_of(int64_t row) const { return sums + row % sum_rows * sizes.dv; }
  TileState& state_of(int64_t row) const { return states[row / kTileRows]; }
  bool has_sums(int64_t row) const { return state_of(row) == TileState::kBegun; }

  template <class Params>
  void begin_rows(const Params& params, const Sequence& s, const Item& item) {
    int64_t rows = item.row_end - item.row_begin;
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
  void load_tile(const Params& params, const Sequence& s, const Item& item, int64_t row) {
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
    if constexpr (kI16) {
      if (integers.on) integers.load_tile(*this, row, rows);
    }
    if (kTiles && !params.only_qv) find_queries(params, s, item, row - kTileRows);
  }

  // The queries of the tile from row `row` on are to be asked for, where there is one: by the AMX
  // pipeline while it computes, and what is left when they are loaded, all at once. That is 5 to
  // 8 % of a call of 512 tokens whose inputs come from memory, 2 % of a causal one of 2048.
  template <class Params>
  void find_queries(const Params& params, const Sequence& s, const Item& item, int64_t row) {
    next_row = row;
    asked = kTileRows;
    if (row < 0) return;
    const int64_t rows = std::min(kTileRows, item.row_end - item.row_begin - row);
    asked = kTileRows - rows;
    query_bytes = params.d * static_cast<int64_t>(sizeof(Element));
    QueryRow at(params, item.head_begin, item.row_begin + row);
    for (int64_t i = asked; i < kTileRows; ++i, at.next()) {
      const Element* q = params.q.at(s.q_batch, s.q_begin + at.token, at.head);
      next_queries[i] = reinterpret_cast<const char*>(q);
    }
  }

  // Asks for one row more of them.
  inline __attribute__((always_inline)) void ask_for_queries() {
    if (asked == kTileRows) return;
    const char* row = next_queries[asked++];
    __builtin_prefetch(row, 0, 2);
    __builtin_prefetch(row + 64, 0, 2);
#pragma GCC unroll 1
    for (int64_t i = 128; i < query_bytes; i += 128) {
      __builtin_prefetch(row + i, 0, 2);
      __builtin_prefetch(row + i + 64, 0, 2);
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

  // The keys first .. first + count - 1, block after block.
  template <class Params>
  void pack(const Params& params, const Sequence& s, int64_t head_k, int64_t first, int64_t count) {
    if (!params.only_qv) key_rows(params, params.k, s, first, count, head_k, key_rows_);
    key_rows(params, params.v, s, first, count, head_k, value_rows);
    packed = count;
    for (int64_t at = 0; at < count; at += tiles.block) {
      if constexpr (kI16) {
        if (integers.on) {
          integers.pack_block(*this, at);
          continue;
        }
      }
      pack_block(at);
    }
  }

  // The block that begins `at` keys after the first of those that are packed.
  void pack_block(int64_t at) {
    const int64_t left = packed - at;
    const int64_t count = std::min(tiles.block, left), padded = round_up(count, kDepth);
    const int64_t panel = simd::kLanes * sizes.depth;
    Math *to_keys = keys + at * sizes.depth, *to_values = values + at * sizes.dv;
    if (sizes.qk) {
      pack_keys(key_rows_ + at, count, left, d, sizes.qk, to_keys, panel, spare);
      fill_panels(count, padded, sizes.qk, to_keys, panel);
    }
    if (sizes.qv) {
      Math* after = to_keys + simd::kLanes * sizes.qk;
      pack_keys(value_rows + at, count, left, dv, sizes.qv, after, panel, spare);
      fill_panels(count, padded, sizes.qv, after, panel);
    }
    pack_values(value_rows + at, count, left, padded, dv, sizes.dv, to_values,
                simd::kLanes * tiles.block, spare);
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
    float factors[kTileRows];  // what the rows' sums are multiplied by before P·V is added
  };

  // The part that the rows from `row` on, of `rows`, see of the block that begins `at` keys after
  // the first of those that are packed, in whole steps; columns is 0 when they see none of it.
  void set_tile(int64_t row, int64_t rows, int64_t first, int64_t at, int64_t count, Tile& t) {
    t.row = row;
    t.rows = std::min(kTileRows, rows - row);
    t.first = first + at;
    t.at = at;
    constexpr int64_t kChunk = Integers<Element, Math>::kChunk;
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
  SoftenArgs<Kind> soften_args(Tile& t, int64_t i, Kind* first, int64_t p_stride) const {
    const int64_t row = t.row + i, stride = score_stride();
    return {scores + i * stride, stride,       first,          p_stride,
            t.columns,           maxima + row, row_sums + row, t.factors + i};
  }

  // Which of a tile's columns its row i sees.
  Interval seen_of(const Tile& t, int64_t i) const {
    const int64_t start = t.first + t.from;
    return {begins[t.row + i] - start, ends[t.row + i] - start};
  }

  void soften_tile(const ScoreScale& scale, Tile& t, int64_t i) {
    int64_t p_stride = std::is_same<Math, float>::value ? score_stride() : tiles.block;
    soften_rows<kExpDegree<Math>>(soften_args(t, i, t.p + i * p_stride, p_stride), scale,
                                  std::min<int64_t>(simd::kLanes, t.rows - i),
                                  [&](int64_t j) { return seen_of(t, i + j); });
  }

  // The values' product to come: what it adds to, and how.
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

  void score(const Tile& t) {
    GemmArgs<Math> g = score_args(t);
    int64_t panels = t.columns / simd::kLanes;
    if (mix == 1.0f) {
      return each_part(t, [&](int64_t i, int64_t rows, int64_t keys) {
        GemmArgs<Math> part = g;
        part.a += i * g.lda;
        part.c += i * g.ldc;
        multiply(part, rows, keys / simd::kLanes);
      });
    }
    g.depth = sizes.qk;
    multiply(g, t.rows, panels);
    for (int64_t i = 0; i < t.rows; ++i)
      simd::scale_floats(scores + i * score_stride(), t.columns, mix);
    g.a += sizes.qk;
    g.b += simd::kLanes * sizes.qk;
    g.depth = sizes.qv;
    g.accumulate = true;
    multiply(g, t.rows, panels);
  }

  void add_values(const Tile& t) {
    GemmArgs<Math> g = begin_values(t);
    each_part(t, [&](int64_t i, int64_t rows, int64_t keys) {
      GemmArgs<Math> part = g;
      part.a += i * g.lda;
      part.c += i * g.ldc;
      part.depth = part.piece = keys;
      multiply(part, rows, sizes.dv / simd::kLanes);
    });
  }

  // Whether products are AMX tiles, which have 32 rows.
  bool in_tiles() const {
#ifdef JIT_KERNEL_AMX
    return kTiles && amx.active();
#else
    return false;
#endif
  }

  void multiply(const GemmArgs<Math>& g, int64_t rows, int64_t panels) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (in_tiles()) return gemm_amx(g, panels);
    }
#endif
    if constexpr (!std::is_same<Math, fp16>::value) gemm(g, rows, panels);
  }

  void whole_tile(const ScoreScale& scale, Tile& t) {
    if constexpr (kI16) {
      if (integers.fit(*this, t)) return integers.whole_tile(*this, scale, t);
      bool& has_floats = integers.has_floats[t.at / tiles.block];
      if (integers.on && !has_floats) {
        pack_block(t.at);
        has_floats = true;
      }
    }
    score(t);
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) soften_tile(scale, t, i);
    add_values(t);
  }

  // All rows against the packed keys first .. first + count - 1, tile after tile. load(row) is
  // called before a tile is used, write(row) when it has seen these keys.
  template <class Take, class Load, class Write>
  void packed_tiles(const ScoreScale& scale, int64_t rows, int64_t first, int64_t count,
                    Take&& take, Load&& load, Write&& write) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (amx.active() && mix == 1.0f) {
        auto run = [&](auto per_call) {
          constexpr int kPerCall = decltype(per_call)::value;
          TilePipeline<Prefill, Math, kPerCall>(*this, scale)
              .run(rows, first, count, take, load, write);
        };
        const int64_t calls = TileProducts<Math>::calls(sizes.depth);
        if (calls == kTileRows) return run(std::integral_constant<int, 1>());      // depth 128
        if (2 * calls == kTileRows) return run(std::integral_constant<int, 2>());  // depth 64
        return run(std::integral_constant<int, 0>());
      }
    }
#endif
    Tile t;
    for (int64_t i; (i = take()) >= 0;) {
      load(i);
      for (int64_t at = 0; at < count; at += tiles.block) {
        set_tile(i, rows, first, at, count, t);
        if (t.columns > 0) whole_tile(scale, t);
      }
      write(i);
    }
  }

  // Of the item's rows those that no other thread takes from the queue.
  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& parts,
           RowQueue& queue) {
    int64_t rows = item.row_end - item.row_begin, padded = round_up(rows, kTileRows);
    if (once) queue.open(padded);
    begin_rows(params, s, item);
    ScoreScale scale = score_scale_of(params, item.batch, item.head_begin);
    mix = qk_factor(params, item.batch, item.head_begin);
    int64_t begin = begins[0], end = ends[rows - 1];
    // Blocks are counted from the item's first key, never from what a row sees first.
    int64_t first = item.key_begin + (begin - item.key_begin) / tiles.block * tiles.block;
    auto load = [&](int64_t row) {
      if (state_of(row) == TileState::kTaken) load_tile(params, s, item, row);
    };
    int64_t left = padded;
    auto take = [&] {  // the last rows first: with a mask these are the longest
      int64_t row = once ? queue.take(kTileRows) : left -= kTileRows;
      if (row >= 0 && state_of(row) == TileState::kNew) state_of(row) = TileState::kTaken;
      return row;
    };
    for (; first < end; first += packed_keys(), left = padded) {
      int64_t count = std::min(packed_keys(), end - first);
      pack(params, s, item.head_begin, first, count);
      const bool last = first + count == end;
      packed_tiles(scale, rows, first, count, take, load, [&](int64_t row) {
        if (last) write_tile(params, s, item, parts, scale, row);
      });
    }
    while (take() >= 0) continue;                          // where no row sees any key
    for (int64_t row = 0; row < rows; row += kTileRows) {  // those that saw no key of the last ones
      if (state_of(row) != TileState::kNew && state_of(row) != TileState::kWritten) {
        write_tile(params, s, item, parts, scale, row);
      }
    }
  }
};

}  // namespace jit_kernel
