// Few query rows against keys in place: each key and value is read from memory once for all rows.
#pragma once

#include "flash_attention_v3/cpu/decode_amx.h"
#include "flash_attention_v3/cpu/epilogue.h"
#include "flash_attention_v3/cpu/gemm.h"
#include "flash_attention_v3/cpu/mask.h"
#include "flash_attention_v3/cpu/prefetch.h"
#include "flash_attention_v3/cpu/query.h"
#include "flash_attention_v3/cpu/scheduler.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// One step of a dot product that runs along the head, a vector at a time: what a query row and a
// key are loaded as. bf16 pairs go 32 deep, floats kLanes; other keys become floats as they are
// loaded.
template <class Math, class Key>
struct RowDot {
  static constexpr int64_t kDepthStep = simd::kLanes;
  static simd::Vec query(const float* q) { return simd::load(q); }
  static simd::Vec key(const Key* k) { return simd::load_as_float(k); }
  static simd::Vec add(simd::Vec sum, simd::Vec a, simd::Vec b) { return simd::fma(a, b, sum); }
};
#ifdef JIT_KERNEL_BF16_DOT
template <>
struct RowDot<bf16, bf16> {
  static constexpr int64_t kDepthStep = 2 * simd::kLanes;
  static __m512bh query(const bf16* q) { return simd::load_pairs(q); }
  static __m512bh key(const bf16* k) { return simd::load_pairs(k); }
  static simd::Vec add(simd::Vec sum, __m512bh a, __m512bh b) { return simd::dot_pairs(sum, a, b); }
};
#endif

// Products of kRows query rows (`stride` apart) and kLanes / kRows keys of n elements, summed; lane
// i * kKeys + j is row i and key j. A key begins `offset` elements after its pointer: its head's
// place.
template <int kRows, class Key, class Math>
inline simd::Vec dot_keys(const Key* const* keys, int64_t offset, const Math* q, int64_t stride,
                          int64_t n) {
  using Dot = RowDot<Math, Key>;
  constexpr int kKeys = simd::kLanes / kRows;
  simd::Vec sum[simd::kLanes];
  const Key* k[kKeys];
#pragma GCC unroll 16
  for (int j = 0; j < simd::kLanes; ++j) sum[j] = simd::zero();
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) k[j] = keys[j] + offset;
  for (int64_t at = 0; at < n; at += Dot::kDepthStep) {
    decltype(Dot::query(q)) rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = Dot::query(q + i * stride + at);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      auto key = Dot::key(k[j] + at);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        sum[i * kKeys + j] = Dot::add(sum[i * kKeys + j], rows[i], key);
    }
  }
  return simd::reduce_each(sum);
}

