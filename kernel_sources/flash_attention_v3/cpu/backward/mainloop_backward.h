// The phases of a backward pass: each row's delta and lse, then blocks of keys on threads.
//
// A thread owns a block of keys of one head: dK and dV are its own sums. dQ is the sum over blocks
// of keys, in their order whatever the threads: a block adds to a row's sum when the one before it
// has. A thread waits only for tasks that were handed out before its own, so it never waits for
// ever; and blocks of other heads lie between, so it hardly waits at all.
#pragma once

#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "flash_attention_v3/cpu/backward/block_state.h"

namespace jit_kernel {

template <class Element>
struct BackwardPass {
  using Params = BackwardParams<Element>;

  const Params& p;
  const BackwardSizes sizes;
  BackwardPlan plan;
  std::vector<std::atomic<int32_t>>
      added;                     // blocks of keys so far, of each head's block of queries
  std::vector<double> of_sinks;  // by sequence and head

  explicit BackwardPass(const Params& params)
      : p(params),
        sizes(backward_sizes(params.d, params.dv)),
        plan(make_backward_plan(params, sizes)),
        added(plan.seen.size() * params.heads),
        of_sinks(params.batch * params.heads) {}

  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  // f(i) for every i below count; begin() makes what a thread needs for it.
  template <class Begin>
  void parallel(int64_t count, double cost, Begin&& begin) {
    constexpr double kCostOfThread = 1e6;  // 20 us of products
    int64_t threads = std::min(p.num_threads, count);
    threads = std::min(threads, static_cast<int64_t>(cost / kCostOfThread) + 1);
    std::atomic<int64_t> next{0};
    auto work = [&] {
      auto f = begin();  // what it throws, it throws before this thread has taken any
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
    };
    if (threads <= 1) return work();
    ThreadPool::instance().run(threads, p.num_threads, work);
  }

  static float dot(const Element* a, const Element* b, int64_t n) {
    simd::Vec sum = simd::zero();
    int64_t i = 0;
    for (; i + simd::kLanes <= n; i += simd::kLanes) {
      sum = simd::fma(simd::load_as_float(a + i), simd::load_as_float(b + i), sum);
    }
    float rest = 0.0f;
    for (; i < n; ++i) rest += to_float(a[i]) * to_float(b[i]);
    return simd::reduce_add(sum) + rest;
  }

  // Of a head's rows: delta = dO·O - dlse, and the lse as what is taken from scores: a row that
  // sees no key has probabilities of 0, and nothing of it is read.
  void prepare_rows(int64_t batch, int64_t head) {
    const Sequence& s = plan.sequences[batch].sequence;
    const bool has_sink = p.sinks != nullptr;
    double of_sink = 0.0;
    for (int64_t i = 0; i < s.sq; ++i) {
      const int64_t place = p.row_of(s, i, head), row = s.q_begin + i;
      const float lse = *p.lse_of_rows.at(s.q_batch, row, head);
      const float grad_lse = p.grad_lse ? *p.grad_lse.at(s.q_batch, row, head) : 0.0f;
      const Interval seen = visible_keys(p, i, s.sq, s.sk);
      float delta = -grad_lse;
      if (seen.begin < seen.end) {
        delta += dot(p.grad_out.at(s.q_batch, row, head), p.result.at(s.q_batch, row, head), p.dv);
      }
      const bool has_weight = lse != -kInfinity;
      p.deltas[place] = has_weight ? delta : 0.0f;
      p.shifts[place] = has_weight ? lse : kInfinity;
      if (has_sink && has_weight) {
        of_sink += std::exp(static_cast<double>(p.sinks[head]) - static_cast<double>(lse)) *
                   static_cast<double>(delta);
      }
    }
    of_sinks[batch * p.heads + head] = of_sink;
  }

  void wait(const std::atomic<int32_t>& counter, int32_t wanted) {
    constexpr int kSpins = 1000;
    for (int i = 0; counter.load(std::memory_order_acquire) != wanted; ++i) {
      if (i < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  void run_task(BlockState<Element>& state, const BackwardPlan::Task& task) {
    const BackwardPlan::OfSequence& of = plan.sequences[task.sequence];
    const Sequence& s = of.sequence;
    const int64_t first = task.block * sizes.keys;
    state.load_keys(of, task.head_k, first);
    for (int64_t head = task.head_k * p.group; head < (task.head_k + 1) * p.group; ++head) {
      for (int64_t i = 0; i < of.blocks_q; ++i) {
        const SeenBlocks& blocks = plan.seen[of.place + i];
        if (task.block < blocks.first || task.block >= blocks.end) continue;
        const int64_t row = i * sizes.rows, count = std::min(sizes.rows, s.sq - row);
        const int64_t place = p.row_of(s, row, head);
        const Interval columns = state.load_queries(s, head, row, count, first);
        if (columns.begin < columns.end) {
          state.make_scores(place, count, columns);
          state.add_to_keys(count, columns);
        }
        std::atomic<int32_t>& counter = added[(of.place + i) * p.heads + head];
        const auto mine = static_cast<int32_t>(task.block - blocks.first);
        wait(counter, mine);
        if (columns.begin < columns.end || mine == 0) {
          state.add_to_queries(place, count, columns, mine == 0);
        }
        if (task.block + 1 == blocks.end) state.store_queries(s, head, row, count);
        counter.store(mine + 1, std::memory_order_release);
      }
    }
    state.store_keys(of, task.head_k, first);
  }

  void run() {
    const double of_rows = static_cast<double>(p.all_rows * p.heads * sizes.dv);
    parallel(p.batch * p.heads, of_rows,
             [&] { return [&](int64_t i) { prepare_rows(i / p.heads, i % p.heads); }; });
    if (p.sinks) {
      for (int64_t h = 0; h < p.heads; ++h) {
        double sum = 0.0;
        for (int64_t b = 0; b < p.batch; ++b) sum += of_sinks[b * p.heads + h];
        p.grad_sinks[h] = static_cast<float>(-sum);
      }
    }
    parallel(static_cast<int64_t>(plan.tasks.size()), plan.cost, [&] {
      return [&, state = BlockState<Element>(p, sizes, scratch())](int64_t i) mutable {
        run_task(state, plan.tasks[i]);
      };
    });
  }
};

}  // namespace jit_kernel
