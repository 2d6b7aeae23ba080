// The entry of a forward library: arguments to parameters, then append, attend and combine.
#pragma once

#include <atomic>

#include "flash_attention_v3/cpu/decode/mainloop_decode.h"
#include "flash_attention_v3/cpu/decode/mainloop_decode_amx.h"
#include "flash_attention_v3/cpu/decode/mainloop_decode_pairs.h"
#include "flash_attention_v3/cpu/entry/plain_call.h"
#include "flash_attention_v3/cpu/prefill/mainloop_prefill.h"

namespace jit_kernel {

template <class Element>
inline Element* data_of(const TensorView& t) {
  return reinterpret_cast<Element*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

template <class Element>
inline const Element* data_or_null(const MaybeTensor& t) {
  return t.has_value() ? data_of<const Element>(*t) : nullptr;
}

// (batch, rows, heads, n), or ragged (rows, heads, n).
template <class Element>
inline Rows<Element> rows_of(const TensorView& t) {
  int32_t n = t.ndim();
  return {data_of<Element>(t), n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
}

template <class Element>
inline Rows<const Element> rows_or_null(const MaybeTensor& t) {
  return t.has_value() ? rows_of<const Element>(*t) : Rows<const Element>();
}

inline Descale descale_of(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  return {data_of<const float>(*t), t->stride(0), t->stride(1)};
}

// Sinks come as float32 or in the inputs' dtype.
template <class Element>
inline const float* sinks_as_float(const MaybeTensor& sinks, std::vector<float>& storage) {
  if (!sinks.has_value()) return nullptr;
  int64_t heads = sinks->size(0), stride = sinks->stride(0);
  bool is_float = sinks->dtype().bits == 32;
  for (int64_t h = 0; h < heads; ++h) {
    storage.push_back(is_float ? data_of<const float>(*sinks)[h * stride]
                               : to_float(data_of<const Element>(*sinks)[h * stride]));
  }
  return storage.data();
}

// From this size on (half of a large L2) out would leave the caches before it is read, and drive
// out what is needed: it is written past them. 9 % of a call of 512 tokens and 8 heads with two
// threads, 4 % of a causal one of 2048; with a product of out after it 1 to 3 % and nothing.
constexpr int64_t kStreamBytes = 1 << 20;

template <class Output>
inline bool streams(const TensorView& out, const Rows<Output>& rows) {
  constexpr int64_t kLine = 64 / sizeof(Output);
  bool whole = out.size(out.ndim() - 1) % kLine == 0 && rows.batch % kLine == 0 &&
               rows.row % kLine == 0 && rows.head % kLine == 0 &&
               reinterpret_cast<uintptr_t>(rows.data) % 64 == 0;
  int64_t bytes = sizeof(Output);
  for (int32_t i = 0; i < out.ndim(); ++i) bytes *= out.size(i);
  return whole && bytes >= kStreamBytes;
}

// Work on one thread that pays for waking another: about 20 us.
constexpr double kCostOfThread = 1e6;

template <class Element>
struct Forward {
  using Output = typename OutputOf<Element>::type;
  using Params = ForwardParams<Element, Output>;

  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  // Calls f(i) for every i below count, on as many threads as the work pays for. A thread that
  // finds none left calls help() as long as it returns true.
  template <class F, class Help>
  static void parallel(const Params& p, int64_t count, double cost, F&& f, Help&& help) {
    int64_t threads = std::min(p.num_threads, count);
    threads = std::min(threads, static_cast<int64_t>(cost / kCostOfThread) + 1);
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
      while (help()) continue;
      simd::stream_end();
    };
    if (threads <= 1) return work();
    ThreadPool::instance().run(threads, p.num_threads, work);
  }
  template <class F>
  static void parallel(const Params& p, int64_t count, double cost, F&& f) {
    parallel(p, count, cost, f, [] { return false; });
  }

  static void append(const Params& p, const Plan& plan) {
    double cost = 0.0;
    for (const Sequence& s : plan.sequences) {
      cost += static_cast<double>(s.new_tokens * p.heads_k * (p.d + p.dv));
    }
    parallel(p, p.batch * p.heads_k, cost, [&](int64_t i) {
      scratch().reserve(Scratch::size<float>(p.d));
      append_tokens(p, plan.sequences[i / p.heads_k], i % p.heads_k, scratch().take<float>(p.d));
    });
  }

  static void combine(const Params& p, const Plan& plan, const Partials& parts, int64_t dv) {
    // What another core wrote is read at 0.4 ns a number, as long as 20 products take.
    constexpr double kCostOfNumber = 20.0;
    double cost = 0.0;
    for (const Combination& c : plan.combinations) {
      cost += kCostOfNumber * static_cast<double>(c.rows * c.count * dv);
    }
    parallel(p, static_cast<int64_t>(plan.combinations.size()), cost, [&](int64_t i) {
      const Combination& c = plan.combinations[i];
      ScoreScale scale = score_scale_of(p, c.batch, c.head_k);
      scratch().reserve(Scratch::size<float>(dv));
      float* sum = scratch().take<float>(dv);
      for (int64_t r = 0; r < c.rows; ++r) {
        RowState state =
            combine_parts(parts, c.first + r, c.stride, c.count, dv, scale.to_log2(), sum);
        write_row(p, plan.sequences[c.batch], c.batch, c.head_k, QueryRow(p, c.head_k, r), scale,
                  sum, state);
      }
    });
  }

  static void prefill(const Params& p, const Sequence& s, const Item& item, const Partials& parts,
                      RowQueue& rows) {
#ifdef JIT_KERNEL_AMX
    if constexpr (std::is_same<Element, fp16>::value) {
      if (amx_fp16_allowed()) {
        return Prefill<fp16, fp16>(p, item, scratch()).run(p, s, item, parts, rows);
      }
    }
#endif
    Prefill<Element>(p, item, scratch()).run(p, s, item, parts, rows);
  }

#ifdef JIT_KERNEL_BF16_DOT
  using VectorDecode = std::conditional_t<std::is_same<MathOf<Element>, bf16>::value,
                                          DecodePairs<Element>, Decode<Element>>;
#else
  using VectorDecode = Decode<Element>;
#endif

  static void decode(const Params& p, const Sequence& s, const Item& item, const Partials& parts) {
#ifdef JIT_KERNEL_AMX
    constexpr bool kIsHalf = std::is_same<Element, fp16>::value;
    if constexpr (!std::is_same<Element, f32>::value) {
      if (kIsHalf ? amx_fp16_allowed() : amx_allowed()) {
        using TileMath = std::conditional_t<kIsHalf, fp16, bf16>;
        auto wrong = DecodeTiles<Element, TileMath>(p, item, scratch()).run(p, s, item, parts);
        for (const Item& again : wrong) {
          VectorDecode(p, again, scratch()).run(p, s, again, parts);
        }
        return;
      }
    }
#endif
    VectorDecode(p, item, scratch()).run(p, s, item, parts);
  }

  static void attend_items(const Params& p, const Plan& plan, const Partials& parts) {
    std::vector<RowQueue> queues(plan.items.size());
    auto attend_item = [&](int64_t i) {
      const Item& item = plan.items[i];
      const Sequence& s = plan.sequences[item.batch];
      if (is_decode(s.sq * p.group)) {
        decode(p, s, item, parts);
      } else {
        prefill(p, s, item, parts, queues[i]);
      }
    };
    auto join_item = [&] {  // the one with the most rows left, as long as they pay for packing
      auto less = [](const RowQueue& a, const RowQueue& b) { return a.left() < b.left(); };
      auto most = std::max_element(queues.begin(), queues.end(), less);
      const int64_t left = most == queues.end() ? 0 : most->left();
      if (left < kRowsWorthJoining) return false;
      Item item = plan.items[most - queues.begin()];
      item.row_end = std::min(item.row_end, item.row_begin + left);
      prefill(p, plan.sequences[item.batch], item, parts, *most);
      return true;
    };
    parallel(p, static_cast<int64_t>(queues.size()), plan.cost, attend_item, join_item);
  }

  static void attend(const Params& p) {
    using Math = MathOf<Element>;
    static thread_local Plan plan_memory;
    static thread_local Scratch part_memory;
    Plan& plan = plan_memory;
    HeadSizes sizes = head_sizes<Math>(p);
    make_plan(p, prefill_tiles<PackedOf<Element>>(sizes), plan);
    Partials parts;
    if (plan.part_rows) {
      part_memory.reserve(Scratch::size<float>(plan.part_rows * sizes.dv) +
                          Scratch::size<RowState>(plan.part_rows));
      parts.sums = part_memory.take<float>(plan.part_rows * sizes.dv);
      parts.states = part_memory.take<RowState>(plan.part_rows);
    }
    if (p.k_new) append(p, plan);
    attend_items(p, plan, parts);
    combine(p, plan, parts, sizes.dv);
  }

  // Every entry of the page table that is read must name one of the `pages`: before anything is
  // written. The other checks are Python's; this one took it 60 us of a decode that finds nothing
  // in cache.
  static void check_pages(const Params& p, int64_t pages) {
    for (int64_t b = 0; p.page_size && b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      const int64_t keys = s.k_begin + s.sk;
      const int32_t* row = p.page_table + s.k_batch * p.table_width;
      for (int64_t i = s.k_begin / p.page_size; i * p.page_size < keys; ++i) {
        if (row[i] >= 0 && row[i] < pages) continue;
        TVM_FFI_THROW(ValueError) << "page_table[" << s.k_batch << ", " << i << "] is " << row[i]
                                  << "; it must be between 0 and " << pages - 1 << ": sequence "
                                  << b << " has " << keys << " keys in pages of " << p.page_size;
      }
    }
  }

  static void set_tensors(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& out, const MaybeTensor& lse, Params& p) {
    p.q = rows_of<const Element>(q), p.k = rows_of<Element>(k), p.v = rows_of<Element>(v);
    p.out = rows_of<Output>(out), p.stream_out = streams(out, p.out);
    if (lse.has_value()) {  // (heads, rows) or (batch, heads, rows)
      int32_t n = lse->ndim();
      p.lse = {data_of<float>(*lse), n == 3 ? lse->stride(0) : 0, lse->stride(n - 1),
               lse->stride(n - 2)};
    }
    p.batch = q.size(0), p.heads = q.size(q.ndim() - 2), p.d = q.size(q.ndim() - 1);
    p.heads_k = k.size(k.ndim() - 2), p.dv = v.size(v.ndim() - 1), p.group = p.heads / p.heads_k;
    p.rows_q = q.size(q.ndim() - 3), p.rows_k = k.size(k.ndim() - 3);
  }

  static void set_layout(const MaybeTensor& page_table, const MaybeTensor& cu_seqlens_q,
                         const MaybeTensor& cu_seqlens_k, const TensorView& k, Params& p) {
    p.page_table = data_or_null<int32_t>(page_table);
    p.page_size = page_table.has_value() ? k.size(1) : 0;
    p.table_width = page_table.has_value() ? page_table->size(1) : 0;
    p.cu_seqlens_q = data_or_null<int32_t>(cu_seqlens_q);
    if (cu_seqlens_q.has_value()) p.batch = cu_seqlens_q->size(0) - 1;
    p.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
  }

  // From k_new to v_descale, in the order of the call.
  static void read_optional(FfiArguments& a, const TensorView& k, Params& p) {
    MaybeTensor k_new = a.maybe_tensor();
    p.k_new = rows_or_null<Element>(k_new), p.v_new = rows_or_null<Element>(a.maybe_tensor());
    p.rows_new = k_new.has_value() ? k_new->size(k_new->ndim() - 3) : 0;
    MaybeTensor page_table = a.maybe_tensor(), cu_seqlens_q = a.maybe_tensor();
    set_layout(page_table, cu_seqlens_q, a.maybe_tensor(), k, p);
    p.cu_seqlens_k_new = data_or_null<int32_t>(a.maybe_tensor());
    p.seqused_q = data_or_null<int32_t>(a.maybe_tensor());
    p.seqused_k = data_or_null<int32_t>(a.maybe_tensor());
    p.cache_batch_idx = data_or_null<int32_t>(a.maybe_tensor());
    p.cache_leftpad = data_or_null<int32_t>(a.maybe_tensor());
    MaybeTensor rotary_cos = a.maybe_tensor(), rotary_sin = a.maybe_tensor();
    if (rotary_cos.has_value()) {
      p.rotary_cos.data = data_of<const Element>(*rotary_cos);
      p.rotary_cos.row = rotary_cos->stride(0);
      p.rotary_sin.data = data_of<const Element>(*rotary_sin);
      p.rotary_sin.row = rotary_sin->stride(0);
      p.rotary_dim = 2 * rotary_cos->size(1);
    }
    p.rotary_seqlens = data_or_null<int32_t>(a.maybe_tensor());
    p.q_descale = descale_of(a.maybe_tensor()), p.k_descale = descale_of(a.maybe_tensor());
    p.v_descale = descale_of(a.maybe_tensor());
  }

  static void set_window(bool causal, int64_t left, int64_t right, Params& p) {
    p.window_left = left, p.window_right = causal ? 0 : right;
  }

  static constexpr int32_t kArguments = 33;

  static void call(FfiArguments& a) {
    TensorView q = a.tensor(), k = a.tensor(), v = a.tensor(), out = a.tensor();
    Params p;
    set_tensors(q, k, v, out, a.maybe_tensor(), p);
    p.qv = rows_or_null<Element>(a.maybe_tensor());
    read_optional(a, k, p);
    std::vector<float> sink_memory;
    p.sinks = sinks_as_float<Element>(a.maybe_tensor(), sink_memory);
    p.softmax_scale = static_cast<float>(a.number());
    bool causal = a.boolean();
    int64_t left = a.integer();
    set_window(causal, left, a.integer(), p);
    p.attention_chunk = a.integer(), p.softcap = static_cast<float>(a.number());
    p.rotary_interleaved = a.boolean(), p.only_qv = a.boolean();
    p.num_splits = a.integer(), p.num_threads = a.integer();
    check_pages(p, k.size(0));
    attend(p);
  }

  static constexpr int32_t kPlainArguments = 19;

  // A plain call: checked, computed and true; or nothing at all and false. A page that is none is a
  // ValueError here, too.
  static bool plain_call(FfiArguments& a) {
    TensorView q = a.tensor(), k = a.tensor(), v = a.tensor(), out = a.tensor();
    MaybeTensor lse = a.maybe_tensor(), page_table = a.maybe_tensor();
    MaybeTensor cu_seqlens_q = a.maybe_tensor(), cu_seqlens_k = a.maybe_tensor();
    PlainTensors t{q, k, v, out, page_table, cu_seqlens_q, cu_seqlens_k, a.maybe_tensor()};
    if (!shapes_fit(t, dtype_of<Element>(), dtype_of<Output>())) return false;
    PlainNumbers n;
    n.max_seqlen_q = a.maybe_integer(), n.max_seqlen_k = a.maybe_integer();
    n.softmax_scale = a.maybe_number().value_or(1.0 / std::sqrt(q.size(q.ndim() - 1)));
    bool causal = a.boolean();
    int64_t left = a.integer(), right = a.integer();
    n.attention_chunk = a.integer(), n.softcap = a.number(), n.num_splits = a.integer();
    Params p;
    set_tensors(q, k, v, out, lse, p);
    set_layout(page_table, cu_seqlens_q, cu_seqlens_k, k, p);
    p.seqused_k = data_or_null<int32_t>(t.seqused_k);
    if (!numbers_fit(n) || !lengths_fit(p, n)) return false;
    set_window(causal, left, right, p);
    p.softmax_scale = static_cast<float>(n.softmax_scale),
    p.softcap = static_cast<float>(n.softcap);
    p.attention_chunk = n.attention_chunk, p.num_splits = n.num_splits;
    p.num_threads = a.integer();
    check_pages(p, k.size(0));
    attend(p);
    return true;
  }
};

}  // namespace jit_kernel

// The element type by its name in jit_kernel: f32, bf16, fp16 or e4m3.
#define JIT_KERNEL_EXPORT_FORWARD(element, ...)                                             \
  JIT_KERNEL_EXPORT(forward, ::jit_kernel::Forward<::jit_kernel::element>::kArguments,      \
                    ::jit_kernel::Forward<::jit_kernel::element>::call)                     \
  JIT_KERNEL_EXPORT_QUESTION(plain_forward,                                                 \
                             ::jit_kernel::Forward<::jit_kernel::element>::kPlainArguments, \
                             ::jit_kernel::Forward<::jit_kernel::element>::plain_call)
