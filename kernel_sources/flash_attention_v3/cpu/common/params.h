// What one call asks for: tensors as pointers and strides, settings, and each sequence's lengths.
#pragma once

#include <cstdint>
#include <type_traits>

#include "flash_attention_v3/cpu/common/mask.h"
#include "jit_kernel/cpu/element.h"

namespace jit_kernel {

// A tensor whose last dimension has unit stride. Strides count elements. Which of them are used
// depends on the layout: ragged rows have no batch, paged keys have a page in its place.
template <class Element>
struct Rows {
  Element* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;  // strides

  explicit operator bool() const { return data != nullptr; }
  Element* at(int64_t b, int64_t r, int64_t h) const {
    return data + b * batch + r * row + h * head;
  }
};

// (b, heads) factors; 1 where there are none.
struct Descale {
  const float* data = nullptr;
  int64_t batch = 0, head = 0;

  float at(int64_t b, int64_t h) const { return data ? data[b * batch + h * head] : 1.0f; }
};

template <class Element>
struct ForwardParams {
  using Query = QueryOf<Element>;
  using Key = KeyOf<Element>;
  using Output = typename OutputOf<Element>::type;
  static constexpr bool kHasFactors = std::is_same<Key, e4m3>::value;

  Rows<const Query> q, qv, k_new, v_new, rotary_cos,
      rotary_sin;                      // rotary tables: row stride only
  Rows<const Key> k_stored, v_stored;  // new ones that are what a cache of another type holds
  Rows<Key> k, v;                      // written when tokens are appended
  Rows<const float> k_scale, v_scale;  // a factor for each token and head, where there are some
  Rows<Output> out;
  Rows<float> lse;  // null when not asked for

  int64_t batch = 0, heads = 0, heads_k = 0, group = 0, d = 0, dv = 0;
  int64_t rows_q = 0, rows_k = 0, rows_new = 0;  // per sequence, where they are not ragged
  int64_t page_size = 0, table_width = 0;        // 0: not paged
  const int32_t *page_table = nullptr, *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  const int32_t *cu_seqlens_k_new = nullptr, *seqused_q = nullptr, *seqused_k = nullptr;
  const int32_t *cache_batch_idx = nullptr, *cache_leftpad = nullptr, *rotary_seqlens = nullptr;
  Descale q_descale, k_descale, v_descale;
  const float* sinks = nullptr;  // (heads,)
  DraftMask draft_mask;          // of the first row of q; begin is each sequence's

  float softmax_scale = 1.0f, softcap = 0.0f;
  int64_t window_left = -1, window_right = -1, attention_chunk = 0;
  int64_t rotary_dim = 0;
  bool rotary_interleaved = false, only_qv = false;
  bool stream_out = false;  // whether out is written past the caches: its lines are whole ones
  int64_t num_splits = 1, num_threads = 1;

  bool has_new() const { return k_new || k_stored; }
  // Whether the keys that a query sees depend on its place; then rotary positions go by token.
  bool is_masked() const { return window_left >= 0 || window_right >= 0 || attention_chunk > 0; }
};

// One sequence of the batch.
struct Sequence {
  int64_t q_begin = 0;  // first row when ragged, else 0
  int64_t q_batch = 0;  // batch index of q and out when not ragged, else 0
  int64_t sq = 0, sk = 0;
  int64_t k_begin = 0;  // first key's row: in ragged keys, or in its cache, left padding skipped
  int64_t k_batch = 0;  // row of the cache, or of the page table
  int64_t new_begin = 0, new_batch = 0, new_tokens = 0;
  int64_t rotary_begin = 0;
};

template <class Params>
inline Sequence sequence_of(const Params& p, int64_t b) {
  Sequence s;
  s.q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
  s.q_batch = p.cu_seqlens_q ? 0 : b;
  s.sq = p.seqused_q      ? p.seqused_q[b]
         : p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - s.q_begin
                          : p.rows_q;
  s.k_batch = p.cu_seqlens_k ? 0 : p.cache_batch_idx ? p.cache_batch_idx[b] : b;
  int64_t first = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
  int64_t leftpad = p.cache_leftpad ? p.cache_leftpad[b] : 0;
  int64_t present = p.seqused_k      ? p.seqused_k[b]
                    : p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - first
                                     : p.rows_k;
  if (p.has_new()) {
    s.new_begin = p.cu_seqlens_k_new ? p.cu_seqlens_k_new[b] : 0;
    s.new_batch = p.cu_seqlens_k_new ? 0 : b;
    s.new_tokens = p.cu_seqlens_k_new ? p.cu_seqlens_k_new[b + 1] - s.new_begin : p.rows_new;
  }
  s.k_begin = first + leftpad;
  s.sk = present - leftpad + s.new_tokens;
  s.rotary_begin = p.rotary_seqlens ? p.rotary_seqlens[b] : present;
  return s;
}

// The row of key j (counted without left padding) of one key/value head; pages are read in place.
template <class Element, class Params>
inline Element* key_row(const Params& p, const Rows<Element>& rows, const Sequence& s, int64_t j,
                        int64_t head) {
  int64_t at = s.k_begin + j;
  if (!p.page_size) return rows.at(s.k_batch, at, head);
  int64_t page = p.page_table[s.k_batch * p.table_width + at / p.page_size];
  return rows.at(page, at % p.page_size, head);
}

// The factor of key j of one key/value head; 1 where tokens have none.
template <class Params>
inline float key_factor(const Params& p, const Rows<const float>& factors, const Sequence& s,
                        int64_t j, int64_t head) {
  return factors ? *key_row(p, factors, s, j, head) : 1.0f;
}

// Query row r of a sequence and key/value head: token r / group of head r % group, so that the
// heads of a group share every key that is read or packed. next() is without a division.
struct QueryRow {
  int64_t token, head, first_head, group;

  template <class Params>
  QueryRow(const Params& p, int64_t head_k, int64_t r)
      : token(r / p.group),
        head(head_k * p.group + r % p.group),
        first_head(head_k * p.group),
        group(p.group) {}

  void next() {
    if (++head == first_head + group) {
      head = first_head;
      ++token;
    }
  }
};

// The rows of keys first .. first + count - 1.
template <class Element, class Params>
inline void key_rows(const Params& p, const Rows<Element>& rows, const Sequence& s, int64_t first,
                     int64_t count, int64_t head, const Element** out) {
  for (int64_t j = 0; j < count;) {
    Element* row = key_row(p, rows, s, first + j, head);
    int64_t run = count - j;
    if (p.page_size) {
      int64_t left = p.page_size - (s.k_begin + first + j) % p.page_size;
      if (left < run) run = left;
    }
    for (int64_t end = j + run; j < end; ++j, row += rows.row) out[j] = row;
  }
}

}  // namespace jit_kernel
