// The entry of a forward library: forward() for calls that Python has checked, plain_forward() for
// calls without any check yet.
#pragma once

#include <vector>

#include "flash_attention_v3/cpu/entry/arguments.h"
#include "flash_attention_v3/cpu/entry/attend.h"
#include "flash_attention_v3/cpu/entry/parameters.h"
#include "flash_attention_v3/cpu/entry/plain_call.h"

namespace jit_kernel {

// The keys of a sequence that are read or written: those that some query sees, and new ones.
template <class Params>
inline Interval touched_keys(const Params& p, const Sequence& s) {
  Interval keys{s.sk - s.new_tokens, s.sk};
  if (s.sq > 0) {
    const Interval first = visible_keys(p, 0, s.sq, s.sk);
    const Interval last = visible_keys(p, s.sq - 1, s.sq, s.sk);
    if (first.begin < last.end) keys.begin = std::min(keys.begin, first.begin);
  }
  return keys;
}

// Every entry of the page table that is read must name one of the `pages`: before anything is
// written. The other checks are Python's; this one took it 60 us of a decode that finds nothing
// in cache.
template <class Params>
inline bool check_pages(const Params& p, int64_t pages, bool may_decline) {
  for (int64_t b = 0; p.page_size && b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const Interval touched = touched_keys(p, s);
    if (touched.begin >= touched.end) continue;
    const int64_t keys = s.k_begin + s.sk;
    const int32_t* row = p.page_table + s.k_batch * p.table_width;
    for (int64_t i = (s.k_begin + touched.begin) / p.page_size; i * p.page_size < keys; ++i) {
      if (row[i] >= 0 && row[i] < pages) continue;
      if (may_decline) return false;
      TVM_FFI_THROW(ValueError) << "page_table[" << s.k_batch << ", " << i << "] is " << row[i]
                                << "; it must be between 0 and " << pages - 1 << ": sequence " << b
                                << " has " << keys << " keys in pages of " << p.page_size;
    }
  }
  return true;
}

// Where a transform of torch makes every tensor, Python could not allocate memory for the result.
inline void need_memory(const TensorView& out) {
  if (out.data_ptr() != nullptr || out.numel() == 0) return;
  TVM_FFI_THROW(TypeError) << "out has no memory; torch may not transform what is allocated here";
}

template <class Element>
inline void forward(FfiArguments& from) {
  const ForwardArguments a(from);
  need_memory(a.out);
  std::vector<float> sink_memory;
  const ForwardParams<Element> p = forward_params<Element>(a, sink_memory);
  check_pages(p, a.k.size(0), false);
  Attention<Element>::attend(p);
}

// A plain call: checked, computed and true; or nothing at all and false. Of tensors below `low`
// only Python knows whether they have memory.
template <class Element, uintptr_t low>
inline bool plain_forward(FfiArguments& from) {
  const PlainArguments a(from);
  if (!shapes_fit<Element>(a, low) || !numbers_fit(a)) return false;
  const ForwardParams<Element> p = plain_params<Element>(a);
  if (!lengths_fit(p, a) || !check_pages(p, a.k.size(0), true)) return false;
  Attention<Element>::attend(p);
  return true;
}

}  // namespace jit_kernel

// Of bf16_over_e4m3 or fp16_over_e4m3: plain calls have one type.
#define JIT_KERNEL_EXPORT_CHECKED_FORWARD(element)                   \
  JIT_KERNEL_EXPORT(forward, ::jit_kernel::ForwardArguments::kCount, \
                    ::jit_kernel::forward<::jit_kernel::element>)

// The element type by its name in jit_kernel: f32, bf16, fp16 or e4m3. A name with a comma stands
// in parentheses, or it would be two arguments.
#define JIT_KERNEL_EXPORT_FORWARD(element)                                                 \
  JIT_KERNEL_EXPORT_CHECKED_FORWARD(element)                                               \
  JIT_KERNEL_EXPORT_QUESTION(                                                              \
      plain_forward, ::jit_kernel::PlainArguments::kCount,                                 \
      (::jit_kernel::plain_forward<::jit_kernel::element, ::jit_kernel::kSureAddress>))    \
  JIT_KERNEL_EXPORT_QUESTION(plain_forward_anywhere, ::jit_kernel::PlainArguments::kCount, \
                             (::jit_kernel::plain_forward<::jit_kernel::element, 1>))
