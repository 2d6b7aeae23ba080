// Rows of a sequence by the copy engine: where a tensor map holds them, and into shared memory.
#pragma once

#include "flash_attention_v3/hopper/common/params.h"
#include "jit_kernel/cuda/tma.cuh"

namespace jit_kernel::hopper {

// Coordinates of a sequence in a tensor's map; row is added to `row`.
struct MapPlace {
  int row, place;
};

__device__ __forceinline__ MapPlace map_place(const TensorRows& rows, const int* cu_seqlens,
                                              int batch, int length) {
  const int offset = cu_seqlens != nullptr ? cu_seqlens[batch] : 0;
  return {
      rows.bound > 0 ? rows.bound - length : 0,
      (cu_seqlens != nullptr ? 0 : batch * rows.batch_step) + (offset + length) * rows.row_step};
}

// Copies `kRows` rows of all columns, panel by panel.
template <int kColumns, int kPanel, int kRows, int kElementBytes = 2>
__device__ __forceinline__ void load_rows(u32 destination, const TensorRows& rows, u32 barrier,
                                          u64 policy, const MapPlace& at, int row, int head) {
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanel; ++panel) {
    tma_load(destination + panel * kRows * kPanel * kElementBytes, &rows.map, barrier, policy,
             panel * kPanel, at.row + row, head, at.place, rows.wrap);
  }
}

}  // namespace jit_kernel::hopper
