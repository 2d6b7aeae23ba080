// Many query rows against packed blocks of keys: scores, softmax and P·V of a block while it is in
// cache. Of blocks that are packed together a tile of rows takes one after the other, so its sums
// stay in L1; where these are all of the keys, no other tile's are kept.
#pragma once

#include <algorithm>

#include "flash_attention_v3/cpu/common/mask.h"
#include "flash_attention_v3/cpu/common/query.h"
#include "flash_attention_v3/cpu/prefill/edge_values.h"
#include "flash_attention_v3/cpu/prefill/mainloop_prefill_amx.h"
#include "flash_attention_v3/cpu/prefill/prefill_i16.h"
#include "flash_attention_v3/cpu/prefill/prefill_state.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

template <class Element, class Math = MathOf<Element>>
struct Prefill : PrefillState<Element, Math> {
  using State = PrefillState<Element, Math>;
  using Key = typename State::Key;
  using State::keys, State::key_pointers, State::value_pointers, State::packed, State::hidden;
  using State::kI16, State::kTileRows, State::kTiles;
  using State::sizes, State::tiles, State::once, State::scores, State::begins, State::ends;
  using typename State::Tile, typename State::TileState;

  Integers<Element, Math> integers;
  float mix = 1.0f;  // q·k is multiplied by it before qv·v is added

  template <class Params>
  Prefill(const Params& params, const Item& item, Scratch& scratch)
      : State(params, item), integers(params, sizes) {
    const int64_t rows = item.row_end - item.row_begin;
    scratch.take_all([&](auto&& f) {
      this->each_state_array(rows, f);
      if constexpr (kI16) integers.each_array(*this, State::padded_rows(rows), f);
    });
  }

  // The queries of a tile from row `row` on, and in integers where they are used.
  template <class Params>
  void load_tile(const Params& params, const Sequence& s, const Item& item, int64_t row) {
    this->load_queries(params, s, item, row);
    if constexpr (kI16) {
      if (integers.on) {
        integers.load_tile(*this, row, std::min(kTileRows, item.row_end - item.row_begin - row));
      }
    }
  }

  // The keys first .. first + count - 1, block after block; no row sees those before `seen`.
  template <class Params>
  void pack(const Params& params, const Sequence& s, int64_t head_k, int64_t first, int64_t count,
            int64_t seen) {
    packed = count;
    hidden = std::min(std::max<int64_t>(0, seen - first), count);
    const auto find = [&](const Rows<Key>& rows, const Key** pointers) {
      key_rows(params, rows, s, first + hidden, count - hidden, head_k, pointers + hidden);
      // What is asked for ahead is one of the others.
      std::fill_n(pointers, hidden, hidden < count ? pointers[hidden] : nullptr);
    };
    if (!params.only_qv) find(params.k, key_pointers);
    find(params.v, value_pointers);
    if constexpr (State::kHasFactors) {
      const auto find_factors = [&](const Rows<const float>& rows, float* factors) {
        for (int64_t j = hidden; rows && j < count; ++j) {
          factors[j] = *key_row(params, rows, s, first + j, head_k);
        }
      };
      if (!params.only_qv) find_factors(params.k_scale, this->key_factors);
      find_factors(params.v_scale, this->value_factors);
    }
    for (int64_t at = 0; at < count; at += tiles.block) {
      if constexpr (kI16) {
        if (integers.on) {
          integers.pack_block(*this, at);
          continue;
        }
      }
      this->pack_block(at);
    }
  }

  void softmax_tile(const ScoreScale& scale, Tile& t, int64_t i) {
    int64_t p_stride = std::is_same<Math, float>::value ? this->score_stride() : tiles.block;
    softmax_rows<kExpDegree<Math>>(this->softmax_args(t, i, t.p + i * p_stride, p_stride), scale,
                                   std::min<int64_t>(simd::kLanes, t.rows - i),
                                   [&](int64_t j, float* row) { this->mask_row(t, i + j, row); });
  }

