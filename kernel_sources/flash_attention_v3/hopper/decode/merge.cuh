// Partial results of an item that several parts share, or of a cluster, and their merge.
#pragma once

#include "flash_attention_v3/hopper/decode/ranges.cuh"
#include "flash_attention_v3/hopper/decode/schedule.cuh"

namespace jit_kernel::hopper {

// A partial result: kRows x kHeadDim of output, then half a reference (as exponent of 2) and a sum
// a row.
template <class C>
__device__ __forceinline__ float* partial_of(const DecodeParams& params, int part, int head,
                                             bool is_first) {
  const long long slot = (static_cast<long long>(part) * params.heads_k + head) * 2 + is_first;
  return params.partials + slot * C::kPartialFloats;
}

template <class C>
__device__ __forceinline__ void store_partial(const DecodeShared<C>& shared, int stream,
                                              float* partial,
                                              float (&output)[C::kPanels][C::kRows / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    store_columns<C>(partial + place_in_output<C>(i), i, output);
  }
  if (thread < C::kRows) {
    float* const end = partial + C::kRows * C::kHeadDim + 2 * thread;
    end[0] = shared.references(stream)[thread];
    end[1] = sum_of(shared, stream, thread);
  }
}

// Whether this part, with `arrivals` of `all` partial results, is the last one of an item to
// arrive; its own are written. The counter is zero again after the last.
__device__ __forceinline__ bool arrive_last(const DecodeParams& params, const DecodeItem& item,
                                            int arrivals, int all, int head, int stream,
                                            volatile int* answer) {
  stream_sync(stream);
  if (threadIdx.x % 128 == 0) {
    int* const counter = params.counters + item.first_part * params.heads_k + head;
    int before;
    // Releases what the barrier has gathered from the stream's threads, acquires what the others
    // did.
    asm volatile("fence.acq_rel.gpu;\natom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(arrivals)
                 : "memory");
    const bool last = before + arrivals == all;
    if (last) *counter = 0;
    *answer = last;
  }
  stream_sync(stream);
  return *answer != 0;
}

__device__ __forceinline__ float4 load_other(const float* address) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float2 load_other_pair(const float* address) {
  float2 value;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "l"(address)
               : "memory");
  return value;
}

// Four neighbouring numbers of a row, summed over parts with their weights.
struct MergedQuad {
  float top = minus_infinity(), sum = 0.f;
  float4 total = {0.f, 0.f, 0.f, 0.f};

  template <int kCount>
  __device__ __forceinline__ void add(const float4 (&value)[kCount], const float2 (&end)[kCount]) {
    float higher = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) higher = fmaxf(higher, end[i].x);
    // -inf less -inf is no number: parts without a key are skipped.
    const float old = top == higher ? 1.f : exp2_fast(2.f * (top - higher));
    top = higher;
    sum *= old;
    total = {total.x * old, total.y * old, total.z * old, total.w * old};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = end[i].x == minus_infinity() ? 0.f
                           : end[i].x == higher         ? 1.f
                                                        : exp2_fast(2.f * (end[i].x - higher));
      sum = fmaf(end[i].y, weight, sum);
      total.x = fmaf(value[i].x, weight, total.x);
      total.y = fmaf(value[i].y, weight, total.y);
      total.z = fmaf(value[i].z, weight, total.z);
      total.w = fmaf(value[i].w, weight, total.w);
    }
  }

  // Of fixed ranges: those before this node become one with it.
  __device__ __forceinline__ void join_before(const MergedQuad& before) {
    const JoinFactors by = join_factors(before.top, top);
    top = by.top;
    sum = join(before.sum, sum, by);
    total = {join(before.total.x, total.x, by), join(before.total.y, total.y, by),
             join(before.total.z, total.z, by), join(before.total.w, total.w, by)};
  }

  template <class Element>
  __device__ __forceinline__ void store(const DecodeParams& params, const DecodeItem& item,
                                        const DecodeQuery& query, int quad) const {
    const RowResult result = finish_query(sum, top, half_sink_log2<Element>(params, query.head));
    if (quad == 0) store_lse(params, item, query, result.lse);
    const u32 words[2] = {pack<Element>(total.x * result.factor, total.y * result.factor),
                          pack<Element>(total.z * result.factor, total.w * result.factor)};
    *reinterpret_cast<uint2*>(out_of(params, item, query) + 4 * quad) = {words[0], words[1]};
  }
};

