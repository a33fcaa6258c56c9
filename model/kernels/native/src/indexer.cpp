// The indexer of sparse attention: scores of cached keys, and the choice of the best.
#include <omp.h>

#include <vector>

#include "gemm.h"
#include "tile.h"

struct IndexerShape {
  int num_heads, width;
  int is_int8;         // keys are bytes around 128 and, behind them, the factor that brings them back
  int64_t row_stride;  // floats from a cache row to the next
};

namespace {

constexpr int KEYS = 64;      // keys of one small product
constexpr int CHUNK = 1024;   // keys that one thread takes of a row

// The queries of one row, heads in lanes; heads beyond the last weigh 0.
struct Queries {
  int padded = 0;
  std::vector<float> weight;  // (Hp), for INT8 times the query's factor
  std::vector<float> values;  // [width][Hp]
  std::vector<int8_t> bytes;  // [width/4][Hp][4]
  std::vector<int32_t> offset;  // (Hp): 128 * sum of a head's codes

  void set(const IndexerShape& s, const float* q, const float* head) {
    padded = round_up(s.num_heads, LANES);
    weight.assign(padded, 0.f);
    std::copy_n(head, s.num_heads, weight.begin());
    if (s.is_int8) return set_bytes(s, q);
    values.assign((size_t)s.width * padded, 0.f);
    for (int h = 0; h < s.num_heads; h++)
      for (int i = 0; i < s.width; i++) values[(size_t)i * padded + h] = q[(size_t)h * s.width + i];
  }

  void set_bytes(const IndexerShape& s, const float* q) {
    bytes.assign((size_t)s.width * padded, 0), offset.assign(padded, 0);
    std::vector<uint8_t> code(s.width);
    for (int h = 0; h < s.num_heads; h++) {
      float factor;
      quantise_row(q + (size_t)h * s.width, s.width, code.data(), &factor);
      weight[h] *= factor;
      for (int i = 0; i < s.width; i++) {
        const int value = code[i] - 128;
        bytes[((size_t)(i / 4) * padded + h) * 4 + i % 4] = (int8_t)value;
        offset[h] += 128 * value;
      }
    }
  }
};

void score_floats(const IndexerShape& s, const Queries& q, const float* const* keys, int num_keys, float* product, float* score) {
  const auto key = [&](int first) { return [=](int m, int k) { return keys[first + m][k]; }; };
  const float* at = q.values.data();
  const size_t padded = q.padded;
  for (int v = 0; v < q.padded; v += LANES)
    multiply<8>(num_keys, key, [=](int) { return Strided{at + v, padded}; }, s.width, 1, product + v, padded, nullptr);
  for (int i = 0; i < num_keys; i++) {
    VecF sum = {};
    for (int v = 0; v < q.padded; v += LANES) sum += larger(load(product + i * padded + v), VecF{}) * load(&q.weight[v]);
    score[i] = sum_lanes(sum);
  }
}

void score_bytes(const IndexerShape& s, const Queries& q, const float* const* keys, int num_keys, float* score) {
  constexpr int TOGETHER = 8;
  for (int from = 0; from < num_keys; from += TOGETHER) {
    const int together = std::min(TOGETHER, num_keys - from);
    VecF total[TOGETHER] = {};
    for (int v = 0; v < q.padded; v += LANES) {
      VecI sum[TOGETHER] = {};
      for (int k = 0; k < s.width / 4; k++) {
        const uint8_t* query = (const uint8_t*)&q.bytes[((size_t)k * q.padded + v) * 4];
        for (int i = 0; i < together; i++) {
          uint32_t quad;
          std::memcpy(&quad, (const uint8_t*)keys[from + i] + 4 * k, 4);
          sum[i] = dot4(sum[i], quad, query);
        }
      }
      const VecI offset = *(const VecI*)&q.offset[v];
      for (int i = 0; i < together; i++)
        total[i] += larger(__builtin_convertvector(sum[i] - offset, VecF), VecF{}) * load(&q.weight[v]);
    }
    for (int i = 0; i < together; i++) score[from + i] = sum_lanes(total[i]) * keys[from + i][s.width / 4];
  }
}

// Whole numbers in the order of the floats; zeros of either sign are equal.
inline uint32_t ordered(float x) {
  x += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The `rank`-th largest value (1 = the largest), found digit by digit, and how many of its equals are kept.
struct Threshold {
  uint32_t value = 0;
  int num_equal = 0;

  Threshold(const float* score, int num, int rank) {
    for (int shift : {21, 10, 0}) {
      const int bits = shift ? 11 : 10;
      std::vector<int> count(1 << bits, 0);
      const uint32_t high = shift == 21 ? 0 : ~0u << (shift + bits);
      for (int i = 0; i < num; i++) {
        const uint32_t key = ordered(score[i]);
        if (((key ^ value) & high) == 0) count[(key >> shift) & ((1 << bits) - 1)]++;
      }
      int digit = (1 << bits) - 1;
      for (; count[digit] < rank; digit--) rank -= count[digit];
      value |= (uint32_t)digit << shift;
    }
    num_equal = rank;
  }
};

}  // namespace

// score[r][i] = sum over heads of relu(q . key) * weight, for the i-th cache row that row r names.
//   cache: where the first row's indexer key begins; q (R, J, I); head (R, J); score (R, score_stride)
extern "C" void moray_index_scores(const IndexerShape* shape, const float* cache, const float* q, const float* head, int num_rows,
                                   const int64_t* const* ids, const int32_t* counts, float* score, int64_t score_stride,
                                   int num_threads) {
  const IndexerShape s = *shape;
  int chunks = 0;
  for (int r = 0; r < num_rows; r++) chunks = std::max(chunks, (counts[r] + CHUNK - 1) / CHUNK);
#pragma omp parallel num_threads(num_threads)
  {
    Queries query;
    std::vector<float> product((size_t)KEYS * round_up(s.num_heads, LANES));
    int held = -1;
#pragma omp for schedule(dynamic) collapse(2)
    for (int r = 0; r < num_rows; r++)
      for (int c = 0; c < chunks; c++) {
        if (r != held) query.set(s, q + (size_t)r * s.num_heads * s.width, head + (size_t)r * s.num_heads), held = r;
        for (int from = c * CHUNK; from < std::min(counts[r], (c + 1) * CHUNK); from += KEYS) {
          const int num_keys = std::min(KEYS, counts[r] - from);
          const float* keys[KEYS];
          for (int i = 0; i < num_keys; i++) keys[i] = cache + ids[r][from + i] * s.row_stride;
          float* to = score + r * score_stride + from;
          if (s.is_int8) score_bytes(s, query, keys, num_keys, to);
          else score_floats(s, query, keys, num_keys, product.data(), to);
        }
      }
  }
}

// The num_selected best of the first counts[r] scores of each row, by ascending position; ties go to the earlier.
extern "C" void moray_select_positions(const float* score, int num_rows, int64_t score_stride, const int32_t* counts, int num_selected,
                                       int64_t* selected, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int r = 0; r < num_rows; r++) {
    const float* row = score + r * score_stride;
    const Threshold threshold(row, counts[r], num_selected);
    int64_t* to = selected + (size_t)r * num_selected;
    int equal = threshold.num_equal;
    for (int i = 0; i < counts[r]; i++) {
      const uint32_t key = ordered(row[i]);
      if (key > threshold.value || (key == threshold.value && equal-- > 0)) *to++ = i;
    }
  }
}
