// Kernels that follow each other in a stream and overlap (programmatic dependent launch).
#pragma once

namespace jit_kernel {

// A kernel that was launched to overlap the one before it (cuda::Kernel::launch_overlapped) goes on
// here when that one has ended and what it wrote can be seen; launched otherwise, at once.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The stream's next kernel may start once every block has said so or ended; it waits for the end
// of this one before it touches what this one touches. To be said behind wait_for_previous_kernel,
// so that no more than two kernels overlap.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace jit_kernel
