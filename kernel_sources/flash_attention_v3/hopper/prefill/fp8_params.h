// The arguments of the kernels in e4m3: those of forward attention, and factors of q, k and v.
// Included by host and device, so it uses only the language's own types.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

struct Fp8Params : ForwardParams {
  Descale q_descale, k_descale, v_descale;
  const unsigned char* prepared;  // values as fp8_values.cuh lays them out; null: `v` holds them
  int prepared_blocks;            // of kPreparedKeys keys, of each key head
};

// Values are prepared in blocks of so many keys; each sequence begins with one of its own.
enum : int { kPreparedKeys = 128, kPreparerThreads = 256 };

// How values are prepared for it; strides in bytes.
struct PrepareParams {
  const unsigned char* v;
  unsigned char* prepared;
  const int *cu_seqlens_k, *seqused_k;  // each null for a dense tensor
  long long batch_stride, row_stride, head_stride;
  int batch, seqlen_k;  // seqlen_k: of a dense tensor
  int head_dim_v, blocks;
};

}  // namespace jit_kernel::hopper
