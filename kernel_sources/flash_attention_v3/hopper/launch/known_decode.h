// Decode calls that nobody has checked: those without a mistake and without rarely used arguments
// are launched, all others declined. Python checks what is declined, and names the argument.
//
//   known_decode(tensors..., scalars...) -> kDeclined, kLaunched or kUnsure
//
// In Python the checks and the choice of a kernel take most of a short call's time on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "flash_attention_v3/hopper/launch/decode_launch.h"
#include "jit_kernel/host/ffi_arguments.h"
#include "jit_kernel/host/plain_tensor.h"

namespace jit_kernel::hopper {

// kUnsure: not launched; of tensors at such addresses only torch knows whether they have memory.
constexpr int64_t kDeclined = 0, kUnsure = 2;

using PlainTensor = std::optional<TensorView>;

// Members are initialised in the order of their declaration, so the order of the lines is the order
// of the call: one line declares an argument and reads it.
struct KnownDecodeArguments {
  static constexpr int32_t kCount = 28;
  explicit KnownDecodeArguments(FfiArguments& arguments) : from(arguments) {}

  FfiArguments& from;
  TensorView q = from.tensor();
  TensorView k = from.tensor();
  TensorView v = from.tensor();
  TensorView out = from.tensor();
  PlainTensor lse = from.maybe_tensor();
  PlainTensor seqused_k = from.maybe_tensor();
  PlainTensor page_table = from.maybe_tensor();
  PlainTensor cu_seqlens_q = from.maybe_tensor();
  PlainTensor cu_seqlens_k_new = from.maybe_tensor();
  PlainTensor sinks = from.maybe_tensor();
  PlainTensor scheduler_metadata = from.maybe_tensor();
  PlainTensor q_descale = from.maybe_tensor();
  PlainTensor k_descale = from.maybe_tensor();
  PlainTensor v_descale = from.maybe_tensor();
  PlainTensor k_scale = from.maybe_tensor();
  PlainTensor v_scale = from.maybe_tensor();
  std::optional<int64_t> max_seqlen_q = from.maybe_exact_integer();
  std::optional<double> softmax_scale = from.maybe_exact_number();
  bool causal = from.exact_boolean();
  int64_t window_left = from.integer();
  int64_t window_right = from.integer();
  std::optional<int64_t> attention_chunk = from.maybe_exact_integer();
  double softcap = from.exact_number();
  int64_t num_splits = from.exact_integer();
  int64_t sm_margin = from.exact_integer();
  bool fixed_ranges = from.exact_boolean();
  bool clear_rest = from.boolean();
  bool all_in_memory = from.boolean();  // whether torch was asked, and says so

  bool is_mixed() const { return k.dtype().bits == 8; }  // q has 16 bits, or is in e4m3, too
  bool has_q_in_e4m3() const { return q.dtype().bits == 8; }
  bool is_ragged() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return is_ragged() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  double scale() const {
    return softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(q.ndim() - 1))));
  }
};

// Absent, or a tensor of these dimensions and so long, in memory.
inline bool is_vector(const PlainTensor& t, DLDevice device, DLDataType dtype, int64_t size) {
  return !t.has_value() || (is_dense(*t, device, 1, dtype, 1) && t->size(0) == size);
}

constexpr DLDataType kFloatType = {kDLFloat, 32, 1}, kBf16Type = {kDLBfloat, 16, 1},
                     kE4m3Type = {kDLFloat8_e4m3fn, 8, 1};

inline bool is_half(DLDataType dtype) {
  return (dtype.code == kDLBfloat || dtype.code == kDLFloat) && dtype.bits == 16;
}

inline bool heads_fit(const KnownDecodeArguments& a, int32_t dims) {
  const int64_t d = a.q.size(dims - 1), dv = a.v.size(3), step = a.is_mixed() ? 16 : 8;
  return d % step == 0 && dv % step == 0 && a.k.size(3) == d && a.out.size(dims - 1) == dv &&
         a.q.size(dims - 2) % a.k.size(2) == 0 && have_same_rows(a.v, a.k) &&
         have_same_rows(a.out, a.q);
}

// Keys in pages, or a cache entry for each sequence. Rows of the table may have gaps between them.
inline bool keys_fit(const KnownDecodeArguments& a, DLDevice device, int64_t batch) {
  if (!a.page_table.has_value()) return a.k.size(0) == batch;
  return a.seqused_k.has_value() && is_dense(*a.page_table, device, 1, kIndexType, 2) &&
         a.page_table->size(0) == batch && a.page_table->size(1) <= kMostIndex / a.k.size(1);
}