  void score(const Tile& t) {
    GemmArgs<Math> g = this->score_args(t);
    int64_t panels = t.columns / simd::kLanes;
    if (mix == 1.0f) {
      return this->each_part(t, [&](int64_t i, int64_t rows, int64_t keys) {
        GemmArgs<Math> part = g;
        part.a += i * g.lda;
        part.c += i * g.ldc;
        multiply(part, rows, keys / simd::kLanes);
      });
    }
    g.depth = sizes.qk;
    multiply(g, t.rows, panels);
    for (int64_t i = 0; i < t.rows; ++i)
      simd::scale_floats(scores + i * this->score_stride(), t.columns, mix);
    g.a += sizes.qk;
    g.b += simd::kLanes * sizes.qk;
    g.depth = sizes.qv;
    g.accumulate = true;
    multiply(g, t.rows, panels);
  }

  void add_values(const Tile& t) {
    if (EdgeValues<State, Math>(*this, t).any_odd()) return add_odd_values(t);
    multiply_values(t, this->begin_values(t));
  }

  void multiply_values(const Tile& t, const GemmArgs<Math>& g) {
    this->each_part(t, [&](int64_t i, int64_t rows, int64_t keys) {
      GemmArgs<Math> part = g;
      part.a += i * g.lda;
      part.c += i * g.ldc;
      part.depth = part.piece = keys;
      multiply(part, rows, sizes.dv / simd::kLanes);
    });
  }

  __attribute__((noinline)) void add_odd_values(const Tile& t) {
    GemmArgs<Math> g = this->begin_values(t);
    EdgeValues<State, Math> edges(*this, t);
    edges.leave_out(g);
    multiply_values(t, g);
    edges.add(g);
  }

  void multiply(const GemmArgs<Math>& g, int64_t rows, int64_t panels) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (this->in_tiles()) return gemm_amx(g, panels);
    }
#endif
    if constexpr (!std::is_same<Math, fp16>::value) gemm(g, rows, panels);
  }

  void whole_tile(const ScoreScale& scale, Tile& t) {
    if constexpr (kI16) {
      if (integers.fit(*this, t)) return integers.whole_tile(*this, scale, t);
      bool& has_floats = integers.has_floats[t.at / tiles.block];
      if (integers.on && !has_floats) {
        this->pack_block(t.at);
        has_floats = true;
      }
    }
    score(t);
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) softmax_tile(scale, t, i);
    add_values(t);
  }

  // All rows against the packed keys first .. first + count - 1, tile after tile. load(row) is
  // called before a tile is used, write(row) when it has seen these keys.
  template <class Take, class Load, class Write>
  void packed_tiles(const ScoreScale& scale, int64_t rows, int64_t first, int64_t count,
                    Take&& take, Load&& load, Write&& write) {
#ifdef JIT_KERNEL_AMX
    if constexpr (kTiles) {
      if (this->in_tiles() && mix == 1.0f) {
        auto run = [&](auto per_call) {
          constexpr int kPerCall = decltype(per_call)::value;
          TilePipeline<Element, Math, kPerCall>(*this, scale)
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
        this->set_tile(i, rows, first, at, count, t);
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
    this->begin_rows(params, s, item);
    ScoreScale scale = score_scale_of(params, item.batch, item.head_begin);
    mix = qk_factor(params, item.batch, item.head_begin);
    int64_t begin = begins[0], end = ends[rows - 1];
    // Blocks are counted from the item's first key, never from the first key that a row sees.
    int64_t first = item.key_begin + (begin - item.key_begin) / tiles.block * tiles.block;
    auto load = [&](int64_t row) {
      if (this->state_of(row) == TileState::kTaken) load_tile(params, s, item, row);
    };
    int64_t left = padded;
    auto take = [&] {  // the last rows first: with a mask these are the longest
      int64_t row = once ? queue.take(kTileRows) : left -= kTileRows;
      if (row >= 0 && this->state_of(row) == TileState::kNew)
        this->state_of(row) = TileState::kTaken;
      return row;
    };
    for (; first < end; first += this->packed_keys(), left = padded) {
      int64_t count = std::min(this->packed_keys(), end - first);
      pack(params, s, item.head_begin, first, count, begin);
      const bool last = first + count == end;
      packed_tiles(scale, rows, first, count, take, load, [&](int64_t row) {
        if (last) this->write_tile(params, s, item, parts, scale, row);
      });
    }
    while (take() >= 0) continue;                          // where no row sees any key
    for (int64_t row = 0; row < rows; row += kTileRows) {  // those that saw no key of the last ones
      if (this->state_of(row) != TileState::kNew && this->state_of(row) != TileState::kWritten) {
        this->write_tile(params, s, item, parts, scale, row);
      }
    }
  }
};

}  // namespace jit_kernel
