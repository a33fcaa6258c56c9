// Matrix products whose rows do not know of each other: y[r] = W x[r].
//
// A weight (F, K) is packed in panels of columns of y, so that a thread streams memory in order:
//   FLOAT32   [F/32][K][32] float
//   BFLOAT16  [F/32][K][16] uint32: low half = column j, high half = column 16 + j
//   FP8       [F/32][K][32] E4M3 bytes, and for each panel a float a block of K: [F/32][ceil(K/block)]
//   INT8      [F/64][K/4][64][4] bytes, a float for each column, and 128 times each column's sum: activations
//             travel as two bytes, x/scale = 128 * high + low, each + 128, because the VNNI instruction takes unsigned
//             ones. One byte would be twice as fast where arithmetic is the limit, and four times as wrong.
// F is padded with zeros to whole panels, K to a multiple of 4 for INT8.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int VECS = PANEL / LANES;
constexpr int INT8_VECS = INT8_PANEL / LANES;
constexpr int PREFETCH = 2048;  // bytes of weights that are asked for ahead of their use
constexpr int ROW_BLOCK = 192;  // rows whose activations stay in the second-level cache

struct PanelF32 {
  static inline void row(const uint8_t* p, int k, VecF* w) {
    const float* at = (const float*)p + (size_t)k * PANEL;
    for (int v = 0; v < VECS; v++) w[v] = load(at + v * LANES);
  }
  static constexpr int bytes = 4;
};

struct PanelBf16 {
  static inline void row(const uint8_t* p, int k, VecF* w) {
    const VecI* at = (const VecI*)(p + (size_t)k * PANEL * 2);
    for (int v = 0; v < VECS / 2; v++) {
      w[v] = (VecF)(at[v] << 16);
      w[v + VECS / 2] = (VecF)(at[v] & splat_int((int32_t)0xffff0000));
    }
  }
  static constexpr int bytes = 2;
};

// The value divided by 256 where F16C is there: E4M3's fields are those of a half whose bias differs by 8.
struct PanelFp8 {
#if defined(__AVX512F__)
  static constexpr float factor = 256.f;
  static inline void row(const uint8_t* p, int k, VecF* w) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(p + (size_t)k * PANEL));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), _mm512_set1_epi16((short)0xbfff));
    w[0] = (VecF)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
    w[1] = (VecF)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  }
#elif defined(__AVX2__)
  static constexpr float factor = 256.f;
  static inline void row(const uint8_t* p, int k, VecF* w) {
    for (int v = 0; v < VECS; v++) {
      const __m128i bytes = _mm_loadl_epi64((const __m128i*)(p + (size_t)k * PANEL + v * LANES));
      const __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16((short)0xbfff));
      w[v] = (VecF)_mm256_cvtph_ps(half);
    }
  }
#else
  static constexpr float factor = 1.f;
  static inline float one(uint8_t b) {
    const int exponent = (b >> 3) & 15, mantissa = b & 7;
    const float size = exponent ? std::ldexp(1.f + mantissa / 8.f, exponent - 7) : std::ldexp((float)mantissa, -9);
    return b & 128 ? -size : size;
  }
  static inline void row(const uint8_t* p, int k, VecF* w) {
    for (int v = 0; v < VECS; v++)
      for (int i = 0; i < LANES; i++) w[v][i] = one(p[(size_t)k * PANEL + v * LANES + i]);
  }
#endif
  static constexpr int bytes = 1;
};

template <class Panel, int M>
inline void accumulate(const float* const* x, const uint8_t* panel, int begin, int end, VecF (&sum)[M][VECS]) {
  for (int k = begin; k < end; k++) {
    VecF w[VECS];
    __builtin_prefetch(panel + (size_t)k * PANEL * Panel::bytes + 2048);
    Panel::row(panel, k, w);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const float value = x[m][k];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; v++) sum[m][v] += w[v] * value;
    }
  }
}

template <class Panel, int M>
void float_tile(const Weight& w, int panel, const Rows& x, float* y, int y_stride) {
  VecF sum[M][VECS] = {};
  accumulate<Panel, M>(x.values, w.values + panel * w.panel_bytes(), 0, w.width, sum);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECS; v++) store(y + (size_t)m * y_stride + v * LANES, sum[m][v]);
}

