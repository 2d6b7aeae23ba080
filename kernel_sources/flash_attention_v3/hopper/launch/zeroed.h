// Memory for counters that kernels find at zero and leave at zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "jit_kernel/cuda/driver.h"

namespace jit_kernel::hopper {

// `count` zeros on the current device, never freed: a captured graph may hold them. Allowed while
// the caller's stream is captured.
inline int* zeroed_ints(int64_t count) {
  const cuda::RelaxedCapture relaxed;
  auto* const allocate = cuda::driver_function<cuda::Result(void**, size_t)>("cuMemAlloc_v2");
  auto* const create =
      cuda::driver_function<cuda::Result(cuda::Stream*, unsigned)>("cuStreamCreate");
  auto* const destroy = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamDestroy_v2");
  auto* const fill = cuda::driver_function<cuda::Result(void*, unsigned, size_t, cuda::Stream)>(
      "cuMemsetD32Async");
  auto* const finish = cuda::driver_function<cuda::Result(cuda::Stream)>("cuStreamSynchronize");
  void* memory = nullptr;
  cuda::check(allocate(&memory, static_cast<size_t>(count) * sizeof(int)), "cuMemAlloc");
  cuda::Stream stream = nullptr;  // of its own: the caller's may be under capture
  cuda::check(create(&stream, 1 /* CU_STREAM_NON_BLOCKING */), "cuStreamCreate");
  cuda::check(fill(memory, 0, static_cast<size_t>(count), stream), "cuMemsetD32Async");
  cuda::check(finish(stream), "cuStreamSynchronize");
  cuda::check(destroy(stream), "cuStreamDestroy");
  return static_cast<int*>(memory);
}

}  // namespace jit_kernel::hopper
