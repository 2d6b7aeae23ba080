// CUDA kernels on a CPU, to see what they compute and what memory they touch: one block after the
// other, its threads as coroutines that meet at barriers, shuffles and ballots.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define JIT_KERNEL_WITHOUT_PTX
#define __CUDACC__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Place3 {
  unsigned x, y, z;
};
inline Place3 threadIdx, blockIdx, blockDim, gridDim;

template <class To, class From>
To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace emulated {

constexpr size_t kStack = 32 * 1024;
constexpr unsigned kMostThreads = 1024;
// Of all blocks, one after the other; written once as far as they are used.
inline char* stacks() {
  static char* memory = static_cast<char*>(std::malloc(kStack * kMostThreads));
  return memory;
}

struct Thread {
  ucontext_t context;
  unsigned index = 0, waits = 0;  // how many meetings it has come to
  bool ended = false;
};

// The threads of a block; meetings of `group` neighbours, by how many each has come to.
struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  std::vector<unsigned> posted;
  unsigned now = 0;
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
};
inline Block* block = nullptr;

inline void yield() {
  Thread& own = block->threads[block->now];
  swapcontext(&own.context, &block->scheduler);
}

// Waits until all threads of the group of this one have come as often; one that has ended never
// does, as on a GPU a full mask must name no such thread.
inline void meet(unsigned group) {
  Thread& own = block->threads[block->now];
  const unsigned begin = own.index / group * group, goal = ++own.waits;
  const unsigned end =
      std::min<unsigned>(begin + group, static_cast<unsigned>(block->threads.size()));
  for (unsigned rounds = 0;; ++rounds) {
    bool all = true;
    for (unsigned i = begin; i < end; ++i) all = all && block->threads[i].waits >= goal;
    if (all) return;
    if (rounds > 10000) throw std::runtime_error("threads wait for one that has ended");
    yield();
  }
}

inline unsigned exchange(unsigned value, unsigned from) {
  block->posted[block->now] = value;
  meet(32);
  const unsigned found = block->posted[from];
  meet(32);  // nobody posts anew before all have read
  return found;
}

inline void enter() {
  Thread& own = block->threads[block->now];
  block->run(block->arguments);
  own.ended = true;
  yield();
}

template <class F>
void run_block(Place3 size, F&& body) {
  Block mine;
  const unsigned count = size.x * size.y * size.z;
  mine.threads.resize(count);
  mine.posted.resize(count);
  mine.run = [](void* f) { (*static_cast<F*>(f))(); };
  mine.arguments = &body;
  block = &mine;
  for (unsigned i = 0; i < count; ++i) {
    Thread& each = mine.threads[i];
    each.index = i;
    getcontext(&each.context);
    each.context.uc_stack.ss_sp = stacks() + kStack * i;
    each.context.uc_stack.ss_size = kStack;
    each.context.uc_link = nullptr;
    makecontext(&each.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  for (unsigned left = count; left;) {
    left = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (mine.threads[i].ended) continue;
      mine.now = i;
      threadIdx = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      swapcontext(&mine.scheduler, &mine.threads[i].context);
      left += !mine.threads[i].ended;
    }
  }
  block = nullptr;
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(1024); }
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned offset) {
  const unsigned own = emulated::block->now;
  return bits_as<T>(emulated::exchange(bits_as<unsigned>(value), own ^ offset));
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const unsigned first = emulated::block->now / 32 * 32;
  emulated::block->posted[emulated::block->now] = value;
  emulated::meet(32);
  unsigned found = 0;
  for (unsigned i = 0; i < 32; ++i) found |= emulated::block->posted[first + i] << i;
  emulated::meet(32);
  return found;
}

namespace jit_kernel {

inline unsigned bf16_of(float x) {
  const unsigned bits = bits_as<unsigned>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline unsigned fp16_pair(float low, float high) {
  const unsigned a = bits_as<uint16_t>(static_cast<_Float16>(low));
  return a | static_cast<unsigned>(bits_as<uint16_t>(static_cast<_Float16>(high))) << 16;
}
inline void from_fp16_pair(unsigned word, float& low, float& high) {
  low = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(word)));
  high = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(word >> 16)));
}

}  // namespace jit_kernel

#include "jit_kernel/host/tensor_arguments.h"

namespace emulated {

template <class T>
struct Read {
  static T from(jit_kernel::TensorArguments& a) {
    if constexpr (std::is_pointer<T>::value) {
      const DLTensor* t = a.maybe_tensor();
      return t ? reinterpret_cast<T>(static_cast<char*>(t->data) + t->byte_offset) : nullptr;
    } else if constexpr (std::is_floating_point<T>::value) {
      return a.number();
    } else {
      return static_cast<T>(a.integer());
    }
  }
};

// grid x, y, block x, y, then the kernel's arguments.
template <class... P>
void launch(void (*kernel)(P...), jit_kernel::TensorArguments& a) {
  unsigned sizes[4];
  for (unsigned& size : sizes) size = static_cast<unsigned>(a.integer());
  std::tuple<P...> values{Read<P>::from(a)...};
  gridDim = {sizes[0], sizes[1], 1}, blockDim = {sizes[2], sizes[3], 1};
  for (unsigned y = 0; y < sizes[1]; ++y) {
    for (unsigned x = 0; x < sizes[0]; ++x) {
      blockIdx = {x, y, 0};
      run_block({sizes[2], sizes[3], 1}, [&] { std::apply(kernel, values); });
    }
  }
}

}  // namespace emulated

// Exports an instance of a kernel as `name`, with `count` arguments behind the grid and the block.
#define EMULATE(name, count, ...)                                                               \
  inline void run_##name(jit_kernel::TensorArguments& a) { emulated::launch(&__VA_ARGS__, a); } \
  JIT_KERNEL_EXPORT_PLAIN(name, 4 + count, run_##name)