// sums (kRows rows, kVecs vectors of columns) += P (rows, keys) · values, keys in order.
template <int kRows, int kVecs, class Value>
inline void add_values(const Value* const* values, int64_t offset, int64_t count, int64_t column,
                       const float* p, int64_t p_stride, float* sums, int64_t sum_stride,
                       Prefetch& prefetch) {
  simd::Vec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      sum[i][c] = simd::load(sums + i * sum_stride + column + c * simd::kLanes);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    prefetch.lines(1 + kVecs / 2);
    simd::Vec v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      v[c] = simd::load_as_float(values[j] + offset + column + c * simd::kLanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      simd::Vec one = simd::set1(p[i * p_stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[i][c] = simd::fma(one, v[c], sum[i][c]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVecs; ++c) {
      simd::store(sums + i * sum_stride + column + c * simd::kLanes, sum[i][c]);
    }
  }
}

template <class Element>
struct Decode {
  using Math = MathOf<Element>;
  static constexpr int kVecs = simd::kRegisters == 32 ? 4 : 2;
  // e4m3 has no loads that are cheap enough to repeat for every row.
  static constexpr bool kHasLoads = !std::is_same<Element, e4m3>::value;

  // The row pointers of a block of keys: those of head 0, which the offsets of other heads are
  // added to.
  struct Block {
    const Element *k[kDecodeBlock], *v[kDecodeBlock];
    int64_t first;     // the key of row 0
    int64_t from, to;  // rows that are keys to be seen; the others only fill up a vector
    int64_t columns;
  };
  struct Head {
    ScoreScale scale;
    float mix;  // what q·k is multiplied by before qv·v is added
  };

  HeadSizes sizes;
  int64_t rows, heads;
  bool in_place;            // whether whole vectors of keys and values can be read where they are
  Math *q, *keys, *values;  // q: head after head; keys and values: a converted block
  float *scores, *sums, *spare_row;
  Element* turned;
  const Math **math_keys, **math_values;
  float *maxima, *row_sums;  // RowStates: kDecodeRows a head
  Head* head_settings;
  Block* blocks;  // this one and the next
  Prefetch next_keys, next_values;
  Interval seen[kDecodeRows];
#ifdef JIT_KERNEL_AMX
  Math *panels, *p, *packed, *spare;  // queries by heads, probabilities, values, keys
  AmxTiles amx;

  // From two rows on: one row's products are cheaper in vectors than its values' packing. Sizes
  // that are not whole tiles of keys stay there, too.
  static bool wants_tiles(const Item& item) {
    return std::is_same<Math, bf16>::value && item.row_end - item.row_begin > 1;
  }
#endif

  template <class F>
  void each_array(F&& f) {
    int64_t all = heads * rows;
    f(q, all * sizes.depth), f(sums, all * sizes.dv), f(head_settings, heads);
    f(maxima, heads * kDecodeRows), f(row_sums, heads * kDecodeRows);
    f(scores, kDecodeRows * kDecodeBlock), f(spare_row, sizes.depth), f(turned, sizes.depth);
    f(math_keys, kDecodeBlock), f(math_values, kDecodeBlock), f(blocks, 2);
    f(keys, in_place ? 0 : kDecodeBlock * sizes.qk);
    f(values, in_place ? 0 : kDecodeBlock * value_stride());
#ifdef JIT_KERNEL_AMX
    if (!amx.active()) return;
    f(panels, heads * 16 * sizes.depth), f(p, 16 * kDecodeBlock);
    f(packed, kDecodeBlock * sizes.dv), f(spare, 16 * std::max(sizes.depth, sizes.dv));
#endif
  }

  int64_t value_stride() const { return std::max(sizes.dv, sizes.qv); }

  template <class Params>
  Decode(const Params& params, const Item& item, Scratch& scratch)
      : sizes(head_sizes<Math>(params)),
        rows(item.row_end - item.row_begin),
        heads(item.head_end - item.head_begin)
#ifdef JIT_KERNEL_AMX
        ,
        amx(item.row_end - item.row_begin, wants_tiles(item))
#endif
  {
    bool exact = (params.only_qv || params.d == sizes.qk) && params.dv == sizes.dv;
    in_place = kHasLoads && exact && (!params.qv || params.dv == sizes.qv);
    size_t bytes = 0;
    each_array([&](auto*& a, int64_t n) {
      bytes += Scratch::size<std::remove_reference_t<decltype(*a)>>(n);
    });
    scratch.reserve(bytes);
    each_array(
        [&](auto*& a, int64_t n) { a = scratch.take<std::remove_reference_t<decltype(*a)>>(n); });
  }

  // Scores of kRows rows from `row` on of a head, and all keys of a block.
  template <int kRows, class Key>
  void score_rows(const Key* const* k, int64_t k_offset, const Key* const* v, int64_t v_offset,
                  int64_t head, int64_t row, int64_t columns) {
    constexpr int kKeys = simd::kLanes / kRows;
    simd::Vec mix = simd::set1(head_settings[head].mix);
    const Math* query = q + (head * rows + row) * sizes.depth;
    float* to = scores + row * kDecodeBlock;
    for (int64_t j = 0; j < columns; j += kKeys) {
      next_keys.lines(4 * kKeys);
      simd::Vec s = simd::zero();
      if (sizes.qk) s = dot_keys<kRows>(k + j, k_offset, query, sizes.depth, sizes.qk) * mix;
      if (sizes.qv) {
        s = s + dot_keys<kRows>(v + j, v_offset, query + sizes.qk, sizes.depth, sizes.qv);
      }
      if constexpr (kRows == 1) {
        simd::store(to + j, s);
      } else {
        float lanes[simd::kLanes];
        simd::store(lanes, s);
        for (int i = 0; i < kRows; ++i) {
          std::memcpy(to + i * kDecodeBlock + j, lanes + i * kKeys, kKeys * sizeof(float));
        }
      }
    }
  }

  template <class Key>
  void score_block(const Key* const* k, int64_t k_offset, const Key* const* v, int64_t v_offset,
                   int64_t head, int64_t columns) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) score_rows<4>(k, k_offset, v, v_offset, head, i, columns);
    for (; i < rows; ++i) score_rows<1>(k, k_offset, v, v_offset, head, i, columns);
  }

  template <int kRows, class Value>
  void add_rows(const Value* const* v, int64_t offset, const Block& block, int64_t row,
                float* sum) {
    constexpr int64_t kLanes = simd::kLanes;
    const float* p = scores + row * kDecodeBlock + block.from;
    int64_t c = 0, count = block.to - block.from;
    v += block.from, sum += row * sizes.dv;
    for (; c + kVecs * kLanes <= sizes.dv; c += kVecs * kLanes) {
      add_values<kRows, kVecs>(v, offset, count, c, p, kDecodeBlock, sum, sizes.dv, next_values);
    }
    for (; c < sizes.dv; c += kLanes) {
      add_values<kRows, 1>(v, offset, count, c, p, kDecodeBlock, sum, sizes.dv, next_values);
    }
  }

  template <class Value>
  void add_block(const Value* const* v, int64_t offset, const Block& block, float* sum) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_rows<4>(v, offset, block, i, sum);
    for (; i < rows; ++i) add_rows<1>(v, offset, block, i, sum);
  }

  // Scores to probabilities; the head's sums are scaled to its new maximum.
  template <class Probability>
  void soften_block(const Block& block, int64_t head, Probability* p) {
    constexpr int kDegree = std::is_same<Probability, float>::value ? 6 : 4;
    float* sum = sums + head * rows * sizes.dv;
    for (int64_t i = 0; i < rows; i += simd::kLanes) {
      int64_t count = std::min<int64_t>(simd::kLanes, rows - i), state = head * kDecodeRows + i;
      alignas(64) float factors[simd::kLanes];
      SoftenArgs<Probability> a{scores + i * kDecodeBlock,
                                kDecodeBlock,
                                p + i * kDecodeBlock,
                                kDecodeBlock,
                                block.columns,
                                maxima + state,
                                row_sums + state,
                                factors};
      auto visible = [&](int64_t j) {
        return Interval{std::max(block.from, seen[i + j].begin - block.first),
                        std::min(block.to, seen[i + j].end - block.first)};
      };
      soften_rows<kDegree>(a, head_settings[head].scale, count, visible, [](int64_t) {});
      for (int64_t j = 0; j < count; ++j) {
        if (factors[j] != 1.0f) scale_row(sum + (i + j) * sizes.dv, factors[j]);
      }
    }
  }

  void scale_row(float* row, float factor) {
    simd::Vec by = simd::set1(factor);
    for (int64_t j = 0; j < sizes.dv; j += simd::kLanes) {
      simd::store(row + j, simd::load(row + j) * by);
    }
  }

  // Converts a head's keys and values, for types or sizes that have no loads of their own.
  template <class Params>
  void convert_block(const Params& params, const Block& block, int64_t k_offset, int64_t v_offset) {
    for (int64_t j = 0; j < block.columns; ++j) {
      Math *k = keys + j * sizes.qk, *v = values + j * value_stride();
      math_keys[j] = k, math_values[j] = v;
      if (j < block.from || j >= block.to) continue;  // its scores are masked
      if (!params.only_qv) convert_row<Math>(block.k[j] + k_offset, k, params.d, sizes.qk);
      convert_row<Math>(block.v[j] + v_offset, v, params.dv, value_stride());
    }
  }

