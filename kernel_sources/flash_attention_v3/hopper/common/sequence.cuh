// Lengths of sequences: from the device, or of a dense tensor.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

__device__ __forceinline__ bool has_lengths(const ForwardParams& params) {
  return params.cu_seqlens_q != nullptr || params.cu_seqlens_k != nullptr ||
         params.seqused_q != nullptr || params.seqused_k != nullptr;
}

__device__ __forceinline__ int sequence_length(int batch, int dense, const int* cu_seqlens,
                                               const int* seqused) {
  if (seqused != nullptr) return max(0, seqused[batch]);
  return cu_seqlens != nullptr ? max(0, cu_seqlens[batch + 1] - cu_seqlens[batch]) : dense;
}

}  // namespace jit_kernel::hopper
