// The prefill of mainloop_prefill.h with its products in AMX tiles.
//
// A tile of 32 rows takes a packed block in chunks of 32 keys. While the tile unit makes the scores
// of a chunk, the vector units turn those of the second chunk before it into probabilities: those
// of the one before are still in tiles, and vectors that wait for them would fill the scheduler, so
// that tiles wait, too (5 to 15 % of a prefill). When all of a block's are made, the values are
// added. So scores live in two buffers of 4 KiB: whole rows of them (32 KiB), with P and the stream
// of packed keys and values, left L1 and took 1.5 times as long.
//
// It needs probabilities in one pass, so they are made with the maxima of earlier blocks; a tile's
// first block with those of its first chunk. Where a probability turns out larger than 2^8, which
// is when kept_maximum() raises a maximum, all of the block's scores are made twice: once for their
// maxima. Tiles are the same rows whatever items a sequence is cut into, so a row's result does not
// depend on that.
#pragma once

#include "flash_attention_v3/cpu/common/softmax.h"
#include "flash_attention_v3/cpu/prefill/edge_values.h"
#include "flash_attention_v3/cpu/prefill/gemm_amx.h"
#include "flash_attention_v3/cpu/prefill/prefill_state.h"

#ifdef JIT_KERNEL_AMX

namespace jit_kernel {

// kPerCall rows become probabilities after every instruction of tiles (TileProducts::calls()); 0
// where they do not come out even, at 3 to 8 % of the time for the loop that counts them.
template <class Element, class Math, int kPerCall>
class TilePipeline {
 public:
  using State = PrefillState<Element, Math>;
  using Tile = typename State::Tile;
  using Vec = simd::Vec;

  TilePipeline(State& state, const ScoreScale& scale)
      : state_(state), scale_(scale), to_log2_(simd::set1(scale.to_log2())) {}

  // The rows that take() gives, tile by tile until it is negative, against the packed keys
  // first .. first + count - 1. load(row) is called before a tile is used, write(row) when it has
  // seen these keys.
  template <class Take, class Load, class Write>
  void run(int64_t rows, int64_t first, int64_t count, Take&& take, Load&& load, Write&& write) {
    int64_t row = 0, at = count;
    auto find = [&](Tile& t) {  // the next tile that sees any of its block
      for (;;) {
        if (at >= count) {
          at = 0;
          row = take();
        }
        if (row < 0) return false;
        state_.set_tile(row, rows, first, at, count, t);
        at += state_.tiles.block;
        if (t.columns > 0) {
          load(t.row);
          return true;
        }
      }
    };
    Tile tiles[2] = {};
    bool found = find(tiles[0]);
    for (int i = 0; found; i ^= 1) {
      Tile &t = tiles[i], &next = tiles[i ^ 1];
      found = find(tiles[i ^ 1]);
      attend(t, found ? &next : nullptr);
      if (found && next.row == t.row) continue;
      products_.finish();
      write(t.row);
    }
  }

 private:
  static constexpr int64_t kRows = 2 * kAmxRows, kChunk = kDepth;

  // A row's data beside its scores; as long as its 32 scores, so that one offset finds
  // both.
  struct Row {
    Vec lanes;    // its sum or its maximum, lane by lane
    float shift;  // added to its scores times to_log2_, or taken from them before
    float unused[simd::kLanes - 1];
  };
  static_assert(sizeof(Row) == kChunk * sizeof(float), "one offset for both");