#ifdef JIT_KERNEL_AMX
  template <class Params>
  void attend_in_tiles(const Params& params, const Block& block, int64_t k_offset, int64_t v_offset,
                       int64_t head) {
    if constexpr (kHasLoads) {
      if (in_place) return attend_rows_in_tiles(block, block.k, k_offset, block.v, v_offset, head);
    }
    convert_block(params, block, k_offset, v_offset);
    for (int64_t j = 0; j < block.columns; ++j) {  // what only fills up was not converted
      if (j >= block.from && j < block.to) continue;
      math_keys[j] = math_keys[block.from], math_values[j] = math_values[block.from];
    }
    attend_rows_in_tiles(block, math_keys, 0, math_values, 0, head);
  }

  // As attend(), with the products in tiles; keys and values are rows of bf16, padded.
  void attend_rows_in_tiles(const Block& block, const bf16* const* k, int64_t k_offset,
                            const bf16* const* v, int64_t v_offset, int64_t head) {
    const bf16* queries = panels + head * 16 * sizes.depth;
    score_in_tile<7>(k, k_offset, v, v_offset, queries, head);
    if (block.columns > 16) score_in_tile<3>(k + 16, k_offset, v + 16, v_offset, queries, head);
    // The values are packed while the tiles still multiply.
    const bf16* value_rows[kDecodeBlock];
    for (int64_t j = 0; j < block.to; ++j) value_rows[j] = v[j] + v_offset;
    for (int64_t j = 0; j < kDecodeBlock; j += 4) {  // memory is asked for between
      next_values.lines(4 * sizes.dv / 32);
      int64_t count = std::min<int64_t>(4, std::max<int64_t>(0, block.to - j));
      pack_values(value_rows + j, count, 4, sizes.dv, sizes.dv, packed + 16 * j, 16 * kDecodeBlock,
                  spare);
    }
    amx_store_scores<7>(rows, scores);
    if (block.columns > 16) amx_store_scores<3>(rows, scores + 16);
    soften_block(block, head, p);
    amx_add_values(p, packed, sums + head * rows * sizes.dv, sizes.dv, next_keys);
  }

  // Scores of 16 keys in tile kTile.
  template <int kTile>
  void score_in_tile(const bf16* const* k, int64_t k_offset, const bf16* const* v, int64_t v_offset,
                     const bf16* queries, int64_t head) {
    amx_zero<kTile>();
    if (sizes.qk) amx_add_scores<kTile>(k, k_offset, queries, sizes.qk, spare, next_keys);
    if (head_settings[head].mix != 1.0f) amx_scale<kTile>(head_settings[head].mix);
    if (sizes.qv) {
      amx_add_scores<kTile>(v, v_offset, queries + 16 * sizes.qk, sizes.qv, spare, next_keys);
    }
  }