// Absent, or of an e4m3 cache: of each sequence and head, of each token and head.
inline bool scales_fit(const KnownDecodeArguments& a, DLDevice device, int64_t batch) {
  const TensorView& k = a.k;
  for (const PlainTensor* t : {&a.q_descale, &a.k_descale, &a.v_descale}) {
    if (!t->has_value()) continue;
    const TensorView& x = **t;
    if (!a.is_mixed() || !is_strided(x, device, 1, kFloatType, 2) || x.size(0) != batch ||
        x.size(1) != k.size(2)) {
      return false;
    }
  }
  for (const PlainTensor* t : {&a.k_scale, &a.v_scale}) {
    if (!t->has_value()) continue;
    const TensorView& x = **t;
    if (!a.is_mixed() || !is_strided(x, device, 1, kFloatType, 3) || x.size(0) != k.size(0) ||
        x.size(1) != k.size(1) || x.size(2) != k.size(2)) {
      return false;
    }
  }
  return true;
}

// Types, shapes and devices.
inline bool tensors_fit(const KnownDecodeArguments& a) {
  const DLDevice device = a.q.device();
  const DLDataType dtype = a.has_q_in_e4m3() ? kE4m3Type : a.q.dtype();
  const DLDataType of_cache = a.is_mixed() ? kE4m3Type : dtype;
  const DLDataType of_out = a.has_q_in_e4m3() ? kBf16Type : dtype;
  const int32_t dims = a.is_ragged() ? 3 : 4;
  if (!(is_half(dtype) || a.has_q_in_e4m3()) || !is_dense(a.q, device, 1, dtype, dims) ||
      !is_dense(a.k, device, 1, of_cache, 4) || !is_dense(a.v, device, 1, of_cache, 4) ||
      !is_dense(a.out, device, 1, of_out, dims) || !heads_fit(a, dims)) {
    return false;
  }
  if (a.is_ragged() && !is_dense(*a.cu_seqlens_q, device, 1, kIndexType, 1)) return false;
  if (a.lse.has_value() && !is_dense(*a.lse, device, 1, kFloatType, dims - 1)) return false;
  const int64_t batch = a.batch();
  const PlainTensor& sinks = a.sinks;
  const DLDataType of_sinks = sinks.has_value() && is_half(sinks->dtype()) ? dtype : kFloatType;
  return batch >= 1 && keys_fit(a, device, batch) && scales_fit(a, device, batch) &&
         is_vector(a.seqused_k, device, kIndexType, batch) &&
         is_vector(a.cu_seqlens_k_new, device, kIndexType, batch + 1) &&
         is_vector(sinks, device, of_sinks, a.q.size(dims - 2)) &&
         (!a.scheduler_metadata.has_value() ||
          is_dense(*a.scheduler_metadata, device, 1, kIndexType, 1));
}

inline bool numbers_fit(const KnownDecodeArguments& a) {
  const int64_t chunk = a.attention_chunk.value_or(0);
  return is_number(a.scale()) && (a.softcap == 0.0 || is_number(a.softcap)) && chunk >= 0 &&
         chunk <= kMostIndex && a.num_splits >= 0 && a.num_splits <= kMostSplits &&
         (a.num_splits != 1 || a.is_mixed()) && a.sm_margin >= 0 && a.sm_margin <= kMostIndex;
}

// Calls f for each tensor that is read.
template <class F>
inline bool all_read(const KnownDecodeArguments& a, F&& f) {
  for (const TensorView* t : {&a.q, &a.k, &a.v}) {
    if (!f(*t)) return false;
  }
  for (const PlainTensor* t :
       {&a.seqused_k, &a.page_table, &a.cu_seqlens_q, &a.cu_seqlens_k_new, &a.sinks,
        &a.scheduler_metadata, &a.q_descale, &a.k_descale, &a.v_descale, &a.k_scale, &a.v_scale}) {
    if (t->has_value() && !f(**t)) return false;
  }
  return true;
}

// Whether out has memory of its own. Ranges that meet may still be slices of one buffer: Python
// looks at those.
inline bool is_written_freely(const KnownDecodeArguments& a) {
  const Extent out = extent_of(a.out);
  return !may_overlap_itself(a.out) &&
         all_read(a, [&](const TensorView& t) { return are_apart(extent_of(t), out); });
}

inline bool addresses_tell(const KnownDecodeArguments& a) {
  const auto tells = [](const TensorView& t) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) >= kSureAddress;
  };
  return tells(a.out) && (!a.lse.has_value() || tells(*a.lse)) && all_read(a, tells);
}

