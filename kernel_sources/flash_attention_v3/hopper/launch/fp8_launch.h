// Launches the prefill kernels in e4m3, and before them, where there is memory for it, the kernel
// that prepares their values.
#pragma once

#include "flash_attention_v3/hopper/launch/prefill_launch.h"

namespace jit_kernel::hopper {

inline Descale descale_of(const Optional<TensorView>& factors) {
  if (!factors.has_value()) return {};
  const TensorView& x = factors.value();
  return {data_of<float>(factors), x.stride(0), x.stride(1)};
}

// Blocks of prepared keys of each key head, as fp8_values.cuh places them.
inline int64_t prepared_blocks(const TensorView& v, bool ragged, int64_t batch) {
  const int64_t rows = v.size(v.ndim() - 3);
  if (ragged) return rows / kPreparedKeys + batch;
  return batch * std::max<int64_t>(1, (rows + kPreparedKeys - 1) / kPreparedKeys);
}

// `prepared`: a vector of bytes, enough for the call.
inline void launch_prepare(int64_t handle, Fp8Params& params, const Shape& shape,
                           const TensorView& v, const TensorView& prepared, int device) {
  const bool ragged = params.cu_seqlens_k != nullptr;
  const int64_t blocks = prepared_blocks(v, ragged, params.batch);
  const int64_t heads = v.size(v.ndim() - 2), each = int64_t{kPreparedKeys} * shape.head_dim_v;
  if (prepared.numel() < blocks * heads * each) {
    TVM_FFI_THROW(ValueError) << "prepared has " << prepared.numel() << " bytes; it must have "
                              << blocks * heads * each;
  }
  PrepareParams prepare = {};
  prepare.v = static_cast<const unsigned char*>(data_of(v));
  prepare.prepared = static_cast<unsigned char*>(data_of(prepared));
  prepare.cu_seqlens_k = params.cu_seqlens_k;
  prepare.seqused_k = params.seqused_k;
  prepare.batch_stride = ragged ? 0 : v.stride(0);
  prepare.row_stride = v.stride(v.ndim() - 3);
  prepare.head_stride = v.stride(v.ndim() - 2);
  prepare.batch = params.batch;
  prepare.seqlen_k = params.seqlen_k;
  prepare.head_dim_v = params.head_dim_v;
  prepare.blocks = static_cast<int>(blocks);
  params.prepared = prepare.prepared;
  params.prepared_blocks = prepare.blocks;
  void* arguments[] = {&prepare};
  cuda::KernelTable<cuda::Kernel>::get().at(handle).launch(
      device, {static_cast<unsigned>(blocks), static_cast<unsigned>(heads)}, arguments);
}

// As `forward`, of e4m3; out is bf16. prepare_handle: of the kernel that prepares values, where
// there is memory for them.
inline bool forward_fp8(int64_t handle, int64_t prepare_handle, TensorView q, TensorView k,
                        TensorView v, TensorView out, Optional<TensorView> lse,
                        Optional<TensorView> cu_seqlens_q, Optional<TensorView> cu_seqlens_k,
                        Optional<TensorView> seqused_q, Optional<TensorView> seqused_k,
                        Optional<TensorView> sinks, Optional<TensorView> q_descale,
                        Optional<TensorView> k_descale, Optional<TensorView> v_descale,
                        Optional<TensorView> prepared, double softmax_scale, double softcap,
                        int64_t left, int64_t right, int64_t chunk, int64_t sm_margin,
                        bool clear_rest, bool if_aligned) {
  if (if_aligned && !(is_aligned(q) && is_aligned(k) && is_aligned(v) && is_aligned(out))) {
    return false;
  }
  const int device = cuda::checked_device(q.device().device_id);
  const cuda::ContextGuard context(device);
  Variant& variant = cuda::KernelTable<Variant>::get().at(handle);
  if (variant.shape.prepared != prepared.has_value()) {
    TVM_FFI_THROW(ValueError) << "forward_fp8: this kernel "
                              << (prepared.has_value() ? "transposes values itself"
                                                       : "wants prepared values");
  }
  Fp8Params params = {};
  params.q_descale = descale_of(q_descale);
  params.k_descale = descale_of(k_descale);
  params.v_descale = descale_of(v_descale);
  const unsigned blocks =
      set_forward(variant, params, q, k, v, out, lse,
                  {data_of<int>(cu_seqlens_q), data_of<int>(cu_seqlens_k), data_of<int>(seqused_q),
                   data_of<int>(seqused_k)},
                  cu_seqlens_q.has_value() ? cu_seqlens_q.value().size(0) - 1 : q.size(0), sinks,
                  {softmax_scale, softcap, left, right, chunk, sm_margin, clear_rest}, device);
  void* arguments[] = {&params};
  if (prepared.has_value()) {
    launch_prepare(prepare_handle, params, variant.shape, v, prepared.value(), device);
    variant.kernel.launch_overlapped(device, {blocks}, 1, arguments);
  } else {
    variant.kernel.launch(device, {blocks}, arguments);
  }
  return true;
}

}  // namespace jit_kernel::hopper