#endif

  template <class Params>
  void attend(const Params& params, const Item& item, const Block& block, int64_t head) {
    int64_t k_offset = (item.head_begin + head) * params.k.head;
    int64_t v_offset = (item.head_begin + head) * params.v.head;
    float* sum = sums + head * rows * sizes.dv;
#ifdef JIT_KERNEL_AMX
    if constexpr (std::is_same<Math, bf16>::value) {
      if (amx.active()) return attend_in_tiles(params, block, k_offset, v_offset, head);
    }
#endif
    if constexpr (kHasLoads) {
      if (in_place) {
        score_block(block.k, k_offset, block.v, v_offset, head, block.columns);
        soften_block(block, head, scores);
        return add_block(block.v, v_offset, block, sum);
      }
    }
    convert_block(params, block, k_offset, v_offset);
    score_block(math_keys, 0, math_values, 0, head, block.columns);
    soften_block(block, head, scores);
    add_block(math_values, 0, block, sum);
  }

  // Row pointers of keys first + from .. first + to - 1.
  template <class Params>
  void locate(const Params& params, const Sequence& s, int64_t first, int64_t from, int64_t to,
              Block& block) {
    int64_t skipped = from / kDepth * kDepth;
    block.first = first + skipped, block.from = from - skipped, block.to = to - skipped;
    block.columns = round_up(block.to, kDepth);
    int64_t key = first + from, count = to - from;
    key_rows(params, params.v, s, key, count, 0, block.v + block.from);
    if (!params.only_qv) key_rows(params, params.k, s, key, count, 0, block.k + block.from);
    for (int64_t j = 0; j < block.columns; ++j) {  // masked keys point at one that may be read
      if (j >= block.from && j < block.to) continue;
      block.k[j] = block.k[block.from];
      block.v[j] = block.v[block.from];
    }
  }

  // What to ask for while a head is worked on. Where a token's heads lie side by side: the share of
  // the next block's tokens that makes it complete after the last head; else the same tokens' next
  // head.
  Prefetch prefetch(const Rows<Element>& rows_of, const Element* const* now, int64_t now_count,
                    const Element* const* next, int64_t next_count, const Item& item, int64_t head,
                    int64_t n) {
    constexpr int64_t kSize = sizeof(Element);
    auto at = [](const Element* const* rows) { return reinterpret_cast<const void* const*>(rows); };
    if (rows_of.head == n) {
      int64_t begin = next_count * head / heads, end = next_count * (head + 1) / heads;
      return Prefetch(at(next + begin), end - begin, item.head_begin * n * kSize,
                      heads * n * kSize);
    }
    bool same = head + 1 < heads;
    int64_t offset = (same ? item.head_begin + head + 1 : item.head_begin) * rows_of.head;
    return Prefetch(at(same ? now : next), same ? now_count : next_count, offset * kSize,
                    n * kSize);
  }

  // A head's queries as the tiles want them: one panel, rows past the last one zeros.
  void pack_queries(int64_t head) {
#ifdef JIT_KERNEL_AMX
    if constexpr (std::is_same<Math, bf16>::value) {
      if (!amx.active()) return;
      const bf16* lanes[16];
      std::memset(static_cast<void*>(spare), 0, static_cast<size_t>(sizes.depth) * sizeof(bf16));
      for (int64_t i = 0; i < 16; ++i) {
        lanes[i] = i < rows ? q + (head * rows + i) * sizes.depth : spare;
      }
      transpose_panel(lanes, sizes.depth, panels + head * 16 * sizes.depth);
    }
#else
    (void)head;
#endif
  }

  // The item's query rows and settings; returns the keys that any of them sees.
  template <class Params>
  Interval load(const Params& params, const Sequence& s, const Item& item) {
    Interval all{item.key_end, item.key_begin};
    std::memset(sums, 0, static_cast<size_t>(heads * rows * sizes.dv) * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      seen[i] = visible_keys(params, (item.row_begin + i) / params.group, s.sq, s.sk);
      all.begin = std::min(all.begin, std::max(seen[i].begin, item.key_begin));
      all.end = std::max(all.end, std::min(seen[i].end, item.key_end));
    }
    for (int64_t h = 0; h < heads; ++h) {
      int64_t head_k = item.head_begin + h;
      head_settings[h] = {score_scale_of(params, item.batch, head_k),
                          qk_factor(params, item.batch, head_k)};
      for (int64_t i = 0; i < rows; ++i) {
        Math* to = q + (h * rows + i) * sizes.depth;
        load_query(params, s, sizes, head_k, item.row_begin + i, to, spare_row, turned);
      }
      for (int64_t i = 0; i < kDecodeRows; ++i) {
        maxima[h * kDecodeRows + i] = -kInfinity, row_sums[h * kDecodeRows + i] = 0.0f;
      }
      pack_queries(h);
    }
    return all;
  }

  // A block of keys passes all heads before the next: a token's heads lie side by side in memory,
  // so that pages (4 KiB) are opened once.
  template <class Params>
  void run(const Params& params, const Sequence& s, const Item& item, const Partials& parts) {
    Interval all = load(params, s, item);
    int64_t first = item.key_begin + (all.begin - item.key_begin) / kDecodeBlock * kDecodeBlock;
    auto locate_at = [&](int64_t at, Block& block) {
      locate(params, s, at, std::max<int64_t>(0, all.begin - at),
             std::min(kDecodeBlock, all.end - at), block);
    };
    Block *now = blocks, *next = blocks + 1;
    if (first < all.end) locate_at(first, *now);
    for (; first < all.end; first += kDecodeBlock, std::swap(now, next)) {
      next->columns = 0;
      if (first + kDecodeBlock < all.end) locate_at(first + kDecodeBlock, *next);
      for (int64_t h = 0; h < heads; ++h) {
        if (!params.only_qv) {
          next_keys =
              prefetch(params.k, now->k, now->columns, next->k, next->columns, item, h, params.d);
        }
        next_values =
            prefetch(params.v, now->v, now->columns, next->v, next->columns, item, h, params.dv);
        attend(params, item, *now, h);
      }
    }
    for (int64_t i = 0; i < heads * rows; ++i) write(params, s, item, parts, i);
  }

  template <class Params>
  void write(const Params& params, const Sequence& s, const Item& item, const Partials& parts,
             int64_t i) {
    const float* sum = sums + i * sizes.dv;
    int64_t h = i / rows, at = h * kDecodeRows + i % rows;
    RowState state{maxima[at], row_sums[at]};
    if (item.part < 0) {
      return write_row(params, s, item.batch, item.head_begin + h, item.row_begin + i % rows,
                       head_settings[h].scale, sum, state);
    }
    std::memcpy(parts.sums + (item.part + i) * sizes.dv, sum,
                static_cast<size_t>(sizes.dv) * sizeof(float));
    parts.states[item.part + i] = state;
  }
};

}  // namespace jit_kernel
