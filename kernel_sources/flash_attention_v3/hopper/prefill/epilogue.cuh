// From accumulators to global memory: normalise, add the sink's term, store rows and lse.
#pragma once

#include "flash_attention_v3/hopper/common/softmax.cuh"
#include "flash_attention_v3/hopper/prefill/shared_memory.cuh"

namespace jit_kernel::hopper {

template <class Element>
__device__ __forceinline__ float load_element(const void* pointer, int index) {
  const u32 bits = static_cast<const unsigned short*>(pointer)[index];
  float value;
  if constexpr (kIsBf16<Element>) return __int_as_float(bits << 16);
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(bits));
  return value;
}

template <class Element>
__device__ __forceinline__ float sink_log2(const ForwardParams& params, int head) {
  if (params.sinks == nullptr) return __int_as_float(0xff800000);
  const float sink = params.sinks_are_elements ? load_element<Element>(params.sinks, head)
                                               : static_cast<const float*>(params.sinks)[head];
  return sink * 1.44269504089f;
}

// 16 bytes, predicated: a branch would end the overlap of what comes before and after.
__device__ __forceinline__ void store_16_if(void* destination, const u32 (&words)[4], bool stores) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::
          "l"(destination),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(static_cast<u32>(stores))
      : "memory");
}

// Transposes 4 x 4 words over the four threads of a row: thread t gets word t of each thread, in
// their order. So each thread holds 8 neighbouring columns, 16 bytes, in place of 2 columns of four
// groups.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4], int thread) {
  const bool odd = thread & 1;
  const bool high = thread & 2;
  const u32 from_0 = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
  const u32 from_1 = __shfl_xor_sync(0xffffffffu, odd ? words[2] : words[3], 1);
  const u32 a[2] = {odd ? from_0 : words[0], odd ? words[1] : from_0};
  const u32 b[2] = {odd ? from_1 : words[2], odd ? words[3] : from_1};
  const u32 got_0 = __shfl_xor_sync(0xffffffffu, high ? a[0] : b[0], 2);
  const u32 got_1 = __shfl_xor_sync(0xffffffffu, high ? a[1] : b[1], 2);
  words[0] = high ? got_0 : a[0];
  words[1] = high ? got_1 : a[1];
  words[2] = high ? b[0] : got_0;
  words[3] = high ? b[1] : got_1;
}

// Writes this warpgroup's 64 rows; rows past the sequence's end and columns past head_dim_v are
// left alone. No branch stands between the rows' shuffles, so that they overlap.
template <class C>
__device__ __forceinline__ void store_tile(const ForwardParams& params, const TileInfo& tile,
                                           float (&output)[C::kHeadDimV / 2], const Softmax& state,
                                           int warpgroup) {
  const int thread = threadIdx.x % 4;
  const int row =
      tile.row + warpgroup * kRowsPerWarpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const bool inside[2] = {row < tile.len_q, row + 8 < tile.len_q};
  const float sink = sink_log2<typename C::Element>(params, tile.head);
  const RowResult result[2] = {finish_row(state.sum[0], state.reference[0], sink),
                               finish_row(state.sum[1], state.reference[1], sink)};
  const long long place = static_cast<long long>(tile.offset_q) + row;
  if (params.lse != nullptr && thread == 0) {
    float* const lse = params.lse + tile.batch * params.lse_batch_stride +
                       tile.head * params.lse_head_stride + place;
    if (inside[0]) lse[0] = result[0].lse;
    if (inside[1]) lse[8] = result[1].lse;
  }
  unsigned short* const out = static_cast<unsigned short*>(params.out) +
                              tile.batch * params.out_batch_stride + place * params.out_row_stride +
                              tile.head * params.out_head_stride + 8 * thread;
#pragma unroll
  for (int i = 0; i < C::kHeadDimV / 32; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * i + 4 * j + 2 * r;
        words[j] = pack<typename C::Element>(output[at] * result[r].factor,
                                             output[at + 1] * result[r].factor);
      }
      transpose_quad(words, thread);
      store_16_if(out + 8 * r * params.out_row_stride + 32 * i, words,
                  inside[r] && 32 * i + 8 * thread < params.head_dim_v);
    }
  }
}

// One warp of each block: rows of out that belong to no query.
__device__ __forceinline__ void clear_rows(const ForwardParams& params, int batch, int begin,
                                           int end) {
  const int lane = threadIdx.x % 32;
  const int rows = end - begin;
  for (int i = 0; i < rows * params.heads_q; ++i) {
    const int head = i / rows;
    const long long place = begin + i % rows;
    unsigned short* out = static_cast<unsigned short*>(params.out) +
                          batch * params.out_batch_stride + place * params.out_row_stride +
                          head * params.out_head_stride;
    for (int column = lane; column < params.head_dim_v; column += 32) out[column] = 0;
    if (params.lse != nullptr && lane == 0) {
      params.lse[batch * params.lse_batch_stride + head * params.lse_head_stride + place] =
          __int_as_float(0xff800000);
    }
  }
}

__device__ __forceinline__ void clear_rest(const ForwardParams& params) {
  for (int batch = blockIdx.x; batch < params.batch; batch += gridDim.x) {
    const int used = params.seqused_q != nullptr ? max(0, params.seqused_q[batch]) : 0;
    if (params.cu_seqlens_q == nullptr) {
      clear_rows(params, batch, params.seqused_q != nullptr ? used : params.seqlen_q,
                 params.seqlen_q);
      continue;
    }
    const int begin = params.cu_seqlens_q[batch];
    const int end = params.cu_seqlens_q[batch + 1];
    if (params.seqused_q != nullptr) clear_rows(params, batch, begin + used, end);
    if (batch == 0) clear_rows(params, batch, 0, begin);
    if (batch == params.batch - 1) clear_rows(params, batch, max(begin, end), params.seqlen_q);
  }
}

}  // namespace jit_kernel::hopper
