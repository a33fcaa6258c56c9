// Small products in which either side may be anything that can be indexed, accumulated in registers. A row of the
// result is summed in ascending k whatever rows stand beside it.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int ROWS = LANES == 16 ? 6 : (LANES == 8 ? 2 : 1);
constexpr int COLUMN_VECS = 4;

struct Strided {  // row k of B
  const float* at;
  size_t stride;
  const float* operator[](int k) const { return at + k * stride; }
};

struct Gathered {
  const float* const* rows;
  int offset;
  const float* operator[](int k) const { return rows[k] + offset; }
};

// c[m][0:V*LANES) = c * keep[m] + sum over k of a(m, k) * b[k]
template <int M, int V, class A, class B>
inline void multiply_add(const A& a, const B& b, int num_k, float* c, size_t c_stride, const float* keep) {
  VecF sum[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) sum[m][v] = keep ? load(c + m * c_stride + v * LANES) * keep[m] : VecF{};
  for (int k = 0; k < num_k; k++) {
    const float* row = b[k];
    VecF w[V];
    for (int v = 0; v < V; v++) w[v] = load(row + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const float value = a(m, k);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[m][v] += w[v] * value;
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(c + m * c_stride + v * LANES, sum[m][v]);
}

template <int M, class A, class B>
inline void all_columns(const A& a, const B& b_at, int num_k, int num_vecs, float* c, size_t c_stride, const float* keep) {
  int v = 0;
  for (; v + COLUMN_VECS <= num_vecs; v += COLUMN_VECS)
    multiply_add<M, COLUMN_VECS>(a, b_at(v * LANES), num_k, c + v * LANES, c_stride, keep);
  for (; v < num_vecs; v++) multiply_add<M, 1>(a, b_at(v * LANES), num_k, c + v * LANES, c_stride, keep);
}

template <int M, class A, class B>
inline void some_rows(int num_rows, const A& a, const B& b_at, int num_k, int num_vecs, float* c, size_t c_stride, const float* keep) {
  if (num_rows == M) return all_columns<M>(a, b_at, num_k, num_vecs, c, c_stride, keep);
  if constexpr (M > 1) some_rows<M - 1>(num_rows, a, b_at, num_k, num_vecs, c, c_stride, keep);
}

// Any number of rows: a(first row)(m, k), in tiles of at most M.
template <int M, class A, class B>
inline void multiply(int num_rows, const A& a_from, const B& b_at, int num_k, int num_vecs, float* c, size_t c_stride, const float* keep) {
  for (int r = 0; r < num_rows; r += M)
    some_rows<M>(std::min(M, num_rows - r), a_from(r), b_at, num_k, num_vecs, c + r * c_stride, c_stride, keep ? keep + r : nullptr);
}

static inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
