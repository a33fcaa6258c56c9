// Tiles of matrix products; see gemm.cpp for the layouts.
#pragma once
#include "vec.h"

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FP8 = 2, INT8 = 3 };

constexpr int PANEL = 32;       // columns of a float panel
constexpr int INT8_PANEL = 64;  // columns of an INT8 panel
constexpr int INT8_ROWS = LANES == 16 ? 6 : 1;

// A packed (F, K) weight.
struct Weight {
  int kind;
  int num_columns;  // F
  int width;        // K
  int block;        // side of an FP8 block
  const uint8_t* values;
  const float* scales;    // FP8: (panels, ceil(K/block)); INT8: (F padded)
  const int32_t* offset;  // INT8: 128 * sum of a column, (F padded)

  int panel_columns() const { return kind == INT8 ? INT8_PANEL : PANEL; }
  int num_panels() const { return (num_columns + panel_columns() - 1) / panel_columns(); }
  size_t panel_bytes() const {
    const size_t padded = kind == INT8 ? (width + 3) / 4 * 4 : width;
    return padded * panel_columns() * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
  }
  // The h-th of several floats' weights behind each other.
  Weight of_head(int h) const {
    Weight mine = *this;
    mine.values += (size_t)h * num_panels() * panel_bytes();
    if (kind == FP8) mine.scales += (size_t)h * num_panels() * ((width + block - 1) / block);
    return mine;
  }
};

// Rows of activations: as floats, or as two bytes a value (split_row).
struct Rows {
  const float* const* values;      // a pointer a row
  const uint8_t* const* quantised; // a pointer a row, INT8 only: high bytes, then low ones
  const float* scales;             // one a row, INT8 only
};

// y[m][0:columns of the panel) = x[m] . panel, for m < num_rows <= rows_of_tile(kind).
void multiply_tile(const Weight& w, int panel, const Rows& x, int num_rows, float* y, int y_stride);
int rows_of_tile(int kind);
// (K,) floats to bytes around 128 and the factor that brings them back.
void quantise_row(const float* x, int width, uint8_t* q, float* scale);
// (K,) floats to whole numbers 128 * high + low: high bytes, padded to whole quads, then low ones, each around 128.
void split_row(const float* x, int width, uint8_t* q, float* scale);
// y (R, F) = x (R, K) W^T for each of `num_heads` weights behind each other; head h takes x + h * x_head and
// writes y + h * y_head. Strides count floats.
extern "C" void moray_gemm(const Weight* w, int num_heads, const float* x, int num_rows, int64_t x_stride, int64_t x_head,
                           float* y, int64_t y_stride, int64_t y_head, int num_threads);
// y (R, D) = down(silu(gate x) * up x); gate_up (2F, D) holds gate's panels, then up's.
extern "C" void moray_mlp(const Weight* gate_up, const Weight* down, const float* x, int64_t x_stride, int num_rows, float* y,
                          int num_threads);
inline int padded_width(int width) { return (width + 3) / 4 * 4; }
