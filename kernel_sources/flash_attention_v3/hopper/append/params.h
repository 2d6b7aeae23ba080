// The arguments that the launcher passes to the append kernel. Included by both, so it uses only
// the language's own types.
#pragma once

namespace jit_kernel::hopper {

constexpr int kAppendThreads = 128;
constexpr int kAppendRows = 4;  // rows that a thread has in flight
constexpr int kChunkElements = 8;
constexpr int kChunkBytes = 16;

// floor(n / divisor) for 0 <= n < 2^31 is 2 n multiplier / 2^(32 + shift).
struct Divisor {
  unsigned divisor, multiplier, shift;
};

// Rows of one tensor and where they go. A row is the elements of a token's head; an item is a row,
// counted head by head, then token by token through all sequences. Strides are in bytes.
struct AppendPart {
  const char* source;
  char* destination;
  long long source_batch, source_token, source_head;
  long long destination_batch, destination_token, destination_head;
  const int* cu_seqlens;  // null for a dense tensor
  // Of a cache in e4m3, whose rows are divided by both: of a sequence and head, of a token and
  // head. Each null for 1; strides in elements.
  const float *descale, *scales;
  long long descale_batch, descale_head;
  long long scales_batch, scales_token, scales_head;
  unsigned items;
  unsigned first_block;
  Divisor heads;
  Divisor tokens;   // of a dense sequence
  int chunks;       // pieces of eight elements in a row
  int lanes_shift;  // 2^lanes_shift lanes move a row, a piece each; at least as many as pieces
  bool
      wide;  // rows of the source, and of the tables that turn them, begin at multiples of 16 bytes
  bool rotates;
};

// The parts of a launch, in the order of their blocks.
enum AppendKind { kNewKeys, kNewValues, kQueries, kAppendParts };

struct AppendParams {
  AppendPart parts[kAppendParts];
  const char *rotary_cos, *rotary_sin;
  long long cos_stride, sin_stride;  // of a position, in bytes
  const int* cache_seqlens;          // each null when absent
  const int* rotary_seqlens;
  const int* cache_batch_idx;
  const int* page_table;  // null for a dense cache
  long long page_table_stride;
  Divisor page_size;
  int batch;
  int capacity;       // tokens that a sequence of the cache, or its pages, hold
  int cache_rows;     // rows of page_table, or sequences of a dense cache
  int cache_blocks;   // pages, or sequences of a dense cache
  int rotary_chunks;  // pieces of a row that are turned
  int rotary_positions;
  bool interleaved;
  bool by_token;  // queries turn by their own positions, else all by the first one's
};

}  // namespace jit_kernel::hopper