template <int M>
void fp8_tile(const Weight& w, int panel, const Rows& x, float* y, int y_stride) {
  const int blocks = (w.width + w.block - 1) / w.block;
  const float* scales = w.scales + (size_t)panel * blocks;
  const uint8_t* values = w.values + panel * w.panel_bytes();
  VecF total[M][VECS] = {};
  for (int b = 0; b < blocks; b++) {
    VecF sum[M][VECS] = {};
    accumulate<PanelFp8, M>(x.values, values, b * w.block, std::min(w.width, (b + 1) * w.block), sum);
    const VecF scale = splat(scales[b] * PanelFp8::factor);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VECS; v++) total[m][v] += sum[m][v] * scale;
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECS; v++) store(y + (size_t)m * y_stride + v * LANES, total[m][v]);
}

// Vectors [first, first + V) of a panel.
template <int M, int V>
void int8_part(const Weight& w, int panel, int first, const Rows& x, float* y, int y_stride) {
  VecI high[M][V] = {}, low[M][V] = {};
  const uint8_t* values = w.values + panel * w.panel_bytes() + first * LANES * 4;
  const int padded = padded_width(w.width);
  for (int k = 0; k < padded; k += 4) {
    const uint8_t* at = values + (size_t)k * INT8_PANEL;
    // The whole panel's: a second part finds its weights in the cache.
    for (int line = 0; line < INT8_PANEL * 4 && first == 0; line += 64) __builtin_prefetch(at + PREFETCH + line);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      uint32_t high_quad, low_quad;
      std::memcpy(&high_quad, x.quantised[m] + k, 4);
      std::memcpy(&low_quad, x.quantised[m] + padded + k, 4);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) high[m][v] = dot4(high[m][v], high_quad, at + v * LANES * 4);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) low[m][v] = dot4(low[m][v], low_quad, at + v * LANES * 4);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) {
      const int column = panel * INT8_PANEL + (first + v) * LANES;
      const VecI offset = *(const VecI*)(w.offset + column);
      const VecF exact = __builtin_convertvector(high[m][v] - offset, VecF) * 128.f + __builtin_convertvector(low[m][v] - offset, VecF);
      store(y + (size_t)m * y_stride + (first + v) * LANES, exact * x.scales[m] * load(w.scales + column));
    }
}

// More rows take half of a panel at a time, so that their sums stay in registers and each weight is read once.
template <int M>
void int8_tile(const Weight& w, int panel, const Rows& x, float* y, int y_stride) {
  constexpr int V = M > INT8_ROWS / 2 && INT8_ROWS > 1 ? INT8_VECS / 2 : INT8_VECS;
  for (int first = 0; first < INT8_VECS; first += V) int8_part<M, V>(w, panel, first, x, y, y_stride);
}

template <int M>
void tile_of(const Weight& w, int panel, const Rows& x, float* y, int y_stride) {
  switch (w.kind) {
    case FLOAT32: return float_tile<PanelF32, M>(w, panel, x, y, y_stride);
    case BFLOAT16: return float_tile<PanelBf16, M>(w, panel, x, y, y_stride);
    case FP8: return fp8_tile<M>(w, panel, x, y, y_stride);
    default:
      if constexpr (M <= INT8_ROWS) int8_tile<M>(w, panel, x, y, y_stride);
  }
}

template <int M>
void choose_tile(const Weight& w, int panel, const Rows& x, int num_rows, float* y, int y_stride) {
  if (num_rows == M) return tile_of<M>(w, panel, x, y, y_stride);
  if constexpr (M > 1) choose_tile<M - 1>(w, panel, x, num_rows, y, y_stride);
}

// Rows [begin, end) times panels [first, last), tile by tile.
void multiply_block(const Weight& w, const Rows& x, int begin, int end, int first, int last, float* y, int y_stride) {
  const int rows = rows_of_tile(w.kind), columns = w.panel_columns();
  alignas(64) float scratch[TILE_ROWS > INT8_ROWS ? TILE_ROWS * INT8_PANEL : INT8_ROWS * INT8_PANEL];
  for (int from = begin; from < end; from += ROW_BLOCK) {
    const int to = std::min(end, from + ROW_BLOCK);
    for (int p = first; p < last; p++)
      for (int r = from; r < to; r += rows) {
        const int m = std::min(rows, to - r), wide = std::min(columns, w.num_columns - p * columns);
        const Rows part{x.values ? x.values + r : nullptr, x.quantised ? x.quantised + r : nullptr, x.scales + r};
        float* out = y + (size_t)r * y_stride + p * columns;
        if (wide == columns) {
          multiply_tile(w, p, part, m, out, y_stride);
          continue;
        }
        multiply_tile(w, p, part, m, scratch, columns);
        for (int i = 0; i < m; i++) std::memcpy(out + (size_t)i * y_stride, scratch + i * columns, wide * 4);
      }
  }
}

}  // namespace

