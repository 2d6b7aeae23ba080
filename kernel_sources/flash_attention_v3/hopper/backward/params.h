// The arguments of the backward kernels. Included by the launcher too, so it uses only the
// language's own types.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

// Rows of a tensor of 16-bit elements; strides in elements, the batch's 0 of a ragged one.
struct GradientRows {
  void* data;
  long long batch_stride, row_stride, head_stride;
};

// Queries are counted in tiles of kQueries rows, keys in tiles of kKeys. The tiles of a sequence
// follow each other; of a dense tensor each sequence has `tiles_per_q`, of a ragged one it begins
// at tile cu_seqlens[b] / rows + b, which leaves room for the last tile of each.
struct BackwardParams {
  TensorRows q, grad_out, k, v;
  GradientRows grad_q, grad_k, grad_v;
  GradientRows rows_out, rows_grad_out;  // out and its gradient, as prepare reads them
  const float* lse;
  const float* grad_lse;  // null when there is none
  long long lse_batch_stride, lse_head_stride, grad_lse_batch_stride, grad_lse_head_stride,
      grad_lse_row_stride;
  const int* cu_seqlens_q;  // each null for a dense tensor
  const int* cu_seqlens_k;
  const int* seqused_q;
  const int* seqused_k;
  // Work memory, by query head and row of a tile: lse as an exponent of 2, infinite in a row that
  // is not there or sees no key, and D; the sums of grad_q, tile by tile in the order of
  // accumulators; for sums in order, how many keys' tiles have been added to a part of a tile.
  float* lse_log2;
  float* delta;
  float* sums;
  int* added;                          // null where any order will do
  int batch, heads_q, heads_k, group;  // group: query heads for a key head
  int seqlen_q, seqlen_k;              // of dense tensors; of a ragged one all its rows
  int head_dim, head_dim_v;
  int tiles_q, tiles_k;          // of all sequences
  int tiles_per_q, tiles_per_k;  // of a sequence of a dense tensor
  int heads_at_a_time;           // of key heads and sequences, whose queries share the L2 cache
  float scale_log2;  // scores to exponents of 2: softmax_scale * log2(e), with softcap: softcap *
                     // log2(e)
  float softcap_scale;                     // softmax_scale / softcap
  float softmax_scale;                     // of the gradients of q and k
  int window_left, window_right;           // a large number when unbounded
  int chunk;                               // 0 when there are none
  unsigned chunk_multiplier, chunk_shift;  // as ForwardParams has them
};

}  // namespace jit_kernel::hopper