// Merges the parts of an item in their order, four numbers of a row a thread.
template <class C>
__device__ __forceinline__ void merge_parts(const DecodeParams& params, const DecodeItem& item,
                                            const DecodeShared<C>& shared, int stream, int head) {
  constexpr int kQuads = C::kHeadDim / 4;
  constexpr int kAtOnce = C::kRows <= 16 ? 8 : 4;  // loads on their way
  const int rows = min(C::kRows, tokens_of(params, item) * params.group);
  const float* const first = partial_of<C>(params, item.first_part, head, false);
  const int step = 2 * params.heads_k * C::kPartialFloats, count = item.parts;
#pragma unroll 1
  for (int at = threadIdx.x % 128; at < rows * kQuads; at += 128) {
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    const float* const of_thread = first + index * C::kHeadDim + 4 * quad;
    const float* const of_row = first + C::kRows * C::kHeadDim + 2 * index;
    MergedQuad merged;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kAtOnce) {
      float4 value[kAtOnce];
      float2 end[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = min(begin + i, count - 1);
        // The first part wrote the end of its run, the others the beginning of theirs.
        const int offset = part * step + (part == 0 ? C::kPartialFloats : 0);
        value[i] = load_other(of_thread + offset);
        end[i] = load_other_pair(of_row + offset);
        if (begin + i >= count) end[i].x = minus_infinity();
      }
      merged.add(value, end);
    }
    merged.store<typename C::Element>(params, item, *shared.query(stream, index), quad);
  }
}

// The nodes that a sequence's ranges were joined to, to shared memory; how many there are. A slot
// that none begins in holds another launch's, which is not looked at.
template <class C>
__device__ __forceinline__ int find_nodes(const DecodeParams& params, const DecodeItem& item,
                                          const DecodeShared<C>& shared, int stream, int head,
                                          int thread) {
  constexpr int kOfLane = (1 << kMostRangesLog2) / 32;
  const int lane = thread % 32;
  int counts[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int range = 32 * i + lane;
    if (range < item.ranges) {
      asm volatile("ld.global.cg.s32 %0, [%1];"
                   : "=r"(counts[i])
                   : "l"(range_of<C>(params, item, range, head) + C::kOffsetCount)
                   : "memory");
    }
  }
  int count = 0;
#pragma unroll 1
  for (int range = 0; range < item.ranges; ++count) {
    int of_node = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int found = __shfl_sync(0xffffffffu, counts[i], range % 32);
      if (range / 32 == i) of_node = found;
    }
    if (thread == 0) {
      shared.nodes(stream)[count] = {static_cast<unsigned char>(range),
                                     static_cast<unsigned char>(of_node)};
    }
    range += of_node;
  }
  stream_sync(stream);
  return count;
}

