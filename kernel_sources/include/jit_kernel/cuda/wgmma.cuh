// wgmma with float32 accumulators, one instruction deep: 32 bytes along k, 16 elements of 16 bits
// or 32 of e4m3. The number of columns N follows from the accumulator's size, N / 2 registers a
// thread; those that the kernels use are at the end.
#pragma once

#include "jit_kernel/cuda/element.cuh"

namespace jit_kernel {

// Accumulators and register operands must not be touched between the fence and the wait.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Which part of an accumulator a thread holds: of its 64 rows a warp has 16, a thread two, this one
// and the eighth after it, and of each 8 columns two neighbours. Unsigned, as threadIdx is: a
// conversion in between changes the code that the compiler makes.
__device__ __forceinline__ u32 first_row_of_warp() { return threadIdx.x % 128 / 32 * 16; }
__device__ __forceinline__ u32 accumulator_row(int first_row) {
  return first_row + first_row_of_warp() + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ u32 accumulator_column(int first_column) {
  return first_column + threadIdx.x % 4 * 2;
}

// Keeps the compiler from moving uses of a register array across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Matrix descriptor of a swizzled tile in shared memory, 1024-byte aligned, rows of kSwizzleBytes,
// in two halves: the low one counts 16 bytes, so that an offset is added to it. leading_offset:
// bytes between panels of one swizzle width along N where N is the contiguous dimension, otherwise
// unused.
__device__ __forceinline__ u32 wgmma_descriptor_low(u32 address, u32 leading_offset) {
  return address >> 4 | (leading_offset >> 4) << 16;
}

template <int kSwizzleBytes>
__device__ __forceinline__ u64 wgmma_descriptor(u32 low) {
  static_assert(kSwizzleBytes == 128 || kSwizzleBytes == 64, "tiles have rows of 64 or 128 bytes");
  constexpr u64 kMode = kSwizzleBytes == 128 ? 1 : 2;
  constexpr u64 kStride = 8 * kSwizzleBytes >> 4;  // between groups of 8 rows
  return kMode << 62 | kStride << 32 | low;
}

#define JIT_KERNEL_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JIT_KERNEL_F8(d, i) JIT_KERNEL_F4(d, i), JIT_KERNEL_F4(d, i + 4)
#define JIT_KERNEL_F16(d, i) JIT_KERNEL_F8(d, i), JIT_KERNEL_F8(d, i + 8)
#define JIT_KERNEL_F32(d, i) JIT_KERNEL_F16(d, i), JIT_KERNEL_F16(d, i + 16)
#define JIT_KERNEL_F64(d, i) JIT_KERNEL_F32(d, i), JIT_KERNEL_F32(d, i + 32)

// "%0, %1, ...": the accumulators of an instruction, eight to a piece.
#define JIT_KERNEL_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JIT_KERNEL_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define JIT_KERNEL_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define JIT_KERNEL_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define JIT_KERNEL_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define JIT_KERNEL_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define JIT_KERNEL_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define JIT_KERNEL_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define JIT_KERNEL_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define JIT_KERNEL_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define JIT_KERNEL_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define JIT_KERNEL_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define JIT_KERNEL_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define JIT_KERNEL_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define JIT_KERNEL_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define JIT_KERNEL_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define JIT_KERNEL_REGISTERS_4 "%0, %1, %2, %3"
#define JIT_KERNEL_REGISTERS_8 JIT_KERNEL_R0
#define JIT_KERNEL_REGISTERS_16 JIT_KERNEL_R0 ", " JIT_KERNEL_R1
#define JIT_KERNEL_REGISTERS_24 JIT_KERNEL_REGISTERS_16 ", " JIT_KERNEL_R2
#define JIT_KERNEL_REGISTERS_32 JIT_KERNEL_REGISTERS_24 ", " JIT_KERNEL_R3
#define JIT_KERNEL_REGISTERS_40 JIT_KERNEL_REGISTERS_32 ", " JIT_KERNEL_R4
#define JIT_KERNEL_REGISTERS_48 JIT_KERNEL_REGISTERS_40 ", " JIT_KERNEL_R5
#define JIT_KERNEL_REGISTERS_56 JIT_KERNEL_REGISTERS_48 ", " JIT_KERNEL_R6
#define JIT_KERNEL_REGISTERS_64 JIT_KERNEL_REGISTERS_56 ", " JIT_KERNEL_R7
#define JIT_KERNEL_REGISTERS_72 JIT_KERNEL_REGISTERS_64 ", " JIT_KERNEL_R8
#define JIT_KERNEL_REGISTERS_80 JIT_KERNEL_REGISTERS_72 ", " JIT_KERNEL_R9
#define JIT_KERNEL_REGISTERS_88 JIT_KERNEL_REGISTERS_80 ", " JIT_KERNEL_R10
#define JIT_KERNEL_REGISTERS_96 JIT_KERNEL_REGISTERS_88 ", " JIT_KERNEL_R11
#define JIT_KERNEL_REGISTERS_104 JIT_KERNEL_REGISTERS_96 ", " JIT_KERNEL_R12
#define JIT_KERNEL_REGISTERS_112 JIT_KERNEL_REGISTERS_104 ", " JIT_KERNEL_R13
#define JIT_KERNEL_REGISTERS_120 JIT_KERNEL_REGISTERS_112 ", " JIT_KERNEL_R14
#define JIT_KERNEL_REGISTERS_128 JIT_KERNEL_REGISTERS_120 ", " JIT_KERNEL_R15

// d = a * b (+ d where accumulate): a is 64 x 16 and b is 16 x N, both in shared memory; k is
// contiguous but where kContiguousM says that a's 64 rows are, kContiguousN that b's N columns are.
#define JIT_KERNEL_WGMMA_SS(N, COUNT, A, B, P, T, U, ...)                                     \
  template <class Element, bool kContiguousM = false, bool kContiguousN = false>              \
  __device__ __forceinline__ void wgmma_ss(float (&d)[COUNT], u64 a, u64 b, int accumulate) { \
    if constexpr (kIsBf16<Element>) {                                                         \
      JIT_KERNEL_WGMMA_SS_ASM(N, COUNT, A, B, P, T, U, "bf16", __VA_ARGS__);                  \
    } else {                                                                                  \
      JIT_KERNEL_WGMMA_SS_ASM(N, COUNT, A, B, P, T, U, "f16", __VA_ARGS__);                   \
    }                                                                                         \
  }
#define JIT_KERNEL_WGMMA_SS_ASM(N, COUNT, A, B, P, T, U, TYPE, ...)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
               " {" JIT_KERNEL_REGISTERS_##COUNT "}, %" #A ", %" #B ", p, 1, 1, %" #T ", %" #U \
                                                 ";\n}"                                        \
               : __VA_ARGS__                                                                   \
               : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kContiguousM)),         \
                 "n"(static_cast<int>(kContiguousN)))

