// Threads that are started once and wait for work, and memory that each thread keeps.
//
// Work goes to the threads of the OpenMP runtime that torch runs on: they are awake after torch's
// operators and spin for milliseconds, in which other threads would have to share their cores (a
// prefill of 7 ms between two of torch's took 10). The runtime is asked for by its entry in torch's
// own dependencies; linking OpenMP could load a second one. Where torch has none, and in a forked
// process, whose runtime would wait for threads that are not there, the library starts its own.
//
// Threads that are busy with another caller's work are not waited for: the second caller does its
// work alone, as results never depend on the number of threads.
#pragma once

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <type_traits>

#include "jit_kernel/cpu/memory.h"

namespace jit_kernel {

inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls work(data) once on each of num_threads threads, the caller included.
using OpenMpParallel = void (*)(void (*work)(void*), void* data, unsigned num_threads,
                                unsigned flags);

// GOMP_parallel of the runtime that torch is linked to (GNU's, LLVM's and Intel's have it), or
// null.
inline OpenMpParallel torchs_openmp() {
#ifdef __linux__
  // Only the name is taken inside: the loader's lock is held there, and dlopen() wants another one.
  std::string name;
  auto find = [](dl_phdr_info* library, size_t, void* found) {
    if (!library->dlpi_name || !std::strstr(library->dlpi_name, "libtorch_cpu.so")) return 0;
    *static_cast<std::string*>(found) = library->dlpi_name;
    return 1;
  };
  if (dl_iterate_phdr(find, &name) == 0) return nullptr;
  void* torch = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<OpenMpParallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
#else
  return nullptr;
#endif
}

class ThreadPool {
 public:
  using Work = void (*)(void* context);

  explicit ThreadPool(OpenMpParallel openmp) : openmp_(openmp) {}

  static ThreadPool& instance() { return *current().load(std::memory_order_acquire); }

  // Calls work() once on each of several threads, the caller included, and returns when all have
  // ended: num_threads of the library's own, or a team of OpenMP's, which has as many as torch's
  // teams: GNU's runtime ends the threads that a smaller one does not need. The first exception is
  // thrown again here.
  template <class F>
  void run(int64_t num_threads, int64_t team, F& work) {
    std::unique_lock<std::mutex> busy(caller_, std::try_to_lock);
    if (num_threads <= 1 || !busy.owns_lock()) return work();
    Work call = [](void* f) { (*static_cast<F*>(f))(); };
    if (openmp_) {
      run_on_openmp(static_cast<unsigned>(team), call, &work);
    } else {
      run_on_workers(static_cast<int>(num_threads - 1), call, &work);
    }
  }

 private:
  void run_on_openmp(unsigned threads, Work work, void* context) {
    work_ = work;
    context_ = context;
    failure_ = nullptr;
    openmp_([](void* pool) { static_cast<ThreadPool*>(pool)->work_and_catch(); }, this, threads, 0);
    if (failure_) std::rethrow_exception(failure_);
  }

  void work_and_catch() {
    try {
      work_(context_);
    } catch (...) {  // handed to the caller, which throws it again
      std::lock_guard<std::mutex> lock(sleep_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  // Generations count up by 1; a worker whose index is below `wanted_` takes part in each.
  void run_on_workers(int workers, Work work, void* context) {
    grow(workers);
    if (workers > started_) workers = started_;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      work_ = work;
      context_ = context;
      wanted_ = workers;
      failure_ = nullptr;
      pending_.store(workers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work_and_catch();  // the workers use the caller's stack: nothing is thrown before they end
    for (int i = 0; pending_.load(std::memory_order_acquire) != 0; ++i) {
      if (i < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

  void grow(int workers) {
    try {
      for (; started_ < workers; ++started_) {
        std::thread([this, index = started_, seen = generation_.load()] {
          serve(index, seen);
        }).detach();
      }
    } catch (const std::exception&) {
      // No more threads to be had (a limit on processes): those that started share the work.
    }
  }

  void serve(int index, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) {
        spin_pause();
      }
      bool mine;
      {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        mine = index < wanted_;
      }
      if (!mine) continue;
      work_and_catch();  // work_ stays what it is until pending_ is 0
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Never destroyed: workers wait on it until the process ends. A forked child has no workers, so
  // it starts with a pool of its own.
  static std::atomic<ThreadPool*>& current() {
    static std::atomic<ThreadPool*> pool{first()};
    return pool;
  }
  static ThreadPool* first() {
    pthread_atfork(nullptr, nullptr, [] { current().store(new ThreadPool(nullptr)); });
    return new ThreadPool(torchs_openmp());
  }

  static constexpr int kSpins = 4000;  // about 50 us: a decode step's Python between two calls

  const OpenMpParallel openmp_;
  std::mutex caller_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0, started_ = 0;
  std::exception_ptr failure_;
};

// Memory that grows on request and is kept for the next call; its contents are not kept when it
// grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, kPageBytes, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(fresh);
    size_ = bytes;
  }

  // The next count elements, on a cache line of their own. What reserve() got must suffice: size()
  // gives the bytes that one take() uses.
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += size<T>(count);
    return taken;
  }

  // Room for several arrays at once: each(f) calls f(pointer, count) for every one of them, once to
  // add up their sizes and once to set the pointers.
  template <class Each>
  void take_all(Each&& each) {
    size_t bytes = 0;
    each([&](auto*& a, int64_t n) { bytes += size<std::remove_reference_t<decltype(*a)>>(n); });
    reserve(bytes);
    each([&](auto*& a, int64_t n) { a = take<std::remove_reference_t<decltype(*a)>>(n); });
  }

  template <class T>
  static size_t size(int64_t count) {
    // A line more than is asked for: loads may overhang.
    constexpr size_t kLine = kCacheLine;
    return (static_cast<size_t>(count) * sizeof(T) + 2 * kLine - 1) / kLine * kLine;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace jit_kernel
