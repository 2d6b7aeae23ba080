// The Hopper kernel that prepares values in e4m3 compiled for the CPU: a block's threads run one
// after the other, and twice, as what one writes others read behind a barrier.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>

// In place of what a CUDA compiler has.
#define __device__
#define __forceinline__ inline
#define __shared__ static
using std::max;
using std::min;
struct Place {
  unsigned x, y, z;
};
static Place threadIdx, blockIdx;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void __syncthreads() {}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}

#include "flash_attention_v3/hopper/prefill/fp8_values.cuh"

namespace {

using namespace jit_kernel::hopper;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kColumns = 256, kKeys = 64;  // those of the kernel

struct Tile {
  static constexpr int kHeadDimV = kColumns, kKeys = ::kKeys;
};

const int* ints(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<const int*>(tensor.value().data_ptr()) : nullptr;
}

// v: bytes of (batch, keys, heads, columns), or (keys, heads, columns) with cu_seqlens_k.
void prepare(TensorView v, TensorView prepared, Optional<TensorView> cu_seqlens_k,
             Optional<TensorView> seqused_k, int64_t batch, int64_t blocks) {
  PrepareParams params = {};
  const int rows = v.ndim() - 3;
  params.v = static_cast<const unsigned char*>(v.data_ptr());
  params.prepared = static_cast<unsigned char*>(prepared.data_ptr());
  params.cu_seqlens_k = ints(cu_seqlens_k);
  params.seqused_k = ints(seqused_k);
  params.batch_stride = rows == 1 ? v.stride(0) : 0;
  params.row_stride = v.stride(rows);
  params.head_stride = v.stride(rows + 1);
  params.batch = static_cast<int>(batch);
  params.seqlen_k = static_cast<int>(v.size(rows));
  params.head_dim_v = static_cast<int>(v.size(rows + 2));
  params.blocks = static_cast<int>(blocks);
  for (unsigned head = 0; head < v.size(rows + 1); ++head) {
    for (unsigned block = 0; block < blocks; ++block) {
      blockIdx = {block, head, 0};
      for (unsigned run = 0; run < 2 * kPreparerThreads; ++run) {
        threadIdx = {run % kPreparerThreads, 0, 0};
        prepare_values<kColumns, kKeys>(params);
      }
    }
  }
}

// Of one tile; once and once more, as two warpgroups do.
void keep(TensorView tile, int64_t begin, int64_t end) {
  for (unsigned run = 0; run < 256; ++run) {
    threadIdx = {run % 128, 0, 0};
    keep_prepared_values<Tile>(static_cast<char*>(tile.data_ptr()), static_cast<int>(begin),
                               static_cast<int>(end));
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(keep, keep);