// The same with a in registers; kContiguousN: in b N is contiguous, else k.
#define JIT_KERNEL_WGMMA_RS(N, COUNT, A0, A1, A2, A3, B, P, T, ...)                           \
  template <class Element, bool kContiguousN>                                                 \
  __device__ __forceinline__ void wgmma_rs(float (&d)[COUNT], u32 a0, u32 a1, u32 a2, u32 a3, \
                                           u64 b, int accumulate) {                           \
    if constexpr (kIsBf16<Element>) {                                                         \
      JIT_KERNEL_WGMMA_RS_ASM(N, COUNT, A0, A1, A2, A3, B, P, T, "bf16", __VA_ARGS__);        \
    } else {                                                                                  \
      JIT_KERNEL_WGMMA_RS_ASM(N, COUNT, A0, A1, A2, A3, B, P, T, "f16", __VA_ARGS__);         \
    }                                                                                         \
  }
#define JIT_KERNEL_WGMMA_RS_ASM(N, COUNT, A0, A1, A2, A3, B, P, T, TYPE, ...)              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                     \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
               " {" JIT_KERNEL_REGISTERS_##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 \
                                                 "}, %" #B ", p, 1, 1, %" #T ";\n}"        \
               : __VA_ARGS__                                                               \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate),              \
                 "n"(static_cast<int>(kContiguousN)))

JIT_KERNEL_WGMMA_SS(8, 4, 4, 5, 6, 7, 8, JIT_KERNEL_F4(d, 0))
JIT_KERNEL_WGMMA_SS(16, 8, 8, 9, 10, 11, 12, JIT_KERNEL_F8(d, 0))
JIT_KERNEL_WGMMA_SS(32, 16, 16, 17, 18, 19, 20, JIT_KERNEL_F16(d, 0))
JIT_KERNEL_WGMMA_SS(64, 32, 32, 33, 34, 35, 36, JIT_KERNEL_F32(d, 0))
JIT_KERNEL_WGMMA_SS(80, 40, 40, 41, 42, 43, 44, JIT_KERNEL_F32(d, 0), JIT_KERNEL_F8(d, 32))
JIT_KERNEL_WGMMA_SS(96, 48, 48, 49, 50, 51, 52, JIT_KERNEL_F32(d, 0), JIT_KERNEL_F16(d, 32))
JIT_KERNEL_WGMMA_SS(112, 56, 56, 57, 58, 59, 60, JIT_KERNEL_F32(d, 0), JIT_KERNEL_F16(d, 32),
                    JIT_KERNEL_F8(d, 48))
JIT_KERNEL_WGMMA_SS(128, 64, 64, 65, 66, 67, 68, JIT_KERNEL_F64(d, 0))
JIT_KERNEL_WGMMA_SS(256, 128, 128, 129, 130, 131, 132, JIT_KERNEL_F64(d, 0), JIT_KERNEL_F64(d, 64))

