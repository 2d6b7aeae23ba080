// The arguments that the launcher passes to the MLA kernel. Included by both, so it uses only the
// language's own types.
#pragma once

#include "flash_attention_v3/hopper/decode/params.h"

namespace jit_kernel::hopper {

// q and k have 64 columns, v and qv head_dim_v: scores are q k + qv v. All strides in elements.
struct MlaParams : DecodeParams {
  const void* qv;
  long long qv_batch_stride, qv_row_stride, qv_head_stride;
  int row_tiles;  // of 64 packed query rows, of the longest sequence
  bool only_qv;   // q and k are not read
  // Of an e4m3 cache: the type of q and qv, and of the result.
  bool e4m3_q, bf16_q, bf16_out;
};

}  // namespace jit_kernel::hopper