// A call's kernel, and how many tiles the longest sequence of queries takes.
constexpr int64_t kFewRowsOfE4m3 = 64;

struct KnownKernel {
  DecodeVariant* variant = nullptr;
  int64_t tiles = 1;
};

// The loaded kernel for a call's longest sequence of queries; null where there is none, or more
// rows than any has. Over an e4m3 cache the kernel of the most rows takes more of them in tiles,
// but where other kernels than these are quicker: features.py's has_many_rows().
// Without cu_seqlens_q the length is q's, and a smaller max_seqlen_q a mistake.
inline KnownKernel kernel_of(const KnownDecodeArguments& a) {
  const int32_t dims = a.q.ndim();
  const int64_t most = a.q.size(dims - 3), longest = a.max_seqlen_q.value_or(most);
  if (longest < (a.is_ragged() ? 0 : most) || longest > kMostIndex) return {};
  const int64_t group = a.q.size(dims - 2) / a.k.size(2);
  const int64_t size = std::max(a.q.size(dims - 1), a.v.size(3));
  const DecodeShape* found = nullptr;
  for (const DecodeShape& shape : kDecodeShapes) {  // by head size, then by rows
    if (shape.head_dim < size || shape.mixed != a.is_mixed()) continue;
    if (found != nullptr && shape.head_dim != found->head_dim) break;
    found = &shape;
    if (longest * group <= shape.rows) break;
  }
  if (found == nullptr) return {};
  int64_t tiles = 1;
  if (longest * group > found->rows) {
    const int64_t tokens = found->rows / group;
    const bool is_ours =
        a.num_splits == 1 || a.scheduler_metadata.has_value() || longest * group <= kFewRowsOfE4m3;
    if (!a.is_mixed() || !is_ours || tokens == 0) return {};
    tiles = (longest + tokens - 1) / tokens;
  }
  return {LoadedDecodes::at(a.q.device().device_id, a.out.dtype().code == kDLBfloat, *found)
              .load(std::memory_order_acquire),
          tiles};
}

inline Optional<TensorView> optional_of(const PlainTensor& t) {
  return t.has_value() ? Optional<TensorView>(*t) : Optional<TensorView>();
}

inline DecodeCall decode_call_of(const KnownDecodeArguments& a, int64_t tiles) {
  const Optional<TensorView> none;
  return {a.q,
          a.k,
          a.v,
          a.out,
          optional_of(a.lse),
          optional_of(a.cu_seqlens_q),
          none,  // seqused_q
          optional_of(a.seqused_k),
          none,  // cu_seqlens_k_new: it has no meaning without new keys
          optional_of(a.page_table),
          none,  // cache_batch_idx
          none,  // cache_leftpad
          none,  // draft_mask
          optional_of(a.sinks),
          none,  // partials
          optional_of(a.q_descale),
          optional_of(a.k_descale),
          optional_of(a.v_descale),
          optional_of(a.k_scale),
          optional_of(a.v_scale),
          0,  // new_rows
          a.scale(),
          a.softcap,
          a.window_left,
          a.causal ? 0 : a.window_right,
          a.attention_chunk.value_or(0),
          a.sm_margin,
          a.clear_rest,
          a.fixed_ranges || a.num_splits == 1,
          tiles};
}

// `kind`: of the devices whose memory the kernels reach. The shape of lse is Python's own.
template <DLDeviceType kind>
inline int64_t known_decode(FfiArguments& from) {
  const KnownDecodeArguments a(from);
  if (a.q.device().device_type != kind || !tensors_fit(a) || !numbers_fit(a) ||
      !is_written_freely(a)) {
    return kDeclined;
  }
  if (!a.all_in_memory && !addresses_tell(a)) return kUnsure;
  const KnownKernel known = kernel_of(a);
  if (known.variant == nullptr) return kDeclined;
  const DecodeCall call = decode_call_of(a, known.tiles);
  // A stream that is being captured needs room that Python's way allocates.
  return call.is_aligned() && launch_decode(*known.variant, call) == kLaunched ? kLaunched
                                                                               : kDeclined;
}

}  // namespace jit_kernel::hopper

// `kind`: kDLCUDA but in tests.
#define JIT_KERNEL_EXPORT_KNOWN_DECODE(kind)                                                 \
  JIT_KERNEL_EXPORT_ANSWER(known_decode, ::jit_kernel::hopper::KnownDecodeArguments::kCount, \
                           ::jit_kernel::hopper::known_decode<kind>, kTVMFFIInt)
