// The arguments that the launcher passes to the kernel. Included by both, so it uses only the
// language's own types.
#pragma once

namespace jit_kernel::hopper {

// The bytes of a CUtensorMap.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// How a tensor's tiles are reached by the copy engine. Map dimensions: (column, row, head, place,
// wrap). Dense: place is the batch, the map's own row count bounds a sequence. Where the kernel
// bounds it, with lengths on the device (cu_seqlens, seqused) and for values behind a mask, which
// end where a tile of queries sees no more, the map has `bound` = 2^30 rows, and a sequence of n
// rows is addressed as the last n of them, so that the engine fills rows past its end with 0;
// `place` moves the base forward in steps of the strides' common divisor, and `wrap` takes 2^30
// rows back by 64-bit overflow of the address (the stride of `wrap` is 2^34 - the row's).
struct TensorRows {
  TensorMap map;
  int bound;
  int batch_step;
  int row_step;
  int wrap;
};

// One factor for each sequence and key head; strides in elements.
struct Descale {
  const float* data;  // null: all are 1
  long long batch_stride, head_stride;
};

// The factors of a tile's scores and values, of what is in e4m3 or was.
struct TileFactors {
  float scale_log2;  // as ForwardParams has it, with the factors of q and k where scores are not
                     // capped; never below kLeastFp8Scale
  float before;      // scores are multiplied by it first, where they are capped or it is not 1
  float values;      // the factor of v
};

// All strides in elements.
struct ForwardParams {
  TensorRows q, k, v;
  void* out;
  float* lse;               // null when not wanted
  const void* sinks;        // (heads_q,), null when there are none
  const int* cu_seqlens_q;  // each null for a dense tensor
  const int* cu_seqlens_k;
  const int* seqused_q;
  const int* seqused_k;
  int* progress;  // two zeros: tiles handed out, blocks done; the last block zeroes them again
  long long out_batch_stride, out_row_stride, out_head_stride;
  long long lse_batch_stride, lse_head_stride;
  int batch, heads_q, group;  // group: query heads for a key head
  int seqlen_q, seqlen_k;     // of dense tensors; seqlen_q of a ragged one: all its rows
  int head_dim_v;
  float scale_log2;  // scores to exponents of 2: softmax_scale * log2(e), with softcap: softcap *
                     // log2(e)
  float softcap_scale;            // softmax_scale / softcap
  int window_left, window_right;  // a large number when unbounded
  int chunk;                      // 0 when there are none
  unsigned chunk_multiplier,
      chunk_shift;  // floor(p / chunk) = 2 p chunk_multiplier / 2^(32 + shift)
  int l2_tokens;    // keys of one key head, with their values, that the L2 cache should hold at a
                    // time
  bool sinks_are_elements;  // sinks in the inputs' dtype, else float32
  bool clear_rest;          // rows that hold no query become 0, their lse -inf
};

}  // namespace jit_kernel::hopper
