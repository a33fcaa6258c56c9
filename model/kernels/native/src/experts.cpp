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
  int padded;

  Activations(bool is_int8, int num_rows, int width)
      : bytes(is_int8 ? (size_t)num_rows * ((width + 3) / 4 * 4) : 0), scales(num_rows), padded((width + 3) / 4 * 4) {}
  void quantise(int row, const float* x, int width) { quantise_row(x, width, &bytes[(size_t)row * padded], &scales[row]); }
};

// The rows of one tile, wherever they lie.
struct Tile {
  const float* values[TILE_ROWS];
  const uint8_t* quantised[TILE_ROWS];
  float scales[TILE_ROWS];

  void set(int m, const float* x, const Activations& q, int row) {
    values[m] = x;
    if (q.bytes.empty()) return;
    quantised[m] = &q.bytes[(size_t)row * q.padded];
    scales[m] = q.scales[row];
  }
  Rows rows() const { return {values, quantised, scales}; }
};

}  // namespace

// sums (R, D) += weight_A * expert(x[row_A]), assignments in any order.
//   gate_up, down: a packed weight for each expert, null where there is none; expert_A: (A,) index into them
extern "C" void moray_experts(const Weight* const* gate_up, const Weight* const* down, int num_experts, const float* x, int num_rows,
                              const int64_t* expert_A, const int64_t* row_A, const float* weight_A, int num_assigned, double* sums,
                              int num_threads) {
  if (num_assigned == 0) return;
  std::vector<int> begin(num_experts + 1, 0), order(num_assigned);
  for (int a = 0; a < num_assigned; a++) begin[expert_A[a] + 1]++;
  for (int e = 0; e < num_experts; e++) begin[e + 1] += begin[e];
  std::vector<Group> groups;
  for (int e = 0; e < num_experts; e++)
    if (begin[e] < begin[e + 1]) groups.push_back({gate_up[e], down[e], begin[e], begin[e + 1]});
  for (int a = 0; a < num_assigned; a++) order[begin[expert_A[a]]++] = a;
  const Weight &first = *groups[0].gate_up, &second = *groups[0].down;
  const int hidden = first.width, width = second.width;
  const int kind = first.kind, rows = rows_of_tile(kind), columns = first.panel_columns();
  const bool is_int8 = kind == INT8;
  const int up_panel = (width + columns - 1) / columns;  // gate and up are padded to panels each
  const std::unique_ptr<float[]> inner(new float[(size_t)num_assigned * up_panel * columns]);
  const size_t inner_stride = (size_t)up_panel * columns;
  Activations outer_q(is_int8, num_rows, hidden), inner_q(is_int8, num_assigned, width);
#pragma omp parallel num_threads(num_threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    alignas(64) float gate[TILE_ROWS * INT8_PANEL], up[TILE_ROWS * INT8_PANEL];
    Tile tile;
    if (is_int8) {
#pragma omp for schedule(static)
      for (int r = 0; r < num_rows; r++) outer_q.quantise(r, x + (size_t)r * hidden, hidden);
    }
    for (const Group& group : groups)
      for (int p = up_panel * thread / threads; p < up_panel * (thread + 1) / threads; p++)
        for (int a = group.begin; a < group.end; a += rows) {
          const int m = std::min(rows, group.end - a);
          for (int i = 0; i < m; i++) tile.set(i, x + row_A[order[a + i]] * hidden, outer_q, (int)row_A[order[a + i]]);
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
      for (int a = 0; a < num_assigned; a++) inner_q.quantise(a, &inner[a * inner_stride], width);
    }
    const int panels = second.num_panels();
    for (const Group& group : groups)
      for (int p = panels * thread / threads; p < panels * (thread + 1) / threads; p++)
        for (int a = group.begin; a < group.end; a += rows) {
          const int m = std::min(rows, group.end - a), wide = std::min(columns, hidden - p * columns);
          for (int i = 0; i < m; i++) tile.set(i, &inner[(a + i) * inner_stride], inner_q, a + i);
          multiply_tile(*group.down, p, tile.rows(), m, gate, columns);
          for (int i = 0; i < m; i++) {
            double* sum = sums + row_A[order[a + i]] * hidden + p * columns;
            for (int j = 0; j < wide; j++) sum[j] += (double)(gate[i * columns + j] * weight_A[order[a + i]]);
          }
        }
  }
}