  JIT_KERNEL_INLINE void attend(Tile& t, Tile* next) {
    std::fill(t.factors, t.factors + kRows, 1.0f);
    bool raised = false;
    if (has_new_row(t)) {
      begin_scores(t, nullptr);
      begin_maxima(t);
      raised = has_new_row(t);  // one that sees nothing of the first chunk
      if (raised) {
        largest(t);
        raise_maxima(t);
      }
    }
    for (;;) {
      make_probabilities(t, next);
      if (raised || !rises(t)) break;
      raised = true;
      begun_ = 0;  // the scores that are being made are those of `next`
      largest(t);
      raise_maxima(t);
    }
    GemmArgs<Math> g = state_.begin_values(t);
    EdgeValues<State, Math> edges(state_, t);
    const bool any_odd = edges.any_odd();
    if (any_odd) edges.leave_out(g);
    const int64_t panels = state_.sizes.dv / simd::kLanes;
    for (int64_t j = 0; j < panels; j += 2) {
      products_.multiply(g, j, panels, [] {});
      if (j > 0) continue;
      add_row_sums(t);
      // While the values are added: 3 % of a prefill of 512 keys. Not where it has sums already,
      // for which it would have to remember its factors.
      if (next && next->row != t.row && !state_.has_sums(next->row)) begin_maxima(*next);
    }
    if (any_odd) {
      products_.finish();
      edges.add(g);
    }
  }

  // The maxima of a tile's first chunk, whose scores are made.
  JIT_KERNEL_INLINE void begin_maxima(Tile& t) {
    if (!sees_all(t, 0) || scale_.transform) mask_chunk(t, 0);
    const float* scores = buffer(0);
    for (int64_t r = 0; r < kRows; ++r, scores += kChunk) {
      rows_[r].lanes = simd::max(simd::load(scores), simd::load(scores + simd::kLanes));
    }
    raise_maxima(t);
  }

