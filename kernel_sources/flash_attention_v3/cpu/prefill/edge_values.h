// Values that are not finite, of keys that some rows of a tile see and others do not.
//
// A tile's product multiplies a value by the probabilities of all its rows, 0 where a row does not
// see the key; and 0 times such a value is NaN. Only a tile's edges have such keys: where one has a
// value that is not finite, its elements that are not are left out of the product and added
// afterwards, to the rows that see their key.
#pragma once

#include <algorithm>
#include <vector>

#include "flash_attention_v3/cpu/common/convert.h"
#include "flash_attention_v3/cpu/prefill/prefill_state.h"

namespace jit_kernel {

template <class State, class Math>
class EdgeValues {
 public:
  EdgeValues(State& state, const typename State::Tile& t) : state_(state), t_(t) {}

  // Whether there are some at the edges of the tile.
  __attribute__((noinline)) bool any_odd() {
    bool any = false;
    each_chunk([&](int64_t column) { any |= is_odd(column); });
    return any;
  }

  // Leaves them out of the product to come.
  __attribute__((noinline)) void leave_out(GemmArgs<Math>& g) {
    const Math* from = state_.values + t_.at * state_.sizes.dv;
    cleared_.assign(from, from + state_.tiles.block * state_.sizes.dv);
    each_chunk([&](int64_t column) {
      if (!is_odd(column)) return;
      for (int64_t panel = 0; panel < panels(); ++panel) {
        Math* x = cleared_.data() + place(column, panel);
        for (int64_t i = 0; i < kChunk; ++i) {
          if (!is_finite(x[i])) x[i] = Math{};
        }
      }
    });
    g.b = cleared_.data() + t_.from * simd::kLanes;
  }

  // Adds them to the rows that see their key, when the product is complete.
  __attribute__((noinline)) void add(const GemmArgs<Math>& g) {
    each_chunk([&](int64_t column) {
      if (!is_odd(column)) return;
      for (int64_t at = 0; at < kDepth; ++at) {
        if (!find_key(column, at)) continue;
        const int64_t key = column + key_at<Math>(at);
        for (int64_t row = 0; row < t_.rows; ++row) {
          if (!state_.sees(t_, row, key)) continue;
          const simd::Vec p = simd::set1(to_float(g.a[row * g.lda + column + at]));
          float* sums = g.c + row * g.ldc;
          for (int64_t i = 0; i < state_.sizes.dv; i += simd::kLanes) {
            simd::store(sums + i, simd::fma(p, simd::load(odd_.data() + i), simd::load(sums + i)));
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kChunk = kDepth * simd::kLanes;  // elements of kDepth keys in a panel

  int64_t panels() const { return state_.sizes.dv / simd::kLanes; }

  // Where kDepth keys' part of a panel begins in the packed values of the block.
  int64_t place(int64_t column, int64_t panel) const {
    return panel * simd::kLanes * state_.tiles.block + (t_.from + column) * simd::kLanes;
  }

  // Calls f with the first column of each kDepth of the tile's that not all of its rows see.
  template <class F>
  void each_chunk(F&& f) const {
    const int64_t from = state_.seen_of(t_, t_.rows - 1).begin;
    const int64_t to = std::min(state_.seen_of(t_, 0).end, state_.draft.begin - t_.first - t_.from);
    int64_t column = 0;
    for (; column < t_.columns && column < from; column += kDepth) f(column);
    column = std::max(column, std::max<int64_t>(0, to) / kDepth * kDepth);
    for (; column < t_.columns; column += kDepth) f(column);
  }

  // Whether kDepth keys from a column on have values that are not finite; looked at once.
  bool is_odd(int64_t column) {
    typename State::Finite& known = state_.finite[(t_.at + t_.from + column) / kDepth];
    if (known == State::Finite::kUnknown) {
      const Math* x = state_.values + t_.at * state_.sizes.dv;
      bool finite = true;
      for (int64_t panel = 0; panel < panels(); ++panel) {
        finite &= are_finite(x + place(column, panel), kChunk);
      }
      known = finite ? State::Finite::kYes : State::Finite::kNo;
    }
    return known == State::Finite::kNo;
  }

  // The elements of one key that are not finite to odd_, zeros for the others; returns whether
  // there are some.
  bool find_key(int64_t column, int64_t at) {
    const Math* x = state_.values + t_.at * state_.sizes.dv;
    const int64_t inside = at / kStep<Math> * kStep<Math> * simd::kLanes + at % kStep<Math>;
    bool any = false;
    odd_.assign(static_cast<size_t>(state_.sizes.dv), 0.0f);
    for (int64_t i = 0; i < state_.sizes.dv; ++i) {
      const int64_t lane = i % simd::kLanes * kStep<Math>;
      const Math value = x[place(column, i / simd::kLanes) + inside + lane];
      if (is_finite(value)) continue;
      odd_[static_cast<size_t>(i)] = to_float(value);
      any = true;
    }
    return any;
  }

  State& state_;
  const typename State::Tile& t_;
  std::vector<Math> cleared_;  // the block's values without those elements
  std::vector<float> odd_;
};

}  // namespace jit_kernel
