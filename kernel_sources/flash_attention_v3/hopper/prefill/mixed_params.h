// The arguments of the kernels on a cache in e4m3 beside queries of 16 bits: those on cached keys,
// and factors. Included by host and device, so it uses only the language's own types.
#pragma once

#include "flash_attention_v3/hopper/prefill/cached_params.h"
#include "flash_attention_v3/hopper/prefill/fp8_params.h"

namespace jit_kernel::hopper {

struct MixedCachedParams : CachedParams {
  Descale q_descale, k_descale, v_descale;
};

}  // namespace jit_kernel::hopper