  bool has_new_row(const Tile& t) const {
    const float* maxima = state_.maxima + t.row;
    __mmask16 none = 0;
    for (int64_t i = 0; i < t.rows; i += simd::kLanes) {
      auto rows = static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(t.rows - i)));
      none |=
          _mm512_mask_cmp_ps_mask(rows, simd::load(maxima + i), simd::set1(-kInfinity), _CMP_EQ_OQ);
    }
    return none != 0;
  }

  void add_row_sums(const Tile& t) {
    for (int64_t i = 0; i < kRows; i += simd::kLanes) {
      float* sums = state_.row_sums + t.row + i;
      simd::store(sums, simd::load(sums) + simd::reduce_each(lanes(i).of));
    }
  }

  // Probabilities with the maxima as they are, and their sums, lane by lane.
  JIT_KERNEL_INLINE void make_probabilities(const Tile& t, const Tile* next) {
    alignas(64) float shifts[kRows];
    unsigned far = 0;
    for (int64_t i = 0; i < kRows; i += simd::kLanes) {
      Vec top = simd::load(state_.maxima + t.row + i);
      // Rows that have seen nothing yet: any finite number keeps -inf - -inf from being NaN.
      top = simd::where_less(simd::set1(-kInfinity), top, top, simd::zero());
      far |= far_lanes(top, to_log2_);
      simd::store(shifts + i, simd::zero() - top * to_log2_);
    }
    if (far != 0) return make_far_probabilities(t, next);
    for (int64_t r = 0; r < kRows; ++r) {
      rows_[r].lanes = simd::zero();
      rows_[r].shift = shifts[r];
    }
    const Vec to_log2 = to_log2_;
    each_row<true>(t, next, [to_log2](Row& row, Vec a, Vec b, Math* p) JIT_KERNEL_INLINED {
      Vec shift = simd::set1(row.shift);
      a = simd::exp2<kExpDegree<Math>>(simd::fma(a, to_log2, shift));
      b = simd::exp2<kExpDegree<Math>>(simd::fma(b, to_log2, shift));
      store_probabilities(p, a, b);
      row.lanes = row.lanes + (a + b);
    });
  }

  // The same where a product with a maximum is so large that its rounding would show, or infinite.
  __attribute__((noinline)) void make_far_probabilities(const Tile& t, const Tile* next) {
    for (int64_t r = 0; r < kRows; ++r) {
      const float top = state_.maxima[t.row + r];
      rows_[r].lanes = simd::zero();
      rows_[r].shift = top == -kInfinity ? 0.0f : top;
    }
    const Vec to_log2 = to_log2_;
    each_row<false>(t, next, [to_log2](Row& row, Vec a, Vec b, Math* p) JIT_KERNEL_INLINED {
      Vec top = simd::set1(row.shift);
      a = simd::exp2<kExpDegree<Math>>((a - top) * to_log2);
      b = simd::exp2<kExpDegree<Math>>((b - top) * to_log2);
      store_probabilities(p, a, b);
      row.lanes = row.lanes + (a + b);
    });
  }

  // Whether a probability may be above 2^8, or is not a number.
  bool rises(const Tile& t) const {
    __mmask16 high = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      high |= _mm512_cmp_ps_mask(rows_[r].lanes, simd::set1(kLargestProbability), _CMP_NLT_UQ);
    }
    return high != 0;
  }

  // The largest of each row's scores, lane by lane.
  __attribute__((noinline)) void largest(const Tile& t) {
    for (int64_t r = 0; r < kRows; ++r) rows_[r].lanes = simd::set1(-kInfinity);
    each_row<false>(t, &t, [](Row& row, Vec a, Vec b, Math*) JIT_KERNEL_INLINED {
      row.lanes = simd::max(row.lanes, simd::max(a, b));
    });
  }

  // New maxima, where the rows' lanes hold larger ones; row sums are scaled to them, and t's
  // factors tell how the sums are to be.
  void raise_maxima(Tile& t) {
    for (int64_t i = 0; i < kRows; i += simd::kLanes) {
      float *maxima = state_.maxima + t.row + i, *sums = state_.row_sums + t.row + i;
      Vec old = simd::load(maxima);
      Vec top = kept_maximum(old, simd::reduce_max_each(lanes(i).of), to_log2_);
      Vec shift = simd::where_less(simd::set1(-kInfinity), top, top, simd::zero());
      Vec factor = simd::exp2<kExpDegree<float>>((old - shift) * to_log2_);
      simd::store(maxima, top);
      simd::store(sums, simd::load(sums) * factor);
      simd::store(t.factors + i, simd::load(t.factors + i) * factor);
    }
  }

  // Calls work(row, scores, more scores, where its P belongs) for all of a tile, each chunk while
  // the scores of the one after the next are made: after the last, those of `next`'s first chunks.
  // Without kBeside, for rare cases, the work follows the products: less to compile.
  template <bool kBeside, class Work>
  JIT_KERNEL_INLINE void each_row(const Tile& t, const Tile* next, Work&& work) {
    begin_scores(t, next);
    const int64_t chunks = t.columns / kChunk, ahead = next ? next->columns / kChunk : 0;
    const int64_t calls = TileProducts<Math>::calls(state_.sizes.depth);
    [[maybe_unused]] const int64_t each = (kRows + calls - 1) / calls;
    const int64_t stride = state_.tiles.block;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t column = chunk * kChunk;
      char *scores = reinterpret_cast<char*>(buffer(0)), *rows = reinterpret_cast<char*>(rows_);
      Math* p = t.p + column;
      int64_t at = 0;
      constexpr int64_t end = kRows * static_cast<int64_t>(sizeof(Row));
      auto one = [&]() JIT_KERNEL_INLINED {
        const float* s = reinterpret_cast<const float*>(scores + at);
        work(*reinterpret_cast<Row*>(rows + at), simd::load(s), simd::load(s + simd::kLanes), p);
        at += sizeof(Row);
        p += stride;
      };
      // A row of the next queries: four lines a chunk cost the tiles nothing, eight as much as they
      // save (each holds one of 16 line buffers all the way to memory).
      if constexpr (kBeside) state_.ask_for_queries();
      if (!sees_all(t, column) || scale_.transform) mask_chunk(t, column);
      if (chunk + 2 < chunks + ahead) {
        const bool own = chunk + 2 < chunks;
        score(own ? t : *next, (own ? chunk + 2 : chunk + 2 - chunks) * kChunk, buffer(0),
              [&]() JIT_KERNEL_INLINED {
                if constexpr (kBeside && kPerCall == 0) {
                  for (int64_t i = 0; i < each && at < end; ++i) one();
                } else if constexpr (kBeside) {
                  for (int i = 0; i < kPerCall; ++i) one();
                }
              });
      } else if (chunk + 2 == chunks + ahead) {
        products_.finish();  // the last chunk's scores
      }
      while (at < end) one();
      odd_ = !odd_;
      masked_ = false;
    }
    begun_ = std::min<int64_t>(ahead, 2);
  }

  // The first two chunks' scores, as far as they are not begun; the first one's are complete then.
  JIT_KERNEL_INLINE void begin_scores(const Tile& t, const Tile* next) {
    const int64_t chunks = t.columns / kChunk, ahead = next ? next->columns / kChunk : 0;
    for (; begun_ < std::min<int64_t>(2, chunks + ahead); ++begun_) {
      const bool own = begun_ < chunks;
      score(own ? t : *next, (own ? begun_ : begun_ - chunks) * kChunk, buffer(begun_), [] {});
    }
    if (chunks + ahead == 1) products_.finish();
  }

  float* buffer(int64_t chunk) const {
    return state_.scores + ((chunk & 1) != 0 ? !odd_ : odd_) * kRows * kChunk;
  }

  // Begins the scores of a chunk.
  template <class Between>
  JIT_KERNEL_INLINE void score(const Tile& t, int64_t column, float* scores, Between&& between) {
    GemmArgs<Math> g = state_.score_args(t);
    g.b += column * state_.sizes.depth;
    g.c = scores;
    g.ldc = kChunk;
    products_.multiply(g, 0, 2, between);
  }

  bool sees_all(const Tile& t, int64_t column) const {
    int64_t start = t.first + t.from + column;
    return state_.begins[t.row + t.rows - 1] <= start && state_.ends[t.row] >= start + kChunk &&
           !state_.draft.covers(start + kChunk);
  }

  // The scores of the chunk that comes next capped, and -inf where a row does not see the key.
  __attribute__((noinline)) void mask_chunk(const Tile& t, int64_t column) {
    if (masked_) return;
    masked_ = true;
    float* scores = buffer(0);
    int64_t start = t.first + t.from + column;
    for (int64_t r = 0; r < t.rows; ++r, scores += kChunk) {
      if (scale_.transform) transform_scores(scale_, scores, kChunk);
      unsigned seen = below(state_.ends[t.row + r] - start);
      seen &= ~below(state_.begins[t.row + r] - start);
      if (state_.draft.covers(start + kChunk))
        seen &= state_.draft.seen(state_.token_of(t.row + r), start);
      for (int i = 0; i < kChunk; i += simd::kLanes) {
        __m512 seen_scores = simd::load(scores + i), unseen = simd::set1(-kInfinity);
        simd::store(scores + i,
                    _mm512_mask_mov_ps(unseen, static_cast<__mmask16>(seen >> i), seen_scores));
      }
    }
  }

  // The lowest n bits: none below 0, all from 32 on.
  static unsigned below(int64_t n) {
    return _bzhi_u32(~0u, static_cast<unsigned>(std::min(std::max<int64_t>(0, n), kChunk)));
  }

  struct Lanes {
    Vec of[simd::kLanes];
  };
  // The lanes of 16 rows from row i on.
  Lanes lanes(int64_t i) const {
    Lanes x;
    for (int64_t j = 0; j < simd::kLanes; ++j) x.of[j] = rows_[i + j].lanes;
    return x;
  }

  State& state_;
  const ScoreScale& scale_;
  const Vec to_log2_;
  TileProducts<Math> products_;
  bool odd_ = false;     // which of the two buffers the next chunk's scores are in
  int64_t begun_ = 0;    // chunks, at most two, whose scores are begun
  bool masked_ = false;  // whether the next chunk's scores went through mask_chunk()
  // After the two buffers of scores: the stores of a row and the loads of the next ones lie apart
  // modulo a page; the core takes those that do not for the same address.
  Row* const rows_ = reinterpret_cast<Row*>(state_.scores + 2 * kRows * kChunk);
};

}  // namespace jit_kernel

#endif  // JIT_KERNEL_AMX
