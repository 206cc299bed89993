// Attention of a few queries over packed tiles and full-precision tokens, on a CPU, each token read once where it lies.
//
// A tile is unpacked to float32 in a buffer that stays in the core's own cache, and meets the queries there. Work is cut into
// chunks of CHUNK slots, whatever the number of threads: the same call gives the same bits.
//
// N: query heads of a KV head times query tokens, padded with zeros to NP. T: slots of a segment. D: channels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "attention.h"

namespace {

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int LANES = 8;
constexpr int64_t CHUNK = 512;
constexpr float NONE = -std::numeric_limits<float>::infinity();

inline Lanes load(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline void store(float* at, Lanes x) { *reinterpret_cast<Lanes*>(at) = x; }
inline Lanes all(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

inline float total(Lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// Sums of eight vectors, one a lane.
inline Lanes totals(const Lanes* x) {
  Lanes four[4];
  for (int i = 0; i < 4; i++) {
    Lanes even = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    Lanes odd = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    four[i] = even + odd;  // lanes: a b a b a b a b
  }
  Lanes two[2];
  for (int i = 0; i < 2; i++) {
    Lanes low = __builtin_shufflevector(four[2 * i], four[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13);
    Lanes high = __builtin_shufflevector(four[2 * i], four[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    two[i] = low + high;  // lanes: a b c d a b c d
  }
  Lanes low = __builtin_shufflevector(two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11);
  Lanes high = __builtin_shufflevector(two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15);
  return low + high;
}

// e to the power of x, for x <= 0, to some 1e-7 of itself; 0 below -87. The compiler makes vectors of it.
inline float power(float x) {
  float held = x < -87.0f ? -87.0f : x;
  float whole = std::floor(held * 1.44269504088896341f + 0.5f);
  float part = held - whole * 0.693359375f + whole * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * part + 1.3981999507e-3f;
  y = y * part + 8.3334519073e-3f;
  y = y * part + 4.1665795894e-2f;
  y = y * part + 1.6666665459e-1f;
  y = y * part + 5.0000001201e-1f;
  y = y * part * part + part + 1.0f;
  int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x < -87.0f ? 0.0f : y * scale;
}

inline float half(uint32_t bits) {
  uint32_t rest = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  float x;
  std::memcpy(&x, &rest, 4);
  x *= 0x1p112f;  // the exponents' zeros are 112 apart; subnormal numbers come out right too
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  wide = ((bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : wide) | sign;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline float brain(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// --- unpacking a tile ---------------------------------------------------------------------------------------------------
//
// Field `j` of word row `r` of a plane is token `j * rows + r`. A width of two planes is the high bits, then the low ones.

struct Scratch {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> stream;
  std::vector<int32_t> first;
  std::vector<float> scale, low, tile, partial;
};

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// Scales and minima of a tile: of channels (per_channel), [groups, dim], else of tokens, [groups, tile].
struct Grid {
  const float *scale, *low;
  int groups, across;
};

// Token-major words of codes, `HIGH` and `LOW` bits a plane, to float32 [tile, dim].
template <int HIGH, int LOW, bool TABLE>
void unpack_tokens(const FadeSide& side, const uint16_t* high, const uint16_t* low, const Grid& grid, float* out) {
  const int tile = side.tile, dim = side.dim, group = side.group;
  const int rows_high = tile * HIGH / 16, rows_low = LOW ? tile * LOW / 16 : 1;
  for (int t = 0; t < tile; t++) {
    const uint16_t* a = high + static_cast<int64_t>(t % rows_high) * dim;
    const uint16_t* b = low + static_cast<int64_t>(t % rows_low) * dim;
    const int shift_a = HIGH * (t / rows_high), shift_b = LOW * (t / rows_low);
    float* to = out + static_cast<int64_t>(t) * dim;
    auto code = [&](int i) {
      int32_t c = (a[i] >> shift_a) & ((1 << HIGH) - 1);
      if (LOW) c = (c << LOW) | ((b[i] >> shift_b) & ((1 << LOW) - 1));
      return TABLE ? side.levels[c] : static_cast<float>(c);
    };
    if (side.per_channel) {
      const float *scale = grid.scale + t / group * dim, *least = grid.low + t / group * dim;
      for (int i = 0; i < dim; i++) to[i] = code(i) * scale[i] + least[i];
    } else {
      for (int g = 0; g < grid.groups; g++) {
        const float scale = grid.scale[g * tile + t], least = grid.low[g * tile + t];
        for (int i = g * group; i < (g + 1) * group; i++) to[i] = code(i) * scale + least;
      }
    }
  }
}

// Channel-major words of codes of one plane, scales a token, to float32 [dim, tile]; ROWS words a channel, 0: any.
template <int WIDTH, int ROWS, bool TABLE>
void unpack_channels(const FadeSide& side, const uint16_t* words, const Grid& grid, float* out) {
  const int tile = side.tile, rows = ROWS ? ROWS : tile * WIDTH / 16;
  for (int d = 0; d < side.dim; d++) {
    const uint16_t* from = words + static_cast<int64_t>(d) * rows;
    const float *scale = grid.scale + static_cast<int64_t>(d / side.group) * tile;
    const float *least = grid.low + static_cast<int64_t>(d / side.group) * tile;
    float* to = out + static_cast<int64_t>(d) * tile;
    for (int j = 0; j < 16 / WIDTH; j++) {
      for (int i = 0; i < rows; i++) {
        const int32_t code = (from[i] >> (WIDTH * j)) & ((1 << WIDTH) - 1);
        to[j * rows + i] = (TABLE ? side.levels[code] : static_cast<float>(code)) * scale[j * rows + i] + least[j * rows + i];
      }
    }
  }
}

template <int WIDTH>
void unpack_channels(const FadeSide& side, const uint16_t* words, const Grid& grid, float* out) {
  if (side.levels) return unpack_channels<WIDTH, 0, true>(side, words, grid, out);
  switch (side.tile * WIDTH / 16) {
    case 8: return unpack_channels<WIDTH, 8, false>(side, words, grid, out);
    case 16: return unpack_channels<WIDTH, 16, false>(side, words, grid, out);
    case 32: return unpack_channels<WIDTH, 32, false>(side, words, grid, out);
    default: return unpack_channels<WIDTH, 0, false>(side, words, grid, out);
  }
}

template <int HIGH, int LOW>
void unpack_tokens(const FadeSide& side, const uint16_t* high, const uint16_t* low, const Grid& grid, float* out) {
  if (side.levels) return unpack_tokens<HIGH, LOW, true>(side, high, low, grid, out);
  return unpack_tokens<HIGH, LOW, false>(side, high, low, grid, out);
}

// Any codes, byte by byte first: channel-major planes of two widths, or with scales of channels.
void unpack_any(const FadeSide& side, const uint16_t* const* words, const Grid& grid, std::vector<uint8_t>& codes, float* out) {
  const int tile = side.tile, dim = side.dim, group = side.group;
  const bool by_token = side.by_token;
  codes.assign(static_cast<size_t>(tile) * dim, 0);
  for (int p = 0; p < side.planes; p++) {
    const int width = side.widths[p], fields = 16 / width, rows = tile / fields, mask = (1 << width) - 1;
    const int outer = by_token ? rows : dim, inner = by_token ? dim : rows;
    for (int o = 0; o < outer; o++) {
      const uint16_t* from = words[p] + static_cast<int64_t>(o) * inner;
      for (int j = 0; j < fields; j++) {
        uint8_t* to = codes.data() + (by_token ? static_cast<int64_t>(j * rows + o) * dim : static_cast<int64_t>(o) * tile + j * rows);
        for (int i = 0; i < inner; i++) to[i] = static_cast<uint8_t>((to[i] << width) | ((from[i] >> (width * j)) & mask));
      }
    }
  }
  const int outer = by_token ? tile : dim, inner = by_token ? dim : tile;
  for (int o = 0; o < outer; o++) {
    for (int i = 0; i < inner; i++) {
      const int t = by_token ? o : i, d = by_token ? i : o;
      const int64_t at = side.per_channel ? static_cast<int64_t>(t / group) * dim + d : static_cast<int64_t>(d / group) * tile + t;
      const int64_t place = static_cast<int64_t>(o) * inner + i;
      const uint8_t code = codes[place];
      out[place] = (side.levels ? side.levels[code] : static_cast<float>(code)) * grid.scale[at] + grid.low[at];
    }
  }
}

// The tile `id` of one side in `out`, float32 [tile, dim] (by_token) or [dim, tile].
void unpack(const FadeSide& side, int64_t id, Scratch& s, float* out) {
  const uint16_t* words[2] = {};
  for (int p = 0; p < side.planes; p++) words[p] = side.codes[p] + id * (side.tile * side.widths[p] / 16 * side.dim);
  Grid grid;
  grid.groups = (side.per_channel ? side.tile : side.dim) / side.group;
  grid.across = side.per_channel ? side.dim : side.tile;
  const int count = grid.groups * grid.across;
  s.scale.resize(count);
  s.low.resize(count);
  float *scale = s.scale.data(), *low = s.low.data();
  const uint32_t* meta = side.meta + id * count;
  for (int i = 0; i < count; i++) {
    scale[i] = half(meta[i] & 0xffffu);
    low[i] = half(meta[i] >> 16);
  }
  grid.scale = scale;
  grid.low = low;
  const int kind = side.widths[0] * 10 + (side.planes > 1 ? side.widths[1] : 0);
  if (side.by_token) {
    switch (kind) {
      case 10: return unpack_tokens<1, 0>(side, words[0], words[0], grid, out);
      case 20: return unpack_tokens<2, 0>(side, words[0], words[0], grid, out);
      case 21: return unpack_tokens<2, 1>(side, words[0], words[1], grid, out);
      case 40: return unpack_tokens<4, 0>(side, words[0], words[0], grid, out);
      case 80: return unpack_tokens<8, 0>(side, words[0], words[0], grid, out);
      default: break;
    }
  } else if (!side.per_channel) {
    switch (kind) {
      case 20: return unpack_channels<2>(side, words[0], grid, out);
      case 40: return unpack_channels<4>(side, words[0], grid, out);
      case 80: return unpack_channels<8>(side, words[0], grid, out);
      default: break;
    }
  }
  unpack_any(side, words, grid, s.codes, out);
}

// Codes of many widths: the stream of a tile is put together from all heads' rows, then the head's own blocks are read.
// `ids` are those of head 0 of the row and tile, `step` numbers apart. Columns from `kept` to `dim` are zeros.
void unpack_runs(const FadeSide& side, const FadeRuns& runs, const int32_t* ids, int64_t step, int64_t heads, int64_t head,
                 Scratch& s, float* out) {
  const int tile = side.tile, dim = side.dim, kept = runs.kept;
  const bool by_token = side.by_token;
  s.stream.resize(static_cast<size_t>(heads) * runs.row);
  for (int64_t h = 0; h < heads; h++) {
    if (!runs.row) break;
    std::memcpy(s.stream.data() + h * runs.row, runs.codes + static_cast<int64_t>(ids[h * step]) * runs.row, sizeof(uint16_t) * runs.row);
  }
  s.codes.assign(static_cast<size_t>(tile) * kept, 0);
  for (int b = 0; b < runs.count; b++) {
    const int32_t* block = runs.blocks + (head * runs.count + b) * 6;
    const int columns = block[1], first = block[2], own = block[3], channel = block[4], bits = block[5];
    if (!own) continue;
    const int fields = 16 / bits, rows = tile / fields, mask = (1 << bits) - 1;
    const uint16_t* words = s.stream.data() + block[0];
    for (int j = 0; j < fields; j++) {
      const int shift = bits * j;
      if (by_token) {
        for (int r = 0; r < rows; r++) {
          const uint16_t* from = words + static_cast<int64_t>(r) * columns + first;
          uint8_t* to = s.codes.data() + static_cast<int64_t>(j * rows + r) * kept + channel;
          for (int i = 0; i < own; i++) to[i] = static_cast<uint8_t>((to[i] << bits) | ((from[i] >> shift) & mask));
        }
      } else {
        for (int i = 0; i < own; i++) {
          const uint16_t* from = words + static_cast<int64_t>(first + i) * rows;
          uint8_t* to = s.codes.data() + static_cast<int64_t>(channel + i) * tile + j * rows;
          for (int r = 0; r < rows; r++) to[r] = static_cast<uint8_t>((to[r] << bits) | ((from[r] >> shift) & mask));
        }
      }
    }
  }
  s.scale.resize(tile);
  const uint8_t* gain = runs.gain + static_cast<int64_t>(ids[head * step]) * (tile / 2);
  const float* gains = runs.gains + head * 16;
  for (int t = 0; t < tile / 2; t++) {
    s.scale[t] = gains[gain[t] & 15];
    s.scale[t + tile / 2] = gains[gain[t] >> 4];
  }
  const int32_t* widths = runs.widths + head * kept;
  s.first.resize(kept);
  for (int c = 0; c < kept; c++) s.first[c] = 1 << widths[c];  // no bits: the level before all others, which is 0
  if (by_token) {
    for (int t = 0; t < tile; t++) {
      const uint8_t* from = s.codes.data() + static_cast<int64_t>(t) * kept;
      float* to = out + static_cast<int64_t>(t) * dim;
      const float scale = s.scale[t];
      const int32_t* start = s.first.data();
      for (int c = 0; c < kept; c++) to[c] = runs.levels[start[c] + from[c]] * scale;
      for (int c = kept; c < dim; c++) to[c] = 0.0f;
    }
  } else {
    for (int c = 0; c < kept; c++) {
      const uint8_t* from = s.codes.data() + static_cast<int64_t>(c) * tile;
      const float *levels = runs.levels + s.first[c], *scale = s.scale.data();
      float* to = out + static_cast<int64_t>(c) * tile;
      for (int t = 0; t < tile; t++) to[t] = levels[from[t]] * scale[t];
    }
    std::memset(out + static_cast<int64_t>(kept) * tile, 0, sizeof(float) * (dim - kept) * tile);
  }
}

// Full-precision tokens `first` to `first + count` as float32 [count, dim]: where they lie, or, if they lie otherwise, in `s`.
const float* widened(const FadeFull& full, int64_t row, int64_t head, int64_t first, int64_t count, int dim, Scratch& s) {
  const int64_t start = row * full.stride_row + head * full.stride_head + first * full.stride_token;
  if (full.dtype == 0 && full.stride_token == dim) return static_cast<const float*>(full.data) + start;
  s.tile.resize(static_cast<size_t>(count) * dim);
  for (int64_t t = 0; t < count; t++) {
    const int64_t at = start + t * full.stride_token;
    float* to = s.tile.data() + t * dim;
    if (full.dtype == 0) {
      std::memcpy(to, static_cast<const float*>(full.data) + at, sizeof(float) * dim);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(full.data) + at;
      if (full.dtype == 1) {
        for (int i = 0; i < dim; i++) to[i] = brain(from[i]);
      } else {
        for (int i = 0; i < dim; i++) to[i] = half(from[i]);
      }
    }
  }
  return s.tile.data();
}

// --- products -----------------------------------------------------------------------------------------------------------

// out[n][t] = query[n] . tokens[t]; query [NP, dim], NP a multiple of 4 (or 1), tokens [count, dim].
void products(const float* query, int padded, const float* tokens, int64_t count, int dim, float* out, int64_t stride) {
  if (padded == 1) {
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
      Lanes sums[LANES] = {};
      for (int d = 0; d < dim; d += LANES) {
        const Lanes q = load(query + d);
        for (int i = 0; i < LANES; i++) sums[i] += q * load(tokens + (t + i) * dim + d);
      }
      store(out + t, totals(sums));
    }
    for (; t < count; t++) {
      Lanes sum = {};
      for (int d = 0; d < dim; d += LANES) sum += load(query + d) * load(tokens + t * dim + d);
      out[t] = total(sum);
    }
    return;
  }
  for (int n = 0; n < padded; n += 4) {
    const float* q = query + static_cast<int64_t>(n) * dim;
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      Lanes sums[8] = {};
      for (int d = 0; d < dim; d += LANES) {
        const Lanes first = load(tokens + t * dim + d), second = load(tokens + (t + 1) * dim + d);
        for (int i = 0; i < 4; i++) {
          const Lanes part = load(q + i * dim + d);
          sums[2 * i] += part * first;
          sums[2 * i + 1] += part * second;
        }
      }
      const Lanes found = totals(sums);
      for (int i = 0; i < 4; i++) {
        out[(n + i) * stride + t] = found[2 * i];
        out[(n + i) * stride + t + 1] = found[2 * i + 1];
      }
    }
    for (; t < count; t++) {
      for (int i = 0; i < 4; i++) {
        Lanes sum = {};
        for (int d = 0; d < dim; d += LANES) sum += load(q + i * dim + d) * load(tokens + t * dim + d);
        out[(n + i) * stride + t] = total(sum);
      }
    }
  }
}

// The same with tokens [dim, count].
void products_across(const float* query, int padded, const float* tokens, int count, int dim, float* out, int64_t stride) {
  for (int n = 0; n < padded; n++) {
    float* to = out + n * stride;
    for (int t = 0; t < count; t++) to[t] = 0.0f;
    for (int d = 0; d < dim; d++) {
      const float q = query[static_cast<int64_t>(n) * dim + d];
      const float* from = tokens + static_cast<int64_t>(d) * count;
      for (int t = 0; t < count; t++) to[t] += q * from[t];
    }
  }
}

// sums[n][d] += weights[n][t] * tokens[t][d]; tokens [count, dim]; BLOCK queries at once.
template <int BLOCK>
void combine(const float* weights, int64_t stride, int padded, const float* tokens, int64_t count, int dim, float* sums) {
  for (int n = 0; n < padded; n += BLOCK) {
    const float* w = weights + n * stride;
    float* to = sums + static_cast<int64_t>(n) * dim;
    int d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
      Lanes held[2 * BLOCK] = {};
      for (int64_t t = 0; t < count; t++) {
        const Lanes first = load(tokens + t * dim + d), second = load(tokens + t * dim + d + LANES);
        for (int i = 0; i < BLOCK; i++) {
          const Lanes share = all(w[i * stride + t]);
          held[2 * i] += share * first;
          held[2 * i + 1] += share * second;
        }
      }
      for (int i = 0; i < BLOCK; i++) {
        store(to + i * dim + d, load(to + i * dim + d) + held[2 * i]);
        store(to + i * dim + d + LANES, load(to + i * dim + d + LANES) + held[2 * i + 1]);
      }
    }
    for (; d < dim; d += LANES) {
      for (int i = 0; i < BLOCK; i++) {
        Lanes held = {};
        for (int64_t t = 0; t < count; t++) held += all(w[i * stride + t]) * load(tokens + t * dim + d);
        store(to + i * dim + d, load(to + i * dim + d) + held);
      }
    }
  }
}

// lanes[n][d] (a vector each) += weights[n][t] * tokens[d][t]; tokens [dim, tile].
template <int BLOCK>
void combine_across(const float* weights, int64_t stride, int padded, const float* tokens, int tile, int dim, float* lanes) {
  for (int n = 0; n < padded; n += BLOCK) {
    const float* w = weights + n * stride;
    for (int d = 0; d < dim; d++) {
      const float* from = tokens + static_cast<int64_t>(d) * tile;
      Lanes held[BLOCK] = {};
      for (int t = 0; t < tile; t += LANES) {
        const Lanes x = load(from + t);
        for (int i = 0; i < BLOCK; i++) held[i] += load(w + i * stride + t) * x;
      }
      for (int i = 0; i < BLOCK; i++) {
        float* to = lanes + (static_cast<int64_t>(n + i) * dim + d) * LANES;
        store(to, load(to) + held[i]);
      }
    }
  }
}

// --- one head of one row ------------------------------------------------------------------------------------------------

struct Part {
  const FadeSegment* segment;
  int64_t start;  // of its logits among those of all segments
};

// Slots of a tile that hold a token.
int live(const FadeSegment& s, int64_t row, int64_t head, int64_t number, int64_t heads) {
  const int64_t at = row * heads + head;
  if (number >= s.used[at]) return 0;
  return s.counts ? s.counts[at * s.table_width + number] : s.keys.tile;
}

void unpack(const FadeCall& call, const FadeSegment& s, const FadeSide& side, const FadeRuns& runs, int64_t row, int64_t head,
            int64_t number, Scratch& own, float* out) {
  const int32_t* ids = s.table + row * call.heads * s.table_width + number;
  if (runs.kept) {  // not by its codes: a layer without bits has none, and no address
    unpack_runs(side, runs, ids, s.table_width, call.heads, head, own, out);
  } else {
    unpack(side, ids[head * s.table_width], own, out);
  }
}

void write_logits(const FadeCall& call, const FadeSegment& s, int64_t row, int64_t head, int64_t from, int64_t to, float* out,
                  int64_t stride) {
  const int64_t pair = row * call.heads + head;
  const float* query = s.query + pair * call.padded * s.key_dim;
  Scratch& own = scratch();
  if (s.packed) {
    const int tile = s.keys.tile;
    own.tile.resize(static_cast<size_t>(tile) * s.key_dim);
    for (int64_t t = from; t < to; t += tile) {
      const int held = live(s, row, head, t / tile, call.heads);
      if (held) {
        unpack(call, s, s.keys, s.key_runs, row, head, t / tile, own, own.tile.data());
        if (s.keys.by_token) {
          products(query, call.padded, own.tile.data(), held, s.key_dim, out + t, stride);
        } else {
          products_across(query, call.padded, own.tile.data(), tile, s.key_dim, out + t, stride);
        }
      }
      for (int n = 0; n < call.padded; n++) {
        for (int i = held; i < tile; i++) out[n * stride + t + i] = NONE;
      }
    }
  } else {
    const int64_t held = s.lengths ? std::min<int64_t>(to, s.lengths[pair]) : to;
    if (held > from) {
      const float* tokens = widened(s.full_keys, row, head, from, held - from, s.key_dim, own);
      products(query, call.padded, tokens, held - from, s.key_dim, out + from, stride);
    }
    for (int n = 0; n < call.padded; n++) {
      for (int64_t t = std::max(held, from); t < to; t++) out[n * stride + t] = NONE;
    }
  }
  for (int n = 0; n < call.count; n++) {
    float* logits = out + n * stride;
    const int64_t q = n % call.queries;
    if (s.bias) {
      const float bias = s.bias[pair * call.count + n];
      for (int64_t t = from; t < to; t++) logits[t] += bias;
    }
    if (call.softcap > 0.0f) {
      for (int64_t t = from; t < to; t++) {
        if (logits[t] != NONE) logits[t] = call.softcap * std::tanh(logits[t] / call.softcap);
      }
    }
    if (s.mask) {
      const uint8_t* seen = s.mask + row * s.mask_row + head * s.mask_head + q * s.mask_query;
      for (int64_t t = from; t < to; t++) {
        if (!seen[t * s.mask_slot]) logits[t] = NONE;
      }
    } else if (s.causal) {
      const int64_t length = s.lengths ? s.lengths[pair] : s.slots;
      for (int64_t t = std::max(from, length - call.queries + q + 1); t < to; t++) logits[t] = NONE;
    }
  }
}

// Adds what slots `from` to `to` give: `sums` [NP, dim] of tokens in rows, `lanes` [NP, dim, LANES] of those in columns.
void add_values(const FadeCall& call, const FadeSegment& s, int64_t row, int64_t head, int64_t from, int64_t to,
                const float* weights, int64_t stride, float* sums, float* lanes) {
  const int64_t pair = row * call.heads + head;
  Scratch& own = scratch();
  if (s.packed) {
    const int tile = s.values.tile, dim = s.value_dim;
    own.tile.resize(static_cast<size_t>(tile) * dim);
    for (int64_t t = from; t < to; t += tile) {
      const int held = live(s, row, head, t / tile, call.heads);
      if (!held) continue;
      unpack(call, s, s.values, s.value_runs, row, head, t / tile, own, own.tile.data());
      if (s.values.by_token) {
        (call.padded == 1 ? combine<1> : combine<4>)(weights + t, stride, call.padded, own.tile.data(), held, dim, sums);
      } else {
        for (int d = 0; held < tile && d < dim; d++) {  // what nobody wrote may be NaN
          for (int i = held; i < tile; i++) own.tile[static_cast<size_t>(d) * tile + i] = 0.0f;
        }
        (call.padded == 1 ? combine_across<1> : combine_across<4>)(weights + t, stride, call.padded, own.tile.data(), tile, dim, lanes);
      }
    }
    return;
  }
  const int64_t held = s.lengths ? std::min<int64_t>(to, s.lengths[pair]) : to;
  if (held <= from) return;
  const float* tokens = widened(s.full_values, row, head, from, held - from, s.value_dim, own);
  (call.padded == 1 ? combine<1> : combine<4>)(weights + from, stride, call.padded, tokens, held - from, s.value_dim, sums);
}

}  // namespace

extern "C" int fade_decode_attention(const FadeCall* given) {
  const FadeCall& call = *given;
  const int64_t pairs = call.rows * call.heads;
  std::vector<Part> parts;
  struct Chunk {
    int part;
    int64_t from, to;
  };
  std::vector<Chunk> chunks;
  int64_t slots = 0;
  for (int i = 0; i < call.segments; i++) {
    const FadeSegment& s = call.segment[i];
    const int64_t step = s.packed ? std::max<int64_t>(1, CHUNK / s.keys.tile) * s.keys.tile : CHUNK;
    parts.push_back({&s, slots});
    for (int64_t from = 0; from < s.slots; from += step) chunks.push_back({i, from, std::min(from + step, s.slots)});
    slots += s.slots;
  }
  const int64_t pieces = static_cast<int64_t>(chunks.size()), stride = slots, jobs = pairs * pieces;
  std::vector<float> logits(static_cast<size_t>(pairs) * call.padded * stride);
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) if (call.threads > 1)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t pair = job / pieces;
    const Chunk& chunk = chunks[job % pieces];
    const Part& part = parts[chunk.part];
    float* out = logits.data() + pair * call.padded * stride + part.start;
    write_logits(call, *part.segment, pair / call.heads, pair % call.heads, chunk.from, chunk.to, out, stride);
  }
  const int64_t lines = pairs * call.count;
#pragma omp parallel for num_threads(call.threads) if (call.threads > 1)
  for (int64_t line = 0; line < lines; line++) {
    const int64_t pair = line / call.count, n = line % call.count;
    float* held = logits.data() + (pair * call.padded + n) * stride;
    float top = call.sinks ? call.sinks[pair % call.heads * (call.count / call.queries) + n / call.queries] : NONE;
    const float sink = top;
    for (int64_t t = 0; t < slots; t++) top = held[t] > top ? held[t] : top;
    double mass = 0.0;
    if (top != NONE) {
      for (int64_t from = 0; from < slots; from += CHUNK) {
        const int64_t to = std::min(from + CHUNK, slots);
        for (int64_t t = from; t < to; t++) held[t] = power(held[t] - top);
        Lanes sum = {};
        int64_t t = from;
        for (; t + LANES <= to; t += LANES) sum += load(held + t);
        mass += total(sum);
        for (; t < to; t++) mass += held[t];
      }
      if (call.sinks) mass += std::exp(static_cast<double>(sink) - top);
      const float share = static_cast<float>(1.0 / mass);
      for (int64_t t = 0; t < slots; t++) held[t] *= share;
      call.lse[line] = top + static_cast<float>(std::log(mass));
    } else {
      for (int64_t t = 0; t < slots; t++) held[t] = 0.0f;
      call.lse[line] = NONE;
    }
  }
#pragma omp parallel for num_threads(call.threads) if (call.threads > 1)
  for (int64_t pair = 0; pair < pairs; pair++) {  // queries that are not there have no weights
    for (int64_t n = call.count; n < call.padded; n++) {
      std::memset(logits.data() + (pair * call.padded + n) * stride, 0, sizeof(float) * stride);
    }
  }
  int widest = 0;
  for (const Part& part : parts) widest = std::max(widest, part.segment->value_dim);
  const int64_t width = static_cast<int64_t>(call.padded) * widest;
  std::vector<float> sums(static_cast<size_t>(jobs) * width);
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) if (call.threads > 1)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t pair = job / pieces;
    const Chunk& chunk = chunks[job % pieces];
    const Part& part = parts[chunk.part];
    const FadeSegment& s = *part.segment;
    float* out = sums.data() + job * width;
    std::vector<float>& lanes = scratch().partial;
    lanes.assign(static_cast<size_t>(width) * LANES, 0.0f);
    add_values(call, s, pair / call.heads, pair % call.heads, chunk.from, chunk.to,
               logits.data() + pair * call.padded * stride + part.start, stride, out, lanes.data());
    if (s.packed && !s.values.by_token) {
      for (int64_t i = 0; i < static_cast<int64_t>(call.padded) * s.value_dim; i++) out[i] += total(load(&lanes[i * LANES]));
    }
  }
  for (int64_t job = 0; job < jobs; job++) {  // in order: the same bits for any number of threads
    const int64_t pair = job / pieces;
    const FadeSegment& s = *parts[chunks[job % pieces].part].segment;
    const int64_t size = static_cast<int64_t>(call.count) * s.value_dim;
    for (int64_t i = 0; i < size; i++) s.output[pair * size + i] += sums[job * width + i];
  }
  for (const Part& part : parts) {
    const FadeSegment& s = *part.segment;
    for (int64_t pair = 0; pair < pairs; pair++) {
      const float* held = logits.data() + pair * call.padded * stride + part.start;
      if (s.mass) {
        for (int64_t n = 0; n < call.count; n++) {
          double sum = 0.0;
          for (int64_t t = 0; t < s.slots; t++) sum += held[n * stride + t];
          s.mass[pair * call.count + n] = static_cast<float>(sum);
        }
      }
      if (s.probabilities) {
        const int64_t group = call.count / call.queries;
        for (int64_t q = 0; q < call.queries; q++) {
          float* to = s.probabilities + (pair * call.queries + q) * s.slots;
          for (int64_t t = 0; t < s.slots; t++) to[t] = 0.0f;
          for (int64_t g = 0; g < group; g++) {
            const float* from = held + (g * call.queries + q) * stride;
            for (int64_t t = 0; t < s.slots; t++) to[t] += from[t];
          }
          const float each = 1.0f / static_cast<float>(group);
          for (int64_t t = 0; t < s.slots; t++) to[t] *= each;
        }
      }
    }
  }
  return 0;
}

extern "C" int64_t fade_sizes(int which) {
  const int64_t sizes[] = {sizeof(FadeSide), sizeof(FadeRuns), sizeof(FadeFull), sizeof(FadeSegment), sizeof(FadeCall)};
  return which >= 0 && which < 5 ? sizes[which] : -1;
}
