// The arguments that the launcher passes to the decode kernel. Included by both, so it uses only
// the language's own types.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

// Keys or values of a cache. A place is a page, or a sequence's entry of a dense cache.
struct DecodeRows {
  TensorMap map;     // (column, row, panel, head, place), where the copy engine loads
  const void* data;  // where threads load, strides in elements
  long long place_stride, row_stride, head_stride;
  // Of e4m3: a scale of each token and head, and one of each sequence and head; null for 1.
  const float* scales;
  const float* descale;
  long long scales_place_stride, scales_row_stride, scales_head_stride;
  long long descale_batch_stride, descale_head_stride;
};

// All strides in elements.
struct DecodeParams {
  DecodeRows k, v;
  const void* q;
  const float* q_descale;  // of q in e4m3: of each sequence and head; null for 1
  long long q_descale_batch_stride, q_descale_head_stride;
  void* out;
  float* lse;         // null when not wanted
  const void* sinks;  // (heads_q,), null when there are none
  const int* cu_seqlens_q;
  const int* seqused_q;
  const int* seqused_k;         // rows of the cache in use before this call's new ones
  const int* cu_seqlens_k_new;  // new rows of each sequence; else new_rows for each
  const int* page_table;
  const int* cache_batch_idx;
  const int* cache_leftpad;
  const int* draft_mask;  // null when there is none
  float* partials;        // slots for partial results, as partial_of and range_of find them
  int* counters;          // one for each part and head, zero before and after each launch
  long long q_batch_stride, q_row_stride, q_head_stride;
  long long out_batch_stride, out_row_stride, out_head_stride;
  long long lse_batch_stride, lse_head_stride;
  long long page_table_stride, draft_mask_stride;
  int batch, heads_k, group;
  int tiles;        // that a sequence's query tokens are cut into; 1: all are in one
  int all_tiles;    // of all sequences
  int tile_tokens;  // where there are several
  unsigned tiles_multiplier, tiles_shift;
  int seqlen_q;  // of dense queries; of ragged ones all their rows
  int rows_k;    // rows of a cache entry, where no length is given
  int new_rows;
  int head_dim, head_dim_v;
  int heads_of_block;  // key heads of a thread block: one or two
  int parts;           // thread blocks for each of them
  int in_clusters;  // a cluster of kClusterParts blocks for each sequence and key heads of a block
  unsigned parts_multiplier, parts_shift;
  int ranges_log2;   // fixed ranges: 2^ranges_log2 of a short sequence at most; 0: free splits
  int range_blocks;  // a range has at least so many blocks
  int range_slots;   // slots of a sequence whose ranges several parts share
  int first_kept;   // behind those of all sequences: levels of the tree of ranges that streams keep
  int kept_levels;  // of each stream
  bool halves;      // each of a block's two streams has half of a sequence's ranges
  int place_rows;   // rows of a place: of a page, or of a cache entry
  int box_rows;     // rows of a box of the copy engine; 0: threads load
  int box_panels;   // and its panels, of one head or of two
  int boxes_log2;   // boxes of rows of a stage
  int copies;       // boxes of a stage
  int copy_warps;   // warps that ask for them
  unsigned long long policy;  // of the L2 cache
  int draft_words;
  float scale_log2;  // scores to exponents of 2: softmax_scale * log2(e), with softcap: softcap *
                     // log2(e)
  float softcap_scale;                     // softmax_scale / softcap; 0 without softcap
  int window_left, window_right;           // a large number when unbounded
  int chunk;                               // 0 when there are none
  unsigned chunk_multiplier, chunk_shift;  // as in ForwardParams; the same for the group
  unsigned group_multiplier, group_shift;
  unsigned place_multiplier, place_shift;
  bool q_is_e4m3;           // over an e4m3 cache, with a result in bf16
  bool sinks_are_elements;  // sinks in the inputs' dtype, else float32
  bool clear_rest;          // rows that hold no query become 0, their lse -inf
};

}  // namespace jit_kernel::hopper
