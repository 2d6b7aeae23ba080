// The phases of a call: append, attend item by item, combine.
#pragma once

#include <atomic>
#include <type_traits>
#include <vector>

#include "flash_attention_v3/cpu/common/epilogue.h"
#include "flash_attention_v3/cpu/common/params.h"
#include "flash_attention_v3/cpu/common/query.h"
#include "flash_attention_v3/cpu/decode/mainloop_decode.h"
#include "flash_attention_v3/cpu/decode/mainloop_decode_amx.h"
#include "flash_attention_v3/cpu/decode/mainloop_decode_pairs.h"
#include "flash_attention_v3/cpu/entry/scheduler.h"
#include "flash_attention_v3/cpu/prefill/mainloop_prefill.h"
#include "jit_kernel/cpu/thread_pool.h"

namespace jit_kernel {

// Work on one thread that pays for waking another: about 20 us.
constexpr double kCostOfThread = 1e6;

template <class Element>
struct Attention {
  using Params = ForwardParams<Element>;

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
      const int64_t batch = i / p.heads_k, room = std::max(p.d, p.dv);
      scratch().reserve(Scratch::size<float>(room));
      append_tokens(p, plan.sequences[batch], batch, i % p.heads_k, scratch().take<float>(room));
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
    if constexpr (std::is_same<QueryOf<Element>, fp16>::value) {
      if (amx_fp16_allowed()) {
        return Prefill<Element, fp16>(p, item, scratch()).run(p, s, item, parts, rows);
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
    constexpr bool kIsHalf = std::is_same<QueryOf<Element>, fp16>::value;
    if constexpr (!std::is_same<Element, f32>::value) {
      if (kIsHalf ? amx_fp16_allowed() : amx_allowed()) {
        using TileMath = std::conditional_t<kIsHalf, fp16, bf16>;
        const auto not_finite =
            DecodeTiles<Element, TileMath>(p, item, scratch()).run(p, s, item, parts);
        for (const Item& again : not_finite) {
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
    if (p.has_new()) append(p, plan);
    attend_items(p, plan, parts);
    combine(p, plan, parts, sizes.dv);
  }
};

}  // namespace jit_kernel
