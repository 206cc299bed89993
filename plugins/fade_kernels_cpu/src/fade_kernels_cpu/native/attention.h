// What the caller says; `layouts.py` has the same fields in the same order. Pointers are to memory of the caller.
#pragma once
#include <cstdint>

struct FadeSide {             // codes of keys or of values of one tier, as `PackedFormat` has them
  const uint16_t* codes[2];   // a plane each, high bits first: [N, rows, dim] or [N, dim, rows]; null where runs are read
  const uint32_t* meta;       // [N, groups, tile or dim]: fp16 scale low, minimum high
  const float* levels;        // of each code; null for the code itself
  int32_t widths[2], planes;  // bits of a plane
  int32_t tile, dim, group;
  int32_t by_token;           // token-major words
  int32_t per_channel;        // a group is tokens of a channel, else channels of a token
};

struct FadeRuns {  // codes of channels of many widths, as `RunLayout` has them; `kept` is 0 where there are none
  const uint16_t* codes;  // [N, row]
  const uint8_t* gain;    // [N, tile / 2]
  const int32_t* blocks;  // [H_kv, count, 6]
  const int32_t* widths;  // [H_kv, kept]
  const float* levels;    // [512]
  const float* gains;     // [H_kv, 16]
  int32_t count, row, kept;
};

struct FadeFull {  // full-precision tokens [B, H_kv, T, dim], channels contiguous; strides in elements
  const void* data;
  int64_t stride_row, stride_head, stride_token;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
};

struct FadeSegment {
  FadeSide keys, values;
  FadeRuns key_runs, value_runs;
  FadeFull full_keys, full_values;
  const int32_t *table, *used, *counts;  // [B, H_kv, table_width], [B, H_kv], as the table or null
  const int32_t* lengths;                // [B, H_kv] of full-precision tokens, or null
  const float *query, *bias;             // [B, H_kv, NP, key_dim], scaled; [B, H_kv, N] or null
  const uint8_t* mask;                   // which slots a query sees; null for all that are live
  int64_t mask_row, mask_head, mask_query, mask_slot;
  float *output, *mass, *probabilities;  // [B, H_kv, N, value_dim], zeros; [B, H_kv, N] or null; [B, H_kv, Q, slots] or null
  int64_t slots, table_width;
  int32_t packed, causal, key_dim, value_dim;
};

struct FadeCall {
  const FadeSegment* segment;
  const float* sinks;  // [H_q] or null
  float* lse;          // [B, H_kv, N]
  int64_t rows, heads;
  int32_t segments, count, padded, queries;  // N, NP, Q
  float softcap;                             // 0 for none
  int32_t threads;
};
