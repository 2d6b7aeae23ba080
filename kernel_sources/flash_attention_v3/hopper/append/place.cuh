// Where a new row comes from and where it goes. Whatever the index tensors hold, nothing is read or
// written outside the tensors.
#pragma once

#include "flash_attention_v3/hopper/append/params.h"

namespace jit_kernel::hopper {

// A row of a source: a token's head.
struct Row {
  bool valid;
  int batch, token;  // the sequence, and which of its tokens
  unsigned tensor_row, head;
};

struct Place {
  const char* source;
  char* destination;  // null where nothing is to be written
  int position;       // in the rotary tables
  float factor;       // of a cache in e4m3: what the row is divided by
};

__device__ __forceinline__ unsigned divide(unsigned n, const Divisor& by) {
  return __umulhi(2 * n, by.multiplier) >> by.shift;
}

// The first sequence that ends behind a row, `batch` where none does. Eight parts a step, whose
// seven loads do not wait for each other: two steps for 64 sequences where halving takes seven.
__device__ __forceinline__ int sequence_of(const int* cu_seqlens, int batch, int row) {
  constexpr int kParts = 8;
  const int* ends = cu_seqlens + 1;
  int first = 0;
  int last = batch;  // the answer is in [first, last]
  while (first < last) {
    const int step = (last - first) / kParts + 1;
    int before = 0;
#pragma unroll
    for (int part = 1; part < kParts; ++part) {
      const int at = first + part * step - 1;
      before += at < last && ends[at] <= row;
    }
    first += before * step;
    last = min(last, first + step - 1);
  }
  return first;
}

__device__ __forceinline__ Row row_of(const AppendParams& params, const AppendPart& part,
                                      unsigned item) {
  Row row = {item < part.items, 0, 0, 0, 0};
  row.tensor_row = row.valid ? divide(item, part.heads) : 0;
  row.head = item - row.tensor_row * part.heads.divisor;
  if (part.cu_seqlens == nullptr) {
    row.batch = static_cast<int>(divide(row.tensor_row, part.tokens));
    row.tensor_row -= row.batch * part.tokens.divisor;
    row.token = static_cast<int>(row.tensor_row);
  } else if (row.valid) {
    row.batch = sequence_of(part.cu_seqlens, params.batch, static_cast<int>(row.tensor_row));
    row.valid = row.batch < params.batch;
    if (row.valid) row.token = static_cast<int>(row.tensor_row) - part.cu_seqlens[row.batch];
    row.valid = row.valid && row.token >= 0;
  }
  return row;
}

__device__ __forceinline__ int load_index(const int* indices, const Row& row, int otherwise) {
  return indices != nullptr && row.valid ? indices[row.batch] : otherwise;
}

// Of a row that goes to a place of a cache in e4m3.
__device__ __forceinline__ float factor_of(const AppendPart& part, const Row& row, int block,
                                           unsigned slot) {
  float factor = 1.f;
  if (part.descale != nullptr) {
    factor = part.descale[row.batch * part.descale_batch + row.head * part.descale_head];
  }
  if (part.scales == nullptr) return factor;
  return factor * part.scales[block * part.scales_batch + slot * part.scales_token +
                              row.head * part.scales_head];
}

// The rows of new tokens in the cache. All rows take each step before the next one, so that their
// loads wait for memory together.
template <bool kQuantises>
__device__ __forceinline__ void find_cache_rows(const AppendParams& params, const AppendPart& part,
                                                const Row (&rows)[kAppendRows],
                                                const int (&cached)[kAppendRows],
                                                Place (&places)[kAppendRows]) {
  int blocks[kAppendRows];
  unsigned slots[kAppendRows];
  bool valid[kAppendRows];
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    blocks[r] = load_index(params.cache_batch_idx, rows[r], rows[r].batch);
    slots[r] = static_cast<unsigned>(cached[r]) + static_cast<unsigned>(rows[r].token);
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    // Below zero, as unsigned, is past the end, too.
    valid[r] = rows[r].valid && slots[r] < static_cast<unsigned>(params.capacity) &&
               static_cast<unsigned>(blocks[r]) < static_cast<unsigned>(params.cache_rows);
    if (params.page_table == nullptr) continue;
    const unsigned page = divide(slots[r], params.page_size);
    const int* const entry = params.page_table + blocks[r] * params.page_table_stride + page;
    blocks[r] = valid[r] ? *entry : 0;
    slots[r] -= page * params.page_size.divisor;
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    valid[r] &= static_cast<unsigned>(blocks[r]) < static_cast<unsigned>(params.cache_blocks);
    places[r].destination = valid[r] ? part.destination + blocks[r] * part.destination_batch +
                                           slots[r] * part.destination_token +
                                           rows[r].head * part.destination_head
                                     : nullptr;
    if constexpr (kQuantises) {
      places[r].factor = valid[r] ? factor_of(part, rows[r], blocks[r], slots[r]) : 1.f;
    }
  }
}

// The places of items `first`, `first + step` and so on.
template <bool kQuantises>
__device__ __forceinline__ void find_places(const AppendParams& params, const AppendPart& part,
                                            bool is_query, unsigned first, unsigned step,
                                            Place (&places)[kAppendRows]) {
  Row rows[kAppendRows];
  int cached[kAppendRows];
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) rows[r] = row_of(params, part, first + r * step);
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    cached[r] = load_index(params.cache_seqlens, rows[r], 0);
    places[r].position = load_index(params.rotary_seqlens, rows[r], cached[r]);
  }
#pragma unroll
  for (int r = 0; r < kAppendRows; ++r) {
    const Row& row = rows[r];
    const long long batch = part.cu_seqlens == nullptr ? row.batch : 0;
    places[r].source = part.source + batch * part.source_batch +
                       row.tensor_row * part.source_token + row.head * part.source_head;
    places[r].destination = part.destination + batch * part.destination_batch +
                            row.tensor_row * part.destination_token +
                            row.head * part.destination_head;
    if (!row.valid) places[r].destination = nullptr;
    if (!is_query || params.by_token) places[r].position += row.token;
  }
  if (!is_query) find_cache_rows<kQuantises>(params, part, rows, cached, places);
}

}  // namespace jit_kernel::hopper
