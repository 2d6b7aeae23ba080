// The factors of queries, keys and values in e4m3, as the decode kernels take them.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include "flash_attention_v3/hopper/decode/params.h"
#include "jit_kernel/cuda/tensor.h"

namespace jit_kernel::hopper {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

inline void set_q_descale(DecodeParams& params, const Optional<TensorView>& descale) {
  params.q_descale = cuda::data_of<float>(descale);
  if (!descale.has_value()) return;
  params.q_descale_batch_stride = descale.value().stride(0);
  params.q_descale_head_stride = descale.value().stride(1);
}

inline void set_scales(DecodeRows& rows, const Optional<TensorView>& descale,
                       const Optional<TensorView>& scales) {
  rows.descale = cuda::data_of<float>(descale);
  if (descale.has_value()) {
    rows.descale_batch_stride = descale.value().stride(0);
    rows.descale_head_stride = descale.value().stride(1);
  }
  rows.scales = cuda::data_of<float>(scales);
  if (!scales.has_value()) return;
  rows.scales_place_stride = scales.value().stride(0);
  rows.scales_row_stride = scales.value().stride(1);
  rows.scales_head_stride = scales.value().stride(2);
}

}  // namespace jit_kernel::hopper
