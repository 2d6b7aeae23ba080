// Values of e4m3, transposed before the attention kernel runs: of 8-bit operands wgmma wants those
// side by side that are summed over, the keys of a column, and memory has the columns of a key.
//
// Of each key head a sequence begins with a block of kPreparedKeys keys of its own, and its keys
// end with zeros. Tiles of kKeys keys lie as the attention kernel has them in shared memory: a row
// for a column, its pieces of 16 keys swizzled, keys and columns in the orders of
// fp8_transposer.cuh.
#pragma once

#include "flash_attention_v3/hopper/common/sequence.cuh"
#include "flash_attention_v3/hopper/prefill/fp8_params.h"

namespace jit_kernel::hopper {

// Of 16 keys the one that is byte r of word j.
__device__ __forceinline__ constexpr int key_of_place(int j, int r) {
  return 8 * (r / 2) + 2 * j + r % 2;
}

// The row that holds a column.
__device__ __forceinline__ constexpr int row_of_column(int column) {
  return column / 16 * 16 + column % 2 * 8 + column % 16 / 2;
}

// Where 16 keys of a row lie in a tile.
template <int kKeys>
__device__ __forceinline__ int prepared_place(int row, int piece) {
  return row * kKeys + ((piece ^ (kKeys == 128 ? row % 8 : row / 2 % 4)) * 16);
}

// The first block of a sequence, of one key head.
__device__ __forceinline__ int first_block(const int* cu_seqlens_k, int seqlen_k, int batch) {
  if (cu_seqlens_k != nullptr) return cu_seqlens_k[batch] / kPreparedKeys + batch;
  return batch * max(1, (seqlen_k + kPreparedKeys - 1) / kPreparedKeys);
}

// The first tile of a sequence and key head.
template <int kKeys>
__device__ __forceinline__ int first_prepared(const Fp8Params& params, int batch, int head) {
  return (head * params.prepared_blocks +
          first_block(params.cu_seqlens_k, params.seqlen_k, batch)) *
         (kPreparedKeys / kKeys);
}

// The sequence that a block belongs to: the last one that does not begin behind it.
__device__ __forceinline__ int sequence_of(const PrepareParams& params, int block) {
  int low = 0, high = params.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const bool behind = first_block(params.cu_seqlens_k, params.seqlen_k, middle) > block;
    high = behind ? middle - 1 : high;
    low = behind ? low : middle;
  }
  return low;
}

// A block of keys in shared memory, 4 columns to a word. 32 lanes that read 4 keys each, as the
// order of keys has them, then read 32 different banks.
template <int kColumns>
__device__ __forceinline__ int word_of_key(int key) {
  const int group = key / 32;
  return key * (kColumns / 4 + 1) + group % 2 + group / 2 * 8;
}

// Reads `count` keys of a block, zeros behind them and behind the last column.
template <int kColumns>
__device__ __forceinline__ void read_keys(const PrepareParams& params, const unsigned char* v,
                                          int count, unsigned* words) {
  constexpr int kPieces = kColumns / 16;
#pragma unroll
  for (int first = 0; first < kPreparedKeys * kPieces; first += kPreparerThreads) {
    const int i = first + threadIdx.x, key = i / kPieces, piece = i % kPieces;
    uint4 read = {};
    if (key < count && 16 * piece < params.head_dim_v) {
      read = *reinterpret_cast<const uint4*>(v + key * params.row_stride + 16 * piece);
    }
    unsigned* const to = words + word_of_key<kColumns>(key) + 4 * piece;
    to[0] = read.x;
    to[1] = read.y;
    to[2] = read.z;
    to[3] = read.w;
  }
}

// Four keys of four columns each become four columns of four keys.
__device__ __forceinline__ void transpose_bytes(const unsigned (&keys)[4], unsigned (&columns)[4]) {
  const unsigned low[2] = {__byte_perm(keys[0], keys[1], 0x5140),
                           __byte_perm(keys[0], keys[1], 0x7362)};
  const unsigned high[2] = {__byte_perm(keys[2], keys[3], 0x5140),
                            __byte_perm(keys[2], keys[3], 0x7362)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    columns[i] = __byte_perm(low[i / 2], high[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
  }
}

// A warp writes 128 keys of a column at a time, a lane four of them.
template <int kColumns, int kKeys>
__device__ __forceinline__ void write_columns(const unsigned* words, unsigned char* to) {
  const int lane = threadIdx.x % 32, group = lane / 4;
  constexpr int kGroups = kKeys / 16;
  unsigned char* const tile = to + group / kGroups * (kColumns * kKeys) + lane % 4 * 4;
  const unsigned* from[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    from[r] = words + word_of_key<kColumns>(16 * group + key_of_place(lane % 4, r));
  }
#pragma unroll 2
  for (int word = threadIdx.x / 32; word < kColumns / 4; word += kPreparerThreads / 32) {
    const unsigned keys[4] = {from[0][word], from[1][word], from[2][word], from[3][word]};
    unsigned columns[4];
    transpose_bytes(keys, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = prepared_place<kKeys>(row_of_column(4 * word + i), group % kGroups);
      *reinterpret_cast<unsigned*>(tile + place) = columns[i];
    }
  }
}

// One thread block: a block of keys of one key head. An empty sequence has one, too, as every tile
// of queries reads one.
template <int kColumns, int kKeys>
__device__ __forceinline__ void prepare_values(const PrepareParams& params) {
  __shared__ unsigned words[kPreparedKeys * (kColumns / 4 + 1) + 9];
  const int block = blockIdx.x, head = blockIdx.y;
  const int batch = sequence_of(params, block);
  const int first = first_block(params.cu_seqlens_k, params.seqlen_k, batch);
  const int key = (block - first) * kPreparedKeys;
  const int begin = params.cu_seqlens_k != nullptr ? params.cu_seqlens_k[batch] : 0;
  // A length past the tensor's end does not lead out of it.
  const int room =
      params.cu_seqlens_k != nullptr ? params.cu_seqlens_k[batch + 1] - begin : params.seqlen_k;
  const int length =
      min(room, sequence_length(batch, params.seqlen_k, params.cu_seqlens_k, params.seqused_k));
  if (key >= max(1, length)) return;
  read_keys<kColumns>(params,
                      params.v + batch * params.batch_stride + (begin + key) * params.row_stride +
                          head * params.head_stride,
                      length - key, words);
  __syncthreads();
  write_columns<kColumns, kKeys>(
      words, params.prepared + (static_cast<long long>(head) * params.blocks + block) *
                                   (kPreparedKeys * kColumns));
}

// In a tile of shared memory the keys in front of `begin` and from `end` on become 0; a warpgroup.
template <class C>
__device__ __forceinline__ void keep_prepared_values(char* v, int begin, int end) {
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < C::kHeadDimV * (C::kKeys / 16); i += 128) {
    const int row = i / (C::kKeys / 16), first = i % (C::kKeys / 16) * 16;
    if (begin <= first && first + 16 <= end) continue;
    unsigned* const words =
        reinterpret_cast<unsigned*>(v + prepared_place<C::kKeys>(row, first / 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsigned kept = 0;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = first + key_of_place(j, r);
        if (begin <= key && key < end) kept |= 0xffu << 8 * r;
      }
      words[j] &= kept;
    }
  }
}

}  // namespace jit_kernel::hopper