int rows_of_tile(int kind) { return kind == INT8 ? INT8_ROWS : TILE_ROWS; }

void multiply_tile(const Weight& w, int panel, const Rows& x, int num_rows, float* y, int y_stride) {
  choose_tile<TILE_ROWS>(w, panel, x, num_rows, y, y_stride);
}

namespace {

float largest_of(const float* x, int width) {
  VecF high = {};
  int k = 0;
  for (; k + LANES <= width; k += LANES) high = larger(high, larger(load(x + k), -load(x + k)));
  float largest = 0.f;
  for (int i = 0; i < LANES; i++) largest = std::max(largest, high[i]);
  for (; k < width; k++) largest = std::max(largest, std::fabs(x[k]));
  return largest;
}

// What brings the largest to 127; nothing where it would not be a number.
float inverse_of(float largest) { return largest > 1e-30f ? 127.f / largest : 0.f; }

}  // namespace

void quantise_row(const float* x, int width, uint8_t* q, float* scale) {
  const float largest = largest_of(x, width), inverse = inverse_of(largest);
  *scale = largest / 127.f;
  for (int k = 0; k < width; k++) q[k] = (uint8_t)((int)std::nearbyintf(x[k] * inverse) + 128);
  for (int k = width; k < padded_width(width); k++) q[k] = 128;
}

void split_row(const float* x, int width, uint8_t* q, float* scale) {
  const float largest = largest_of(x, width), inverse = inverse_of(largest);
  const int padded = padded_width(width);
  *scale = largest / 127.f / 128.f;
  for (int k = 0; k < width; k++) {
    const float whole = std::nearbyintf(x[k] * inverse * 128.f), high = std::nearbyintf(whole / 128.f);
    q[k] = (uint8_t)((int)high + 128);
    q[padded + k] = (uint8_t)((int)(whole - high * 128.f) + 128);
  }
  for (int k = width; k < padded; k++) q[k] = q[padded + k] = 128;
}

extern "C" void moray_gemm(const Weight* w, int num_heads, const float* x, int num_rows, int64_t x_stride, int64_t x_head,
                           float* y, int64_t y_stride, int64_t y_head, int num_threads) {
  const int row_bytes = 2 * padded_width(w->width), panels = w->num_panels();
  const bool is_int8 = w->kind == INT8;
  std::vector<uint8_t> bytes(is_int8 ? (size_t)num_rows * row_bytes : 0);
  std::vector<float> scales(num_rows);
  std::vector<const float*> rows((size_t)num_rows * num_heads);
  std::vector<const uint8_t*> quantised(is_int8 ? num_rows : 0);
  for (int h = 0; h < num_heads; h++)
    for (int r = 0; r < num_rows; r++) rows[(size_t)h * num_rows + r] = x + r * x_stride + h * x_head;
  for (int r = 0; r < num_rows && is_int8; r++) quantised[r] = bytes.data() + (size_t)r * row_bytes;
#pragma omp parallel num_threads(num_threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (is_int8) {
#pragma omp for schedule(static)
      for (int r = 0; r < num_rows; r++) split_row(rows[r], w->width, bytes.data() + (size_t)r * row_bytes, &scales[r]);
    }
    const bool by_rows = num_rows >= 8 * TILE_ROWS * threads;
    const int tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS, units = by_rows ? tiles : panels * num_heads;
    const int from = (int64_t)units * thread / threads, to = (int64_t)units * (thread + 1) / threads;
    for (int h = 0; h < num_heads; h++) {
      const Weight mine = w->of_head(h);
      const int first = by_rows ? 0 : std::clamp(from - h * panels, 0, panels);
      const int last = by_rows ? panels : std::clamp(to - h * panels, 0, panels);
      const int begin = by_rows ? from * TILE_ROWS : 0, end = by_rows ? std::min(num_rows, to * TILE_ROWS) : num_rows;
      if (first < last && begin < end) {
        const Rows all{rows.data() + (size_t)h * num_rows, is_int8 ? quantised.data() : nullptr, scales.data()};
        multiply_block(mine, all, begin, end, first, last, y + h * y_head, (int)y_stride);
      }
    }
  }
}
