// A consumer warpgroup's rows of queries and its share of the registers. No device code.
#pragma once

namespace jit_kernel::hopper {

constexpr int kRowsPerWarpgroup = 64;  // the rows of one wgmma

// Registers a thread, once the producer's warpgroup has given most of its own to the consumers,
// which hold scores, probabilities and output. setmaxnreg takes multiples of 8; together no more
// than the block has at its start: 65,536 over its threads, in steps of 8. Enumerators, because a
// cubin keeps a symbol for every constexpr variable.
template <int kConsumers, int kProducer_, int kConsumer_>
struct RegisterCounts {
  enum : int { kProducer = kProducer_, kConsumer = kConsumer_ };
  static_assert(kProducer % 8 == 0 && kConsumer % 8 == 0, "setmaxnreg takes multiples of 8");
  static_assert(kProducer + kConsumers * kConsumer <=
                    (kConsumers + 1) * (65536 / ((kConsumers + 1) * 128) / 8 * 8),
                "no more registers than the block has at its start");
};

// By the number of consumer warpgroups.
template <int kConsumers>
struct Registers;
template <>
struct Registers<2> : RegisterCounts<2, 40, 232> {};
template <>
struct Registers<3> : RegisterCounts<3, 56, 152> {};
template <>
struct Registers<4> : RegisterCounts<4, 32, 112> {};

}  // namespace jit_kernel::hopper