// Merges the ranges of a sequence in their order, four numbers of a row a thread.
template <class C>
__device__ __forceinline__ void merge_ranges(const DecodeParams& params, const DecodeItem& item,
                                             const DecodeShared<C>& shared, int stream, int head) {
  constexpr int kQuads = C::kHeadDim / 4;
  constexpr int kAhead = C::kRows <= 16 ? 8 : 4;  // loads on their way
  const int rows = min(C::kRows, tokens_of(params, item) * params.group);
  const float* const first = range_of<C>(params, item, 0, head);
  const int step = params.heads_k * C::kPartialFloats;
  int thread = threadIdx.x % 128;
  asm volatile("" : "+r"(thread));  // as in merge_in_cluster
  const int count = find_nodes<C>(params, item, shared, stream, head, thread);
  const int chain = chain_log2<C::kRows>(params, item);
  const uchar2* const nodes = shared.nodes(stream);
#pragma unroll 1
  for (int at = thread; at < rows * kQuads; at += 128) {
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    const float* const of_thread = first + index * C::kHeadDim + 4 * quad;
    const float* const of_row = first + C::kRows * C::kHeadDim + 2 * index;
    float4 value[kAhead];
    float2 end[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int offset = nodes[min(i, count - 1)].x * step;
      value[i] = load_other(of_thread + offset);
      end[i] = load_other_pair(of_row + offset);
    }
    MergedQuad merged, kept[kMostRangesLog2];
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      merged = {end[0].x, end[0].y, value[0]};
#pragma unroll
      for (int ahead = 0; ahead + 1 < kAhead; ++ahead) {
        value[ahead] = value[ahead + 1];
        end[ahead] = end[ahead + 1];
      }
      const int offset = nodes[min(i + kAhead, count - 1)].x * step;
      value[kAhead - 1] = load_other(of_thread + offset);
      end[kAhead - 1] = load_other_pair(of_row + offset);
      const uchar2 node = nodes[i];
      const int end = node.x + node.y, in_chain = (1 << chain) - 1;
      if (C::kRows > kRowsOfTree && node.y < 1 << chain) {
        if ((node.x & in_chain) != 0) merged.join_before(kept[0]);
        if ((end & in_chain) != 0) {  // what lies behind it in the chain comes next
          kept[0] = merged;
          continue;
        }
      }
      // The first level, from the node's own on, where it is a first half waits for the second one.
      const int own = max(chain, 31 - __clz(node.y));
      const int waits = __ffs(~((end - 1) >> own)) - 1 + own;
#pragma unroll
      for (int level = 0; level < kMostRangesLog2; ++level) {
        if (level >= own && level < waits) merged.join_before(kept[level]);
        if (level == waits) kept[level] = merged;
      }
    }
    merged.store<typename C::Element>(params, item, *shared.query(stream, index), quad);
  }
}

// A block of a cluster says that it runs; every thread, which waits for the others before it ends.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address of the same place in another block's shared memory.
__device__ __forceinline__ u32 in_block(u32 address, int rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// A quad of results with its reference and sum, to another block's memory, whose barrier counts the
// bytes.
__device__ __forceinline__ void send_quad(u32 quad, u32 end, u32 barrier, const MergedQuad& own) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(quad),
      "f"(own.total.x), "f"(own.total.y), "f"(own.total.z), "f"(own.total.w), "r"(barrier)
      : "memory");
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          end),
      "f"(own.top), "f"(own.sum), "r"(barrier)
      : "memory");
}

// The results of a block's streams, which have the same head, are joined and sent to the blocks of
// the cluster: quad i of all rows is block i % kClusterParts's. `thread`: of all consumers.
template <class C>
__device__ __forceinline__ void send_results(const DecodeItem& item, const DecodeShared<C>& shared,
                                             int part, int quads, int thread) {
  constexpr int kQuads = C::kHeadDim / 4, kResults = C::kRows * C::kHeadDim;
  const float* const results = reinterpret_cast<const float*>(shared.base + C::kOffsetTiles);
  const float2* const ends = reinterpret_cast<const float2*>(shared.base);
#pragma unroll 1
  for (int at = thread; at < quads; at += 128 * C::kStreams) {
    const int owner = at % kClusterParts, place = at / kClusterParts;
    const u32 there = in_block(shared_address(shared.base), owner);
    float4 value[C::kStreams];
    float2 end[C::kStreams];
#pragma unroll
    for (int of = 0; of < C::kStreams; ++of) {
      value[of] = *reinterpret_cast<const float4*>(results + of * kResults + 4 * at);
      end[of] = ends[of * C::kRows + at / kQuads];
    }
    MergedQuad own;
    if (item.ranges == 0) {
      own.add(value, end);
    } else {
      own = {end[0].x, end[0].y, value[0]};
      if (C::kStreams == 2 && item.ranges > kClusterParts) {
        constexpr int kSecond = C::kStreams - 1;
        own = {end[kSecond].x, end[kSecond].y, value[kSecond]};
        own.join_before({end[0].x, end[0].y, value[0]});
      }
    }
    const int quad = part * C::kQuadsOfBlock + place;
    send_quad(there + C::kOffsetIncoming + quad * 16, there + C::kOffsetEnds + quad * 8,
              there + C::kOffsetBarriers + (C::kBarriers - 1) * 8, own);
  }
}

