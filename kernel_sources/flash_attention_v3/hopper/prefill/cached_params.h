// The arguments of the kernels on cached keys: those of forward attention, and where keys lie.
// Included by host and device, so it uses only the language's own types.
//
// A cache is pages of rows. The rows of a sequence are numbered through its pages, and keys start
// at its row `leftpad`. A dense cache has one page a batch entry. Blocks of keys begin at multiples
// of their size in such rows, so that a box of the copy engine never crosses a page's end.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

// Addresses of rows that are copied one by one; strides in bytes.
struct CacheRows {
  const char* base;
  long long page_stride, row_stride, head_stride;
  int columns;
};

// A part of a tile's keys leaves, of each row, its output and so many columns more: what a thread
// knows of its rows. Less than so many keys are not worth a part; of one tile there are at most
// 128: both are as of the portable kernels.
enum : int { kPartStateColumns = 8, kLeastKeysOfPart = 256, kMostPartsOfTile = 128 };

// To begin and to end a part takes as long as so many blocks of keys: 4 us. A section of a sequence
// too large for the L2 cache has at least so many heads.
enum : int { kBlocksOfEnd = 2, kHeadsOfSection = 8 };

struct CachedParams : ForwardParams {
  const int* page_table;       // null for a dense cache
  const int* cache_batch_idx;  // each null where there is none
  const int* cache_leftpad;
  const int* cu_seqlens_k_new;
  const TileFactors* factors;  // of each sequence and key head; null where the cache has 16 bits
  const int* draft_mask;
  long long draft_mask_stride;
  int draft_words;         // of a row of draft_mask, 32 keys each; 0 where there is none
  long long table_stride;  // entries from one row of page_table to the next
  int seqlen_k_new;  // new keys of each sequence, already in the cache, without cu_seqlens_k_new
  int capacity;      // rows of one sequence
  int page_size;
  unsigned page_multiplier,
      page_shift;       // floor(row / page_size) as of `chunk`; 0 for a dense cache
  int box_rows, boxes;  // rows of a box and boxes of a block of keys; 0 where rows are copied one
                        // by one
  CacheRows k_rows, v_rows;  // for the latter
  int num_splits;  // parts that the keys of a tile are cut into; 0: as many as fill the machine
  int most_parts;  // for which there is memory, of all tiles; 0: keys are not cut
  float* parts;    // what they leave
  int* arrivals;   // zeros, one for each 16 rows of every tile: how many parts have come
  int pack_shift;  // a tile's row is query token row >> pack_shift, and of 1 << pack_shift query
                   // heads the one of its low bits
};

}  // namespace jit_kernel::hopper
