// Routed experts over assigned rows, each a SwiGLU: sums of weighted outputs, in double.
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "gemm.h"

namespace {

// An expert's rows, [begin, end) of the assignments in order of their experts.
struct Group {
  const Weight* gate_up;  // (2F, D): gate's panels, then up's
  const Weight* down;     // (D, F)
  int begin, end;
};

struct Activations {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  int row_bytes;

  Activations(bool is_int8, int num_rows, int width)
      : scales(num_rows), row_bytes(2 * padded_width(width)) {
    if (is_int8) bytes.resize((size_t)num_rows * row_bytes);
  }
  void split(int row, const float* x, int width) { split_row(x, width, &bytes[(size_t)row * row_bytes], &scales[row]); }
};

// The rows of one tile, wherever they lie.
struct Tile {
  const float* values[TILE_ROWS];
  const uint8_t* quantised[TILE_ROWS];
  float scales[TILE_ROWS];

  void set(int m, const float* x, const Activations& q, int row) {
    values[m] = x;
    if (q.bytes.empty()) return;
    quantised[m] = &q.bytes[(size_t)row * q.row_bytes];
    scales[m] = q.scales[row];
  }
  Rows rows() const { return {values, quantised, scales}; }
};

// Rows of activations through SwiGLUs. Row a of the groups is row source(a) of x; take(a, column, values, count) gets
// its outputs, on the thread that computes them. begin(r) is called before, for each row of x.
template <class Source, class Begin, class Take>
void run(const std::vector<Group>& groups, const float* x, int64_t x_stride, int num_rows, const Source& source,
         const Begin& begin, const Take& take, int num_threads) {
  const Weight &first = *groups[0].gate_up, &second = *groups[0].down;
  const int hidden = first.width, width = second.width, num_all = groups.back().end;
  const int kind = first.kind, rows = rows_of_tile(kind), columns = first.panel_columns();
  const bool is_int8 = kind == INT8;
  const int up_panel = (width + columns - 1) / columns;  // gate and up are padded to panels each
  const size_t inner_stride = (size_t)up_panel * columns;
  const std::unique_ptr<float[]> inner(new float[num_all * inner_stride]);
  Activations outer_q(is_int8, num_rows, hidden), inner_q(is_int8, num_all, width);
#pragma omp parallel num_threads(num_threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    alignas(64) float gate[TILE_ROWS * INT8_PANEL], up[TILE_ROWS * INT8_PANEL];
    Tile tile;
#pragma omp for schedule(static)
    for (int r = 0; r < num_rows; r++) {
      begin(r);
      if (is_int8) outer_q.split(r, x + r * x_stride, hidden);
    }
    for (const Group& group : groups)
      for (int p = up_panel * thread / threads; p < up_panel * (thread + 1) / threads; p++)
        for (int a = group.begin; a < group.end; a += rows) {
          const int m = std::min(rows, group.end - a);
          for (int i = 0; i < m; i++) tile.set(i, x + source(a + i) * x_stride, outer_q, (int)source(a + i));
          multiply_tile(*group.gate_up, p, tile.rows(), m, gate, columns);
          multiply_tile(*group.gate_up, up_panel + p, tile.rows(), m, up, columns);
          for (int i = 0; i < m; i++)
            for (int j = 0; j < columns; j += LANES)
              store(&inner[(a + i) * inner_stride + p * columns + j],
                    vec_silu(load(gate + i * columns + j)) * load(up + i * columns + j));
        }
#pragma omp barrier
    if (is_int8) {
#pragma omp for schedule(static)
      for (int a = 0; a < num_all; a++) inner_q.split(a, &inner[a * inner_stride], width);
    }
    const int panels = second.num_panels();
    for (const Group& group : groups)
      for (int p = panels * thread / threads; p < panels * (thread + 1) / threads; p++)
        for (int a = group.begin; a < group.end; a += rows) {
          const int m = std::min(rows, group.end - a), wide = std::min(columns, second.num_columns - p * columns);
          for (int i = 0; i < m; i++) tile.set(i, &inner[(a + i) * inner_stride], inner_q, a + i);
          multiply_tile(*group.down, p, tile.rows(), m, gate, columns);
          for (int i = 0; i < m; i++) take(a + i, p * columns, gate + i * columns, wide);
        }
  }
}

}  // namespace

// sums (R, D) = weight_A * expert(x[row_A]) added up, assignments in any order. Returns the number of the first
// assignment that names a row that is not in x or an expert that is not there, and computes nothing then; else
// num_assigned.
//   gate_up, down: a packed weight for each expert, null where there is none; expert_A: (A,) index into them
extern "C" int moray_experts(const Weight* const* gate_up, const Weight* const* down, int num_experts, const float* x, int num_rows,
                             int hidden, const int32_t* expert_A, const int32_t* row_A, const float* weight_A, int num_assigned,
                             double* sums, int num_threads) {
  std::vector<int> begin(num_experts + 1, 0), order(num_assigned);
  for (int a = 0; a < num_assigned; a++) {
    const bool is_known = expert_A[a] >= 0 && expert_A[a] < num_experts && gate_up[expert_A[a]];
    if (!is_known || row_A[a] < 0 || row_A[a] >= num_rows) return a;
    begin[expert_A[a] + 1]++;
  }
  for (int e = 0; e < num_experts; e++) begin[e + 1] += begin[e];
  std::vector<Group> groups;
  for (int e = 0; e < num_experts; e++)
    if (begin[e] < begin[e + 1]) groups.push_back({gate_up[e], down[e], begin[e], begin[e + 1]});
  for (int a = 0; a < num_assigned; a++) order[begin[expert_A[a]]++] = a;
  const auto clear = [&](int row) { std::memset(sums + (size_t)row * hidden, 0, hidden * sizeof(double)); };
  const auto source = [&](int a) { return (int64_t)row_A[order[a]]; };
  const auto take = [&](int a, int column, const float* values, int count) {
    double* sum = sums + source(a) * hidden + column;
    for (int j = 0; j < count; j++) sum[j] += (double)(values[j] * weight_A[order[a]]);
  };
  if (num_assigned)
    run(groups, x, hidden, num_rows, source, clear, take, num_threads);
  else
    for (int r = 0; r < num_rows; r++) clear(r);
  return num_assigned;
}

// y (R, D) = down(silu(gate x) * up x), for few rows: what moray_gemm does in three calls.
extern "C" void moray_mlp(const Weight* gate_up, const Weight* down, const float* x, int64_t x_stride, int num_rows, float* y,
                          int num_threads) {
  if (num_rows == 0) return;
  const int width = down->num_columns;
  const auto source = [](int a) { return (int64_t)a; };
  const auto take = [&](int a, int column, const float* values, int count) {
    std::memcpy(y + (size_t)a * width + column, values, count * 4);
  };
  const auto nothing = [](int) {};
  run({{gate_up, down, 0, num_rows}}, x, x_stride, num_rows, source, nothing, take, num_threads);
}
