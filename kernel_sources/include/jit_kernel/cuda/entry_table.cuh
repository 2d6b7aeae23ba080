// The parameter types of a kernel as the generic launcher needs them, found by the compiler itself:
// a table in the cubin, two letters a parameter, which Python reads from there.
//
// The first is how a value is passed; the second, of a pointer, what its elements are:
//   p pointer; ? bool; b h i l signed and B H I L unsigned integers of 8, 16, 32 and 64 bits;
//   f float; d double; x any other value, a struct or a tensor map, as bytes: the second table has
//   their sizes
//   f d h b 8 9 i l of float, double, fp16, bf16, e4m3, e5m2, int and long long; * of anything
//   else, which a launch does not look at: bytes, vectors, unsigned words
#pragma once

namespace jit_kernel {
struct bf16;  // element_types.h
struct fp16;
struct e4m3;
}  // namespace jit_kernel
struct __nv_bfloat16;  // cuda_bf16.h, cuda_fp16.h and cuda_fp8.h
struct __half;
struct __nv_fp8_e4m3;
struct __nv_fp8_e5m2;

namespace jit_kernel::entry_table {

template <class Element>
struct Letter {
  static constexpr char value = '*';
};
#define JIT_KERNEL_LETTER(Element, letter) \
  template <>                              \
  struct Letter<Element> {                 \
    static constexpr char value = letter;  \
  };
JIT_KERNEL_LETTER(float, 'f')
JIT_KERNEL_LETTER(double, 'd')
JIT_KERNEL_LETTER(int, 'i')
JIT_KERNEL_LETTER(long, 'l')
JIT_KERNEL_LETTER(long long, 'l')
JIT_KERNEL_LETTER(bf16, 'b')
JIT_KERNEL_LETTER(fp16, 'h')
JIT_KERNEL_LETTER(e4m3, '8')
JIT_KERNEL_LETTER(__nv_bfloat16, 'b')
JIT_KERNEL_LETTER(__half, 'h')
JIT_KERNEL_LETTER(__nv_fp8_e4m3, '8')
JIT_KERNEL_LETTER(__nv_fp8_e5m2, '9')
#undef JIT_KERNEL_LETTER

template <class T>
struct Bare {
  using Type = T;
};
template <class T>
struct Bare<const T> : Bare<T> {};
template <class T>
struct Bare<volatile T> : Bare<T> {};

// A parameter that is passed by value.
template <class T>
struct Parameter {
  static constexpr char passed = 'x', elements = '-';
};
#define JIT_KERNEL_VALUE(T, letter)                        \
  template <>                                              \
  struct Parameter<T> {                                    \
    static constexpr char passed = letter, elements = '-'; \
  };
JIT_KERNEL_VALUE(bool, '?')
JIT_KERNEL_VALUE(char, 'b')
JIT_KERNEL_VALUE(signed char, 'b')
JIT_KERNEL_VALUE(unsigned char, 'B')
JIT_KERNEL_VALUE(short, 'h')
JIT_KERNEL_VALUE(unsigned short, 'H')
JIT_KERNEL_VALUE(int, 'i')
JIT_KERNEL_VALUE(unsigned, 'I')
JIT_KERNEL_VALUE(long, 'l')
JIT_KERNEL_VALUE(unsigned long, 'L')
JIT_KERNEL_VALUE(long long, 'l')
JIT_KERNEL_VALUE(unsigned long long, 'L')
JIT_KERNEL_VALUE(float, 'f')
JIT_KERNEL_VALUE(double, 'd')
#undef JIT_KERNEL_VALUE

template <class T>
struct Parameter<T*> {
  static constexpr char passed = 'p', elements = Letter<typename Bare<T>::Type>::value;
};

template <class... Parameters>
struct Table {
  char letters[2 * sizeof...(Parameters) + 1];
};

template <class... Parameters>
__device__ constexpr Table<Parameters...> of(void (*)(Parameters...)) {
  Table<Parameters...> table{};
  int next = 0;
  ((table.letters[next++] = Parameter<Parameters>::passed,
    table.letters[next++] = Parameter<Parameters>::elements),
   ...);
  return table;
}

template <class... Parameters>
struct Sizes {
  unsigned short bytes[sizeof...(Parameters) + 1];
};

template <class... Parameters>
__device__ constexpr Sizes<Parameters...> sizes_of(void (*)(Parameters...)) {
  return {{sizeof(Parameters)..., 0}};
}

}  // namespace jit_kernel::entry_table

// NVRTC is told of the entry by name; to nvcc a use on the host says that there must be one.
#ifdef __CUDACC_RTC__
#define JIT_KERNEL_INSTANTIATE(...)
#else
#define JIT_KERNEL_INSTANTIATE(...) \
  void* jit_kernel_instantiated() { return reinterpret_cast<void*>(__VA_ARGS__); }
#endif

#define JIT_KERNEL_ENTRY(...)                                                                     \
  extern "C" __device__ auto jit_kernel_entry_table = ::jit_kernel::entry_table::of(__VA_ARGS__); \
  extern "C" __device__ auto jit_kernel_entry_sizes =                                             \
      ::jit_kernel::entry_table::sizes_of(__VA_ARGS__);                                           \
  JIT_KERNEL_INSTANTIATE(__VA_ARGS__)
