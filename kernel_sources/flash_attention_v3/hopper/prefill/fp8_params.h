// The arguments of the kernels in e4m3: those of forward attention, and factors of q, k and v.
// Included by host and device, so it uses only the language's own types.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"

namespace jit_kernel::hopper {

struct Fp8Params : ForwardParams {
  Descale q_descale, k_descale, v_descale;
};

}  // namespace jit_kernel::hopper