// What a cluster's blocks have sent of fixed ranges, in their order. `nodes`: a power of two, each
// of 2^chain ranges that are joined in turn.
__device__ __forceinline__ MergedQuad merge_nodes(const float4 (&value)[kClusterParts],
                                                  const float2 (&end)[kClusterParts], int nodes,
                                                  int chain) {
  MergedQuad merged[kClusterParts];
#pragma unroll
  for (int i = 0; i < kClusterParts; ++i) merged[i] = {end[i].x, end[i].y, value[i]};
#pragma unroll
  for (int i = 0; i < kClusterParts; i += 4) {
    // Half of the ranges at most are a chain: two are a node of the tree, too.
    if (chain != 2) break;
    merged[i + 1].join_before(merged[i]);
    merged[i + 2].join_before(merged[i + 1]);
    merged[i + 3].join_before(merged[i + 2]);
    merged[i] = merged[i + 3];
  }
#pragma unroll
  for (int width = 1; width < kClusterParts; width *= 2) {
    if (width >= nodes) break;
    if (chain == 2 && width < 4) continue;
#pragma unroll
    for (int i = 0; i < kClusterParts; i += 2 * width) {
      merged[i + width].join_before(merged[i]);
      merged[i] = merged[i + width];
    }
  }
  return merged[0];
}

// The results of a cluster's streams become one: each of its threads has some of the numbers. Who
// writes into another block's memory waits for nothing; to read it takes 700 cycles, and a barrier
// of the cluster that releases writes waits for all memory of the GPU. All consumer threads.
template <class C>
__device__ __forceinline__ void merge_in_cluster(const DecodeParams& params, const DecodeItem& item,
                                                 const DecodeShared<C>& shared, int stream,
                                                 int part,
                                                 float (&output)[C::kPanels][C::kRows / 2]) {
  constexpr int kQuads = C::kHeadDim / 4, kResults = C::kRows * C::kHeadDim;
  // The tiles' memory is done with once both streams are through.
  named_barrier_sync(kStreamsBarrier, 128 * C::kStreams);
  float* const results = reinterpret_cast<float*>(shared.base + C::kOffsetTiles);
#pragma unroll
  for (int i = 0; i < DecodeSoftmax<C>::kQueries; ++i) {
    store_columns<C>(results + stream * kResults + place_in_output<C>(i), i, output);
  }
  int thread = threadIdx.x % 128;
  // What follows from it is not worked out in front of the loop over items, for which it would take
  // registers.
  asm volatile("" : "+r"(thread));
  const int of_all = stream * 128 + thread;
  // References and sums where the queries lay.
  if (thread < C::kRows) {
    reinterpret_cast<float2*>(shared.base)[stream * C::kRows + thread] = {
        shared.references(stream)[thread], sum_of(shared, stream, thread)};
  }
  const int quads = min(C::kRows, tokens_of(params, item) * params.group) * kQuads;
  if (of_all == 0) mbarrier_arrive_expect(shared.incoming_full(), quads * C::kBytesOfQuad);
  named_barrier_sync(kStreamsBarrier, 128 * C::kStreams);
  cluster_wait();                                      // all blocks run
  if constexpr (!C::kRoomForIncoming) cluster_sync();  // and are done with their tiles
  send_results<C>(item, shared, part, quads, of_all);
  mbarrier_wait(shared.incoming_full(), 0);
#pragma unroll 1
  for (int place = of_all; place * kClusterParts < quads; place += 128 * C::kStreams) {
    const int at = place * kClusterParts + part;
    const int index = at / kQuads, quad = at % kQuads;
    if (quad * 4 >= params.head_dim_v) continue;
    float4 value[kClusterParts];
    float2 end[kClusterParts];
#pragma unroll
    for (int i = 0; i < kClusterParts; ++i) {
      value[i] = shared.incoming_quads(i)[place];
      end[i] = shared.incoming_ends(i)[place];
    }
    MergedQuad merged;
    if (item.ranges > 0) {
      merged = merge_nodes(value, end, item.ranges, chain_log2<C::kRows>(params, item));
    } else {
      merged.add(value, end);
    }
    merged.store<typename C::Element>(params, item, *shared.query(stream, index), quad);
  }
}

}  // namespace jit_kernel::hopper
