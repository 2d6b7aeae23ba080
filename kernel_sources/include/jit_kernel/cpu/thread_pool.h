// Threads that are started once and wait for work, and memory that each thread keeps.
//
// The pool is the library's own: linking OpenMP would load a second runtime beside torch's, whose
// workers spin on the same cores. A pool that is busy with another caller's work is not waited for:
// the second caller does its work alone, as results never depend on the number of threads.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace jit_kernel {

inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  using Work = void (*)(void* context);

  static ThreadPool& instance() { return *current().load(std::memory_order_acquire); }

  // Calls work() once on each of up to num_threads threads, the caller included, and returns when
  // all have ended. The first exception is thrown again here.
  template <class F>
  void run(int64_t num_threads, F& work) {
    std::unique_lock<std::mutex> busy(caller_, std::try_to_lock);
    if (num_threads <= 1 || !busy.owns_lock()) return work();
    run_on_workers(
        static_cast<int>(num_threads - 1), [](void* f) { (*static_cast<F*>(f))(); }, &work);
  }

 private:
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
    std::exception_ptr own;
    try {
      work(context);
    } catch (...) {  // the workers still use the caller's stack: wait before it is unwound
      own = std::current_exception();
    }
    for (int i = 0; pending_.load(std::memory_order_acquire) != 0; ++i) {
      if (i < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (own) std::rethrow_exception(own);
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
      Work work;
      void* context;
      bool mine;
      {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        work = work_;
        context = context_;
        mine = index < wanted_;
      }
      if (!mine) continue;
      try {
        work(context);
      } catch (...) {  // handed to the caller, which throws it again
        std::lock_guard<std::mutex> lock(sleep_);
        if (!failure_) failure_ = std::current_exception();
      }
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
    pthread_atfork(nullptr, nullptr, [] { current().store(new ThreadPool); });
    return new ThreadPool;
  }

  static constexpr int kSpins = 4000;  // about 50 us: a decode step's Python between two calls

  std::mutex caller_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0, started_ = 0;
  std::exception_ptr failure_;
};

// Memory that grows as asked and is kept for the next call; its contents are not kept when it
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
    if (posix_memalign(&fresh, 4096, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(fresh);
    size_ = bytes;
  }

  // The next count elements, on a cache line of their own. What reserve() got must suffice: size()
  // tells what one take() uses.
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += size<T>(count);
    return taken;
  }

  template <class T>
  static size_t size(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 127) / 64 *
           64;  // a line more: loads may overhang
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace jit_kernel