JIT_KERNEL_WGMMA_RS(8, 4, 4, 5, 6, 7, 8, 9, 10, JIT_KERNEL_F4(d, 0))
JIT_KERNEL_WGMMA_RS(16, 8, 8, 9, 10, 11, 12, 13, 14, JIT_KERNEL_F8(d, 0))
JIT_KERNEL_WGMMA_RS(32, 16, 16, 17, 18, 19, 20, 21, 22, JIT_KERNEL_F16(d, 0))
JIT_KERNEL_WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38, JIT_KERNEL_F32(d, 0))
JIT_KERNEL_WGMMA_RS(80, 40, 40, 41, 42, 43, 44, 45, 46, JIT_KERNEL_F32(d, 0), JIT_KERNEL_F8(d, 32))
JIT_KERNEL_WGMMA_RS(96, 48, 48, 49, 50, 51, 52, 53, 54, JIT_KERNEL_F32(d, 0), JIT_KERNEL_F16(d, 32))
JIT_KERNEL_WGMMA_RS(112, 56, 56, 57, 58, 59, 60, 61, 62, JIT_KERNEL_F32(d, 0),
                    JIT_KERNEL_F16(d, 32), JIT_KERNEL_F8(d, 48))
JIT_KERNEL_WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70, JIT_KERNEL_F64(d, 0))
JIT_KERNEL_WGMMA_RS(192, 96, 96, 97, 98, 99, 100, 101, 102, JIT_KERNEL_F64(d, 0),
                    JIT_KERNEL_F32(d, 64))
JIT_KERNEL_WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, 134, JIT_KERNEL_F64(d, 0),
                    JIT_KERNEL_F64(d, 64))

// Both of e4m3, with k contiguous in a and b: 8-bit operands have no other form.
#define JIT_KERNEL_WGMMA_E4M3(N, COUNT, A0, A1, A2, A3, B, P, ...)                                 \
  __device__ __forceinline__ void wgmma_ss_e4m3(float (&d)[COUNT], u64 a, u64 b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2                                          \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N                                            \
                 "k32.f32.e4m3.e4m3"                                                               \
                 " {" JIT_KERNEL_REGISTERS_##COUNT "}, %" #A0 ", %" #A1 ", p, 1, 1;\n}"            \
                 : __VA_ARGS__                                                                     \
                 : "l"(a), "l"(b), "r"(accumulate));                                               \
  }                                                                                                \
  __device__ __forceinline__ void wgmma_rs_e4m3(float (&d)[COUNT], u32 a0, u32 a1, u32 a2, u32 a3, \
                                                u64 b, int accumulate) {                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                           \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N                                            \
                 "k32.f32.e4m3.e4m3"                                                               \
                 " {" JIT_KERNEL_REGISTERS_##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3       \
                                                   "}, %" #B ", p, 1, 1;\n}"                       \
                 : __VA_ARGS__                                                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                   \
  }

JIT_KERNEL_WGMMA_E4M3(64, 32, 32, 33, 34, 35, 36, 37, JIT_KERNEL_F32(d, 0))
JIT_KERNEL_WGMMA_E4M3(128, 64, 64, 65, 66, 67, 68, 69, JIT_KERNEL_F64(d, 0))

}  // namespace jit_kernel

#undef JIT_KERNEL_F4
#undef JIT_KERNEL_F8
#undef JIT_KERNEL_F16
#undef JIT_KERNEL_F32
#undef JIT_KERNEL_F64
#undef JIT_KERNEL_R0
#undef JIT_KERNEL_R1
#undef JIT_KERNEL_R2
#undef JIT_KERNEL_R3
#undef JIT_KERNEL_R4
#undef JIT_KERNEL_R5
#undef JIT_KERNEL_R6
#undef JIT_KERNEL_R7
#undef JIT_KERNEL_R8
#undef JIT_KERNEL_R9
#undef JIT_KERNEL_R10
#undef JIT_KERNEL_R11
#undef JIT_KERNEL_R12
#undef JIT_KERNEL_R13
#undef JIT_KERNEL_R14
#undef JIT_KERNEL_R15
#undef JIT_KERNEL_REGISTERS_4
#undef JIT_KERNEL_REGISTERS_8
#undef JIT_KERNEL_REGISTERS_16
#undef JIT_KERNEL_REGISTERS_24
#undef JIT_KERNEL_REGISTERS_32
#undef JIT_KERNEL_REGISTERS_40
#undef JIT_KERNEL_REGISTERS_48
#undef JIT_KERNEL_REGISTERS_56
#undef JIT_KERNEL_REGISTERS_64
#undef JIT_KERNEL_REGISTERS_72
#undef JIT_KERNEL_REGISTERS_80
#undef JIT_KERNEL_REGISTERS_88
#undef JIT_KERNEL_REGISTERS_96
#undef JIT_KERNEL_REGISTERS_104
#undef JIT_KERNEL_REGISTERS_112
#undef JIT_KERNEL_REGISTERS_120
#undef JIT_KERNEL_REGISTERS_128
#undef JIT_KERNEL_WGMMA_SS
#undef JIT_KERNEL_WGMMA_SS_ASM
#undef JIT_KERNEL_WGMMA_RS
#undef JIT_KERNEL_WGMMA_RS_ASM
#undef JIT_KERNEL_WGMMA_E4M3
